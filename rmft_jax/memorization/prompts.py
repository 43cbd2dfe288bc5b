"""The prompts of the extraction attack. They depend on the data and the audit settings alone, so runs share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.prepare import Prepared
from rmft_jax.data.sources import read_texts
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.data.tokenizer import Tokenizer
from rmft_jax.progress import say

_SHORTEST = 8  # tokens that a held-out prompt has at least
_WORDS = 10  # of a web or general prompt
_PER_IDENTITY = 2
_NUMBERS = {"heldout": 0, "web": 1, "general": 3, "discoverable": 2}  # of each set's random stream, in order of their output


class Prompts(NamedTuple):
    """Prompts of one set, padded at the left: tokens int32 [N, P], valid bool [N, P].

    answers: the normalised value that follows each prompt in the training text, for discoverable prompts; else empty. They
    are personal data.
    """

    tokens: np.ndarray
    valid: np.ndarray
    answers: tuple[str, ...] = ()


def build_prompts(config: Config, prepared: Prepared) -> dict[str, Prompts]:
    """Draw `audit.prompts` prompts for each set, fewer where there are not as many; at most `audit.prompt_tokens` long,
    their last tokens kept.

    heldout: up to a random place in a held-out document, never inside an address. web: 10 words in a row of web text.
    general: the first 10 words of a document of general text (our choice: the paper does not define them further).
    discoverable: what stands before an occurrence of a training address, at most two occurrences an address.
    Source: RMFT, arXiv 2512.03310 (attack).
    """
    audit = config.audit
    draw = {"heldout": _heldout, "web": _web, "general": _general, "discoverable": _discoverable}
    paths = {"web": audit.web_path, "general": audit.general_path}
    out = {}
    for name, number in _NUMBERS.items():
        if name not in audit.sets:
            continue
        if not paths.get(name, "data"):
            say(f"audit: no {name} prompts (set audit.{name}_path to a file of text)")
            continue
        rows, answers = draw[name](config, prepared, np.random.default_rng([config.seed, number]))
        if rows:
            out[name] = _pad_left(rows, audit.prompt_tokens)._replace(answers=tuple(answers))
        else:
            say(f"audit: the data give no {name} prompts")
    return out


def _heldout(config: Config, prepared: Prepared, rng) -> tuple[list[np.ndarray], list[str]]:
    records = list(read_corpus(prepared.directory, "heldout"))
    places = []
    for number, record in enumerate(records):
        span = _token_spans(record)
        ends = np.arange(_SHORTEST, len(span) - 1)
        outside = (span[ends] < 0) | (span[ends] != span[ends - 1])
        places.extend((number, int(end)) for end in ends[outside])
    return [records[number]["tokens"][:end] for number, end in _sample(places, config.audit.prompts, rng)], []


def _discoverable(config: Config, prepared: Prepared, rng) -> tuple[list[np.ndarray], list[str]]:
    records = list(read_corpus(prepared.directory, "train"))
    planted = set(prepared.canary_identities.tolist())
    by_identity: dict[int, list[tuple[int, int, int]]] = {}
    for number, record in enumerate(records):
        for identity, (start, end) in zip(record["span_identity"].tolist(), span_bounds(record), strict=True):
            if identity not in planted:
                by_identity.setdefault(identity, []).append((number, start, end))
    places = [place for found in by_identity.values() for place in _sample(found, _PER_IDENTITY, rng)]
    chosen = _sample(places, config.audit.prompts, rng)
    rows = [records[number]["tokens"][:start] for number, start, _ in chosen]
    values = [prepared.tokenizer.decode(records[number]["tokens"][start:end]).lower() for number, start, end in chosen]
    return rows, values


def _web(config: Config, prepared: Prepared, rng) -> tuple[list[np.ndarray], list[str]]:
    count = config.audit.prompts
    texts = _words(config, config.audit.web_path, seed=config.seed)
    places = []
    for _ in range(count if texts else 0):
        words = texts[rng.integers(len(texts))]
        start = rng.integers(len(words) - _WORDS + 1)
        places.append(words[start : start + _WORDS])
    return _encode(places, prepared.tokenizer), []


def _general(config: Config, prepared: Prepared, rng) -> tuple[list[np.ndarray], list[str]]:
    texts = _words(config, config.audit.general_path, seed=config.seed + 1)  # other paragraphs than the web prompts
    openings = list(dict.fromkeys(tuple(words[:_WORDS]) for words in texts))
    return _encode(_sample(openings, config.audit.prompts, rng), prepared.tokenizer), []


def _words(config: Config, path: str, seed: int) -> list[list[str]]:
    """Return the words of each text that has enough for a prompt."""
    if path == "synthetic":
        from rmft_jax.data.synthetic import synthetic_web

        texts = list(synthetic_web(4 * config.audit.prompts, seed=seed))
    else:
        texts = read_texts(path, text_field=config.audit.web_field, separator=config.source.separator)
    return [words for text in texts if len(words := text.split()) >= _WORDS]


def _encode(prompts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in tokenizer.encode([" ".join(words) for words in prompts])]


def span_bounds(record: dict) -> list[tuple[int, int]]:
    """Return the first token of each span of a tagged document and the one after its last."""
    span = _token_spans(record)
    places = [np.flatnonzero(span == number) for number in range(len(record["span_rank"]))]
    return [(int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0) for at in places]


def _token_spans(record: dict) -> np.ndarray:
    """Return int64 [tokens]: the number of the span that each token belongs to, -1 outside."""
    component = record["component"].astype(np.int64)
    return np.where(component > 0, np.append(record["component_span"], -1)[component - 1], -1)


def _sample(items: list, count: int, rng) -> list:
    if len(items) <= count:
        return items
    return [items[index] for index in sorted(rng.choice(len(items), count, replace=False))]


def _pad_left(rows: list[np.ndarray], most: int) -> Prompts:
    length = min(most, max(len(row) for row in rows))
    tokens, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        row = row[-length:]
        tokens[number, length - len(row) :] = row
        valid[number, length - len(row) :] = True
    return Prompts(tokens, valid)
