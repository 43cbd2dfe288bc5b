"""Cut the tagged corpus into blocks of one size: the rows that `mask_batch` takes.

Documents are concatenated in corpus order and split, as the RMFT paper did. Neighbouring blocks share one token, the last
of one being the context of the next, so that every token is a target exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rmft_jax.errors import UserError
from rmft_jax.kernels import TaggedBatch


class Corpus:
    """All documents of a split as flat arrays. Component and span numbers count from 1 over the corpus; 0 = none."""

    def __init__(self, records: Iterable[dict[str, np.ndarray]], *, drop_near: bool = False, drop_exact: bool = False):
        """drop_near, drop_exact: leave out tokens flagged as near-duplicate documents or repeated substrings."""
        names = ("tokens", "document", "component", "component_kind", "component_span", "component_index")
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        spans: dict[str, list[np.ndarray]] = {name: [] for name in ("type", "identity", "rank", "id")}
        lost: list[np.ndarray] = []
        component_count = span_count = 0
        for record in records:
            flags = record["duplicate"]
            keep = ~((drop_near & (flags == 1)) | (drop_exact & (flags == 2)))
            component = record["component"].astype(np.int64)
            if not keep.any():
                continue
            parts["tokens"].append(record["tokens"][keep])
            parts["document"].append(np.full(keep.sum(), record["document"], np.int64))
            parts["component"].append(np.where(component > 0, component + component_count, 0)[keep])
            parts["component_kind"].append(record["component_kind"])
            parts["component_span"].append(record["component_span"].astype(np.int64) + 1 + span_count)
            parts["component_index"].append(record["component_index"])
            for name, values in spans.items():
                values.append(record[f"span_{name}"])
            broken = np.zeros(len(record["span_rank"]), bool)
            if not keep.all():
                gone = component[~keep]
                broken[record["component_span"][gone[gone > 0] - 1]] = True
            lost.append(broken)
            component_count += len(record["component_kind"])
            span_count += len(record["span_rank"])
        if not parts["tokens"]:
            raise UserError("no tokens are left to train on: check source.path and dedup.policy")
        slot0 = np.zeros(1, np.int64)
        flat = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        self.tokens = flat["tokens"].astype(np.int32)
        self.document = flat["document"]
        self.component = flat["component"]
        self.component_kind = np.concatenate([slot0, flat["component_kind"]])
        self.component_span = np.concatenate([slot0, flat["component_span"]])
        self.component_index = np.concatenate([slot0, flat["component_index"]])
        self.span = {name: np.concatenate([slot0, *values]) for name, values in spans.items()}
        self.span_broken = np.concatenate([np.ones(1, bool), *lost])
        self.component_first, self.component_last = _extent(self.component, component_count + 1)
        self.token_span = self.component_span[self.component]
        self.span_first, self.span_last = _extent(self.token_span, span_count + 1)


class Blocks:
    """A random-access source of rows: `blocks[i]` is one row of a TaggedBatch as a dict of int32 arrays."""

    def __init__(self, corpus: Corpus, *, stride: int):
        """stride: new target tokens of each block; rows are stride + 1 tokens wide."""
        self.corpus, self.stride, self.width = corpus, stride, stride + 1
        count = max(1, -(-(len(corpus.tokens) - 1) // stride))
        self._begin = np.arange(count, dtype=np.int64) * stride
        end = np.minimum(self._begin + self.width, len(corpus.tokens))
        self._components = _overlapping(corpus.component_first, corpus.component_last, self._begin, end)
        self._spans = _overlapping(corpus.span_first, corpus.span_last, self._begin, end)
        # static shapes: the most that any block holds, in steps of 8, and slot 0
        self.max_components = _round_up(1 + int((self._components[1] - self._components[0]).max(initial=0)))
        self.max_spans = _round_up(1 + int((self._spans[1] - self._spans[0]).max(initial=0)))

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        corpus, begin = self.corpus, self._begin[index]
        end = min(begin + self.width, len(corpus.tokens))
        size = end - begin
        c0, c1 = self._components[0][index], self._components[1][index]
        s0, s1 = self._spans[0][index], self._spans[1][index]

        def fill(values: np.ndarray, length: int, *, slot0: bool = True) -> np.ndarray:
            out = np.zeros(length, np.int32)
            out[slot0 : slot0 + len(values)] = values
            return out

        document = corpus.document[begin:end]
        segment = 1 + np.cumsum(np.concatenate([[0], document[1:] != document[:-1]]))
        component = corpus.component[begin:end]
        component_begin = corpus.component_first[c0:c1] - begin
        component_span = corpus.component_span[c0:c1]
        span_first, span_last = corpus.span_first[s0:s1], corpus.span_last[s0:s1]
        whole = (span_first >= begin) & (span_last < end) & ~corpus.span_broken[s0:s1]
        span = {name: fill(values[s0:s1], self.max_spans) for name, values in corpus.span.items()}
        row = {
            "tokens": fill(corpus.tokens[begin:end], self.width, slot0=False),
            "segment_ids": fill(segment, self.width, slot0=False),
            "component": fill(np.where(component > 0, component - c0 + 1, 0), self.width, slot0=False),
            "component_begin": fill(np.maximum(component_begin, -1), self.max_components),
            "component_kind": fill(corpus.component_kind[c0:c1], self.max_components),
            "component_span": fill(component_span - s0 + 1, self.max_components),
            "component_index": fill(corpus.component_index[c0:c1], self.max_components),
            "span_rank": span["rank"],
            "span_type": span["type"],
            "span_identity": span["identity"],
            "span_id": span["id"],
            "span_end": fill(np.where(whole, span_last - begin, -1), self.max_spans),
            "epoch": np.zeros((), np.int32),
        }
        row["component_begin"][0] = -1
        row["span_end"][0] = -1
        row["span_end"][1 + s1 - s0 :] = -1
        assert size > 0
        return row

    def documents(self, index: int) -> np.ndarray:
        """Return int64 [W]: the document number of each token of a block, -1 on padding."""
        begin = self._begin[index]
        out = np.full(self.width, -1, np.int64)
        values = self.corpus.document[begin : begin + self.width]
        out[: len(values)] = values
        return out


def as_batch(rows: list[dict[str, np.ndarray]]) -> TaggedBatch:
    """Stack rows into a TaggedBatch of numpy arrays."""
    return TaggedBatch(**{name: np.stack([row[name] for row in rows]) for name in TaggedBatch._fields})


def _extent(owner: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last position of each owner in a non-decreasing sequence (but for 0 = nobody).

    An owner without tokens takes the place of its predecessor's end, as an empty range.
    """
    positions = np.flatnonzero(owner)
    values = owner[positions]
    numbers = np.arange(count)
    low = np.searchsorted(values, numbers, side="left")
    high = np.searchsorted(values, numbers, side="right")
    padded = np.append(positions, len(owner))
    first = padded[low]
    last = np.where(high > low, padded[high - 1], first - 1)
    first[0], last[0] = 0, -1
    return first, last


def _overlapping(first: np.ndarray, last: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the range [low, high) of owners (slot 0 left out) that have a token in [begin, end) of each block."""
    low = 1 + np.searchsorted(last[1:], begin, side="left")
    high = 1 + np.searchsorted(first[1:], end, side="left")
    return low, np.maximum(low, high)


def _round_up(size: int, step: int = 8) -> int:
    return -(-size // step) * step
