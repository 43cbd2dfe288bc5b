"""The prompts of the extraction attack. They depend on the data and the audit settings alone, so runs share them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.prepare import Prepared
from rmft_jax.data.sources import read_texts
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.data.tokenizer import Tokenizer
from rmft_jax.progress import say

_SHORTEST = 8  # tokens that a held-out prompt has at least
_WEB_WORDS = 10
_PER_IDENTITY = 2


class Prompts(NamedTuple):
    """Prompts of one set, padded at the left: tokens int32 [N, P], valid bool [N, P]."""

    tokens: np.ndarray
    valid: np.ndarray


def build_prompts(config: Config, prepared: Prepared) -> dict[str, Prompts]:
    """Draw `audit.prompts` prompts for each set, fewer where there are not as many; at most `audit.prompt_tokens` long,
    their last tokens kept.

    heldout: up to a random place in a held-out document, never inside an address. web: 10 words in a row of web text.
    discoverable: what stands before an occurrence of a training address, at most two occurrences an address.
    Source: RMFT, arXiv 2512.03310 (attack).
    """
    audit = config.audit
    out = {}
    for number, name in enumerate(("heldout", "web", "discoverable")):
        rng = np.random.default_rng([config.seed, number])
        if name not in audit.sets:
            continue
        if name == "web":
            if not audit.web_path:
                say("audit: no web prompts (set audit.web_path to a file of text)")
                continue
            rows = _web(config, prepared.tokenizer, rng)
        else:
            rows = (_heldout if name == "heldout" else _discoverable)(config, prepared, rng)
        if rows:
            out[name] = _pad_left(rows, audit.prompt_tokens)
        else:
            say(f"audit: the data give no {name} prompts")
    return out


def _heldout(config: Config, prepared: Prepared, rng) -> list[np.ndarray]:
    records = list(read_corpus(prepared.directory, "heldout"))
    places = []
    for number, record in enumerate(records):
        span = _token_spans(record)
        ends = np.arange(_SHORTEST, len(span) - 1)
        outside = (span[ends] < 0) | (span[ends] != span[ends - 1])
        places.extend((number, int(end)) for end in ends[outside])
    return [records[number]["tokens"][:end] for number, end in _sample(places, config.audit.prompts, rng)]


def _discoverable(config: Config, prepared: Prepared, rng) -> list[np.ndarray]:
    records = list(read_corpus(prepared.directory, "train"))
    by_identity: dict[int, list[tuple[int, int]]] = {}
    for number, record in enumerate(records):
        span = _token_spans(record)
        starts = [int(np.argmax(span == number_of)) for number_of in range(len(record["span_rank"]))]
        for identity, start in zip(record["span_identity"].tolist(), starts, strict=True):
            by_identity.setdefault(identity, []).append((number, start))
    places = [place for found in by_identity.values() for place in _sample(found, _PER_IDENTITY, rng)]
    return [records[number]["tokens"][:end] for number, end in _sample(places, config.audit.prompts, rng)]


def _web(config: Config, tokenizer: Tokenizer, rng) -> list[np.ndarray]:
    audit = config.audit
    if audit.web_path == "synthetic":
        from rmft_jax.data.synthetic import synthetic_web

        texts = list(synthetic_web(4 * audit.prompts, seed=config.seed))
    else:
        texts = read_texts(audit.web_path, text_field=audit.web_field, separator=config.source.separator)
    long_enough = [words for text in texts if len(words := text.split()) >= _WEB_WORDS]
    rows = []
    for _ in range(audit.prompts if long_enough else 0):
        words = long_enough[rng.integers(len(long_enough))]
        start = rng.integers(len(words) - _WEB_WORDS + 1)
        rows.append(np.array(tokenizer.encode([" ".join(words[start : start + _WEB_WORDS])])[0], np.int32))
    return rows


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
