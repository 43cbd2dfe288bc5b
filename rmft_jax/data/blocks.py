"""Cut the tagged corpus into blocks of one size: the rows that `mask_batch` takes.

Documents are concatenated in corpus order and split, as the RMFT paper did. Neighbouring blocks share one token, the last
of one being the context of the next, so that every token is a target exactly once an epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from rmft_jax.errors import UserError
from rmft_jax.kernels import TaggedBatch


class Corpus:
    """All documents of a split as flat arrays. Component and span numbers count from 1 over the corpus; 0 = none."""

    def __init__(
        self,
        records: Iterable[dict[str, np.ndarray]],
        *,
        drop_near: bool = False,
        drop_exact: bool = False,
        scope: str = "occurrence",
        tags: np.ndarray | None = None,
    ):
        """drop_near, drop_exact: leave out tokens flagged as near-duplicate documents or repeated substrings.

        scope: what counts as one showing of a value. occurrence: each of its spans. document: all its spans in a document;
        they share an id (and so a surrogate), and ranks and counts are those of documents. corpus: all spans share one id.

        tags: int [tokens of all records], the `tag` of each token as in a TaggedBatch; all 0 unless said.
        """
        names = ("tokens", "document", "component", "component_kind", "component_span", "component_index", "component_value")
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        spans: dict[str, list[np.ndarray]] = {name: [] for name in ("type", "identity", "rank", "id")}
        lost: list[np.ndarray] = []
        span_documents: list[np.ndarray] = []
        component_count = span_count = token_count = 0
        tagged: list[np.ndarray] = []
        for record in records:
            keep = kept(record, drop_near=drop_near, drop_exact=drop_exact)
            component = record["component"].astype(np.int64)
            own = slice(token_count, token_count + len(keep))
            token_count = own.stop
            if not keep.any():
                continue
            tagged.append(np.zeros(keep.sum(), np.int32) if tags is None else tags[own][keep].astype(np.int32))
            parts["tokens"].append(record["tokens"][keep])
            parts["document"].append(np.full(keep.sum(), record["document"], np.int64))
            parts["component"].append(np.where(component > 0, component + component_count, 0)[keep])
            parts["component_kind"].append(record["component_kind"])
            parts["component_span"].append(record["component_span"].astype(np.int64) + 1 + span_count)
            parts["component_index"].append(record["component_index"])
            parts["component_value"].append(record["component_value"])
            for name, values in spans.items():
                values.append(record[f"span_{name}"])
            span_documents.append(np.full(len(record["span_rank"]), record["document"], np.int64))
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
        self.tag = np.concatenate(tagged)
        self.component = flat["component"]
        self.component_kind = np.concatenate([slot0, flat["component_kind"]])
        self.component_span = np.concatenate([slot0, flat["component_span"]])
        self.component_index = np.concatenate([slot0, flat["component_index"]])
        self.component_value = np.concatenate([slot0, flat["component_value"]])
        self.span = {name: np.concatenate([slot0, *values]) for name, values in spans.items()}
        span_document = np.concatenate([slot0 - 1, *span_documents])
        if scope != "occurrence":
            self.span["id"] = shared_ids(self.span, span_document if scope == "document" else np.zeros_like(span_document))
        if scope == "document":
            self.span["rank"][1:] = _document_ranks(self.span["identity"][1:], span_document[1:])
        self.span["count"] = _counts(self.span)
        self.component_sharers = _sharers(self.component_value, self.component_kind, self.component_span, self.span)
        self.span_broken = np.concatenate([np.ones(1, bool), *lost])
        self.component_first, self.component_last = _extent(self.component, component_count + 1)
        self.token_span = self.component_span[self.component]
        self.span_first, self.span_last = _extent(self.token_span, span_count + 1)


def kept(record: dict[str, np.ndarray], *, drop_near: bool, drop_exact: bool) -> np.ndarray:
    """Return bool [tokens]: those of a document that are not left out as duplicates."""
    flags = record["duplicate"]
    return ~((drop_near & (flags == 1)) | (drop_exact & (flags == 2)))


class Blocks:
    """A random-access source of rows: `blocks[i]` is one row of a TaggedBatch as a dict of int32 arrays."""

    def __init__(self, corpus: Corpus, *, stride: int, apart: bool = False, edges: np.ndarray | None = None):
        """stride: new target tokens of each block; rows are stride + 1 tokens wide. apart: no two documents share one.

        edges: int [groups + 1], places in the corpus that no row crosses, from 0 to its end; those of `best_fit`.
        """
        self.corpus, self.stride, self.width = corpus, stride, stride + 1
        if edges is None:
            cuts = np.flatnonzero(np.diff(corpus.document)) + 1 if apart else []
            edges = np.array([0, *cuts, len(corpus.tokens)])
        parts = list(itertools.pairwise(edges.tolist()))
        self._begin = np.concatenate([np.arange(low, max(low + 1, high - 1), stride, dtype=np.int64) for low, high in parts])
        part = np.searchsorted(edges, self._begin, side="right")
        self._end = end = np.minimum(self._begin + self.width, np.array(edges, np.int64)[part])
        self._components = _overlapping(corpus.component_first, corpus.component_last, self._begin, end)
        self._spans = _overlapping(corpus.span_first, corpus.span_last, self._begin, end)
        # all components of a span, so that what replaces its parts can be judged as a whole
        of_span = [np.searchsorted(corpus.component_span, self._spans[side]) for side in (0, 1)]
        some = self._spans[1] > self._spans[0]
        low, high = self._components
        low, high = np.where(some, np.minimum(low, of_span[0]), low), np.where(some, np.maximum(high, of_span[1]), high)
        self._components = low, high
        # static shapes: the most that any block holds, in steps of 8, and slot 0
        self.max_components = _round_up(1 + int((self._components[1] - self._components[0]).max(initial=0)))
        self.max_spans = _round_up(1 + int((self._spans[1] - self._spans[0]).max(initial=0)))

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        corpus, begin = self.corpus, self._begin[index]
        end = self._end[index]
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
            "component_value": fill(corpus.component_value[c0:c1], self.max_components),
            "component_sharers": fill(corpus.component_sharers[c0:c1], self.max_components),
            "span_rank": span["rank"],
            "span_count": span["count"],
            "span_type": span["type"],
            "span_identity": span["identity"],
            "span_id": span["id"],
            "span_end": fill(np.where(whole, span_last - begin, -1), self.max_spans),
            "epoch": np.zeros((), np.int32),
            "example": np.int32(index),
            "tag": fill(corpus.tag[begin:end], self.width, slot0=False),
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
        values = self.corpus.document[begin : self._end[index]]
        out[: len(values)] = values
        return out


def as_batch(rows: list[dict[str, np.ndarray]]) -> TaggedBatch:
    """Stack rows into a TaggedBatch of numpy arrays."""
    return TaggedBatch(**{name: np.stack([row[name] for row in rows]) for name in TaggedBatch._fields})


def all_rows(blocks: Blocks, multiple: int = 1) -> TaggedBatch:
    """Return every block as a TaggedBatch of numpy arrays, filled up as by `fill_up`."""
    return fill_up(as_batch([blocks[index] for index in range(len(blocks))]), multiple)


def fill_up(rows: TaggedBatch, multiple: int) -> TaggedBatch:
    """Return numpy rows with empty ones (segment 0) after them, up to a multiple of `multiple`."""
    missing = -len(rows.tokens) % multiple
    empty = TaggedBatch(*(np.zeros((missing, *x.shape[1:]), x.dtype) for x in rows))
    empty = empty._replace(component_begin=empty.component_begin - 1, span_end=empty.span_end - 1)
    return TaggedBatch(*(np.concatenate(pair) for pair in zip(rows, empty, strict=True)))


def _counts(span: dict[str, np.ndarray]) -> np.ndarray:
    """Return int64 [spans]: how many occurrences the identity of each span has in the corpus."""
    place = span["identity"] + 1  # a value that the corpus does not have is -1
    most = np.zeros(place.max() + 1, np.int64)
    np.maximum.at(most, place[1:], span["rank"][1:] + 1)
    return most[place]


def _sharers(value: np.ndarray, kind: np.ndarray, span_of: np.ndarray, span: dict[str, np.ndarray]) -> np.ndarray:
    """Return int64 [components]: how many identities have a component of this kind and value; 0 for that component of each
    span which the fewest have (the first of several), and for literal text."""
    group = np.unique(np.stack([kind, value]), axis=1, return_inverse=True)[1].reshape(-1)
    pairs = np.unique(np.stack([group, span["identity"][span_of]]), axis=1)
    count = np.where(kind > 0, np.bincount(pairs[0], minlength=group.max() + 1)[group], np.iinfo(np.int64).max)
    order = np.lexsort((np.arange(len(count)), count, span_of))
    rarest = order[np.unique(span_of[order], return_index=True)[1]]
    count[rarest] = 0
    return np.where(kind > 0, count, 0)


def shared_ids(span: dict[str, np.ndarray], document: np.ndarray) -> np.ndarray:
    """Return int64 [spans]: the id of the first span that has the same identity in the same document."""
    _, first, group = np.unique(np.stack([document, span["identity"]]), axis=1, return_index=True, return_inverse=True)
    return span["id"][first[group.reshape(-1)]]


def _document_ranks(identity: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Return int64 [spans]: how many earlier documents hold the same identity."""
    pairs, group = np.unique(np.stack([identity, document]), axis=1, return_inverse=True)
    begin = np.flatnonzero(np.diff(pairs[0], prepend=-2))  # -1 is an identity too
    rank = np.arange(pairs.shape[1]) - np.repeat(begin, np.diff(begin, append=pairs.shape[1]))
    return rank[group.reshape(-1)]


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
