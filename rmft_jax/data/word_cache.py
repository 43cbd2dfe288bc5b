"""Encode a text word by word and keep the ids of words: most words of a corpus have been met before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np

_REMEMBERED = 1 << 19  # words
_REMEMBERED_IDS = 1 << 22


def flat(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return lists of ids as one array, int32 [ids], and their lengths, int64 [lists]."""
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, sizes.sum()), sizes


def encode_around(
    sign: str, ids: Sequence[int], texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]]
) -> list[list[int]]:
    """Encode each text, with `ids` in the place of each `sign` in it; without ids as `encode` does."""
    if not ids or not any(sign in text for text in texts):
        return encode(list(texts))
    parts = [text.split(sign) for text in texts]
    found = iter(encode(list(chain.from_iterable(parts))))
    out = []
    for some in parts:
        joined = list(next(found))
        for _ in some[1:]:
            joined += [*ids, *next(found)]
        out.append(joined)
    return out


class _Rows(dict):
    """Numbers words as they are asked for. new: those that were numbered since it was last emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self.new.append(word)
        row = self[word] = len(self)
        return row


class WordCache:
    """Ids of words, for a BPE whose pieces lie within words: what it joins in one word does not depend on the next."""

    def __init__(self, pattern: str, encode: Callable[[list[str]], list[list[int]]]):
        """pattern: what words are, across which no piece lies. encode: strings -> ids of each."""
        self._split, self._encode = re.compile(pattern).findall, encode
        self._forget()

    @classmethod
    def of_pieces(cls, pieces: Iterable[str], encode: Callable[[list[str]], list[list[int]]]) -> WordCache | None:
        """Return a cache for a vocabulary; None where a piece has a letter before a space, and so may lie across words."""
        pieces = list(pieces)
        if any(re.search("[^ ] ", piece) for piece in pieces):
            return None
        lines_apart = not any("\n" in piece and len(piece) > 1 for piece in pieces)
        return cls(r"\n| *[^ \n]+| +" if lines_apart else " *[^ ]+| +", encode)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts, int32 [ids], and how many each one has, int64 [texts]."""
        if len(self._rows) > _REMEMBERED or len(self._ids) > _REMEMBERED_IDS:
            self._forget()
        split = self._split
        words = [split(text) if " " in text or "\n" in text else (text,) for text in texts]
        counts = np.fromiter(map(len, words), np.int64, len(words))
        rows = np.fromiter(map(self._rows.__getitem__, chain.from_iterable(words)), np.int32, counts.sum())
        self._learn()
        sizes = self._sizes[rows]
        borders = np.concatenate([np.zeros(1, np.int32), np.cumsum(sizes, dtype=np.int32)])
        where = np.repeat(self._begins[rows] - borders[:-1], sizes)
        where += np.arange(len(where), dtype=np.int32)
        return self._ids[where], np.diff(borders[np.concatenate([[0], np.cumsum(counts)])]).astype(np.int64)

    def _learn(self) -> None:
        if not self._rows.new:
            return
        ids, sizes = flat(self._encode(self._rows.new))
        self._rows.new.clear()
        begins = (len(self._ids) + np.cumsum(sizes) - sizes).astype(np.int32)
        self._ids = np.concatenate([self._ids, ids])
        self._sizes = np.concatenate([self._sizes, sizes.astype(np.int32)])
        self._begins = np.concatenate([self._begins, begins])

    def _forget(self) -> None:
        self._rows = _Rows()
        self._ids = self._sizes = self._begins = np.zeros(0, np.int32)
