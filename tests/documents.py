"""Random documents with addresses in awkward places, and their tagged form, for the masking tests."""

import random

import jax
import numpy as np

from rmft_jax.config import PiiConfig
from rmft_jax.data.blocks import Blocks, Corpus
from rmft_jax.data.loader import batches
from rmft_jax.data.tagging import Identities, tag
from rmft_jax.kernels import mask_batch
from rmft_jax.models.gpt import init_params
from rmft_jax.pii.bank import build_bank
from rmft_jax.pii.detector import Detector, detect
from rmft_jax.training.masking import masking_key, masking_rules
from rmft_jax.training.setup import load_blocks

NAMES = ["ann", "bob.stone", "j", "carla.van.der.berg", "x_17", "Dora", "maximilian", "f..brawner", "a-b"]
DOMAINS = ["alder.example.com", "b.example.org", "mail.quartz-works.example.net", "C.EXAMPLE.COM", "zz.co.uk"]
WORDS = "please send the report to our office by Monday at 10:30, thanks -- see  notes\n\tbelow: é–ü".split(" ")


def random_texts(count: int, seed: int) -> list[str]:
    """Texts with addresses at both ends, side by side, or nowhere; values repeat within and across documents."""
    rng = random.Random(seed)
    address = lambda: f"{rng.choice(NAMES)}@{rng.choice(DOMAINS)}"  # noqa: E731
    texts = []
    for number in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 30))]
        kind = number % 5
        if kind == 1:  # at both ends
            words = [address(), *words, address()]
        elif kind == 2:  # neighbours, only a separator between them
            words.insert(rng.randint(0, len(words)), rng.choice([",", ";", ", ", " <"]).join(address() for _ in range(4)))
        elif kind == 3:  # anywhere
            for _ in range(rng.randint(1, 6)):
                words.insert(rng.randint(0, len(words)), address())
        elif kind == 4:  # nothing else
            words = [address()]
        texts.append(" ".join(words))
    return texts


def tagged(texts: list[str], tokenizer, detector: Detector | None = None):
    """Return the texts' spans, their numbering and their records."""
    detector = detector or Detector(PiiConfig())
    spans = list(detector.detect_many(texts))
    identities = Identities.empty()
    numbering = [identities.add(found) for found in spans]
    records = list(tag(list(zip(texts, spans, strict=True)), numbering, tokenizer, detector))
    for number, record in enumerate(records):
        record |= {"document": number, "duplicate": np.zeros(len(record["tokens"]), np.uint8)}
    return spans, numbering, records


def check_round_trip(texts, tokenizer):
    """Tokens decode to the text, spans to the detected values, ranks to a naive count."""
    spans, numbering, records = tagged(texts, tokenizer)
    counts: dict[str, int] = {}
    ids = []
    for text, found, numbers, record in zip(texts, spans, numbering, records, strict=True):
        assert tokenizer.decode(record["tokens"]) == text
        component = record["component"].astype(int)
        for number, span in enumerate(found):
            mine = (component > 0) & (np.append(record["component_span"], -1)[component - 1] == number)
            assert tokenizer.decode(record["tokens"][mine]).lower() == span.value
            assert numbers["span_rank"][number] == counts.get(span.value, 0)
            counts[span.value] = counts.get(span.value, 0) + 1
        outside = [tokenizer.decode(run) for run in np.split(record["tokens"], np.flatnonzero(component > 0)) if len(run)]
        assert not any(detect(part) for part in outside if "@" not in part)
        ids += numbers["span_id"]
    assert ids == list(range(len(ids)))


def component_values(pairs, detector):
    """Return the components of each PII value, (text in lower case, kind), as its first occurrence is cut."""
    values = {}
    for text, spans in pairs:
        for span in spans:
            if span.value not in values:
                parts = detector.components(text, span)
                values[span.value] = [(part.lower(), kind) for part, kind in zip(parts.texts, parts.kinds, strict=True)]
    return list(values.values())


def bank_of(texts: list[str], spans, tokenizer, detector: Detector | None = None):
    """Return the surrogate bank of a corpus."""
    detector = detector or Detector(PiiConfig())
    values = component_values(list(zip(texts, spans, strict=True)), detector)
    return build_bank(tokenizer.encode, values, detector, rows=500, seed=0)


def blocks_of(records: list[dict], stride: int) -> Blocks:
    """Cut records into blocks."""
    return Blocks(Corpus(records), stride=stride)


SMALL = ["model.layers=1", "model.width=16", "model.heads=1", "masking.policy=none", "training.batch_size=4"]


def small_config(tiny, *settings):
    return tiny(*SMALL, *settings)


def small_batch(tiny, prepared, *settings):
    """Return a config, a masked batch and parameters for it."""
    config = small_config(tiny, *settings)
    blocks, _ = load_blocks(config, prepared)
    tagged = next(batches(blocks, batch_size=config.training.batch_size, seed=0))
    key, rules = masking_key(config.seed), masking_rules(config)
    length = config.training.sequence_length + 1
    masked = jax.jit(lambda tagged: mask_batch(tagged, prepared.bank, key, length=length, rules=rules))(tagged)
    return config, masked, init_params(config.model, prepared.tokenizer.vocab_size, jax.random.key(1))
