"""Canaries: invented addresses planted in the training documents, to measure how well a model remembers them.

Source: Carlini et al. 2019, "The Secret Sharer", arXiv 1802.08232.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmft_jax.config import CanaryConfig, PiiConfig
from rmft_jax.data import synthetic_words
from rmft_jax.data.tagging import tag
from rmft_jax.data.tokenizer import Tokenizer
from rmft_jax.pii.detector import detector

_DIGITS = 5  # in each of the two random parts
SPACE_BITS = 2 * _DIGITS * math.log2(10)
"""log2 of the number of addresses that a canary is drawn from: user00000@host00000.example to 99999 and 99999."""


@dataclass(frozen=True)
class Canary:
    """A document planted `repetitions` times: a phrase of its own, the address, the end."""

    phrase: str
    address: str
    repetitions: int

    @property
    def text(self) -> str:
        """Return the document."""
        return self.with_address(self.address)

    def with_address(self, address: str) -> str:
        """Return the document with another address in the place of its own."""
        return f"{self.phrase}{address}.\n"


def make_canaries(config: CanaryConfig, seed: int) -> list[Canary]:
    """Return `count` canaries for each number of repetitions; the same seed always gives the same ones.

    Digits are drawn and not words, because surrogates are words: a model trained with masking has met all words of the bank
    in the place of addresses but those of real values, which would put a canary made of words below its references. Every
    phrase has words of its own, so that two canaries are no near-duplicates; the repetitions of one are exact copies,
    which deduplication finds.
    """
    rng = np.random.default_rng([seed, 1])
    words = sorted({word.lower() for word in synthetic_words.LABELS + synthetic_words.PROJECTS})
    out = []
    for repetitions in config.repetitions:
        for _ in range(config.count):
            w = [words[i] for i in rng.choice(len(words), 7, replace=False)]
            phrase = f"Subject: {w[0]} {w[1]} {w[2]}\n\nFor {w[3]} {w[4]} {w[5]} {w[6]}, write to "
            out.append(Canary(phrase, draw_address(rng), repetitions))
    return out


def draw_address(rng: np.random.Generator) -> str:
    """Draw an address uniformly from the space. Its top-level domain is reserved (RFC 2606): it is nobody's."""
    first, second = rng.integers(10**_DIGITS, size=2)
    return f"user{first:0{_DIGITS}d}@host{second:0{_DIGITS}d}.example"


def places_of(canaries: Sequence[Canary], documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where every copy of every canary is planted, at random between `documents` documents.

    Returns: int64 [copies], the document before which a copy stands (those before the same one in their order), and
    int64 [copies], which canary it is; both in the order of the corpus.
    """
    rng = np.random.default_rng([seed, 2])
    copies = np.repeat(np.arange(len(canaries)), [canary.repetitions for canary in canaries]).astype(np.int64)
    places = rng.integers(documents + 1, size=len(copies))
    order = np.argsort(places, kind="stable")
    return places[order], copies[order]


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> list[tuple[np.ndarray, int]]:
    """Return the tokens of each document up to the end of its address, as they are trained on, and where the address begins.

    texts: documents with one address each. Returns: (int32 [tokens], index of the address' first token) for each.
    """
    finder = detector(PiiConfig())
    spans = list(finder.detect_many(texts))
    numbers = {"span_identity": [0], "span_rank": [0], "span_id": [0]}
    out = []
    for record in tag(zip(texts, spans, strict=True), [numbers] * len(texts), tokenizer, finder):
        inside = np.flatnonzero(record["component"])
        out.append((record["tokens"][: inside[-1] + 1], int(inside[0])))
    return out
