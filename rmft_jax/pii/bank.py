"""The surrogate bank: replacement strings, tokenised once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rmft_jax.errors import UserError
from rmft_jax.kernels import SurrogateBank, span_values
from rmft_jax.pii.types import KINDS, TYPES, anchor_tables, component_value

MAX_PIECES = 4  # tokens of an invented surrogate at most, which keeps it from crowding text out of its block
_MAX_REAL_PIECES = 8  # names are cut into more tokens than words


def build_bank(
    encode: Callable[[list[str]], list[list[int]]],
    values: Iterable[Sequence[tuple[str, int]]],
    *,
    rows: int,
    seed: int,
) -> SurrogateBank:
    """Tokenise the surrogates of every kind.

    Three sorts of tables. Invented: the stock of a kind without the components that the corpus has, so that no combination
    of surrogates and an anchor is a real value, except where a kind's whole stock is real (the common TLDs). Recombined:
    those components themselves, each once for every value that has it, so that surrogates have the corpus' own distribution.
    Placeholders: one row a type, and an empty one.

    Args:
      encode: strings -> token ids, each string as it is encoded in the middle of a line.
      values: the components of each PII value of the corpus in order, (text in lower case, kind), literal text as kind 0.
      rows: surrogates of each kind at most; seed: which ones.

    Returns: a SurrogateBank of numpy arrays.
    """
    values = [list(parts) for parts in values]
    real: dict[int, list[str]] = {}
    for parts in values:
        for text, kind in parts:
            real.setdefault(kind, []).append(text)
    tables = [_Table([""], [[0]])]
    anchor_class, anchors = anchor_tables()
    for type in TYPES:
        for kind in type.kinds:
            stock = type.surrogates(kind)
            like = [k for k in map(KINDS.index, type.kinds) if anchor_class[k] == anchor_class[KINDS.index(kind)]]
            fresh = sorted(set(stock).difference(*(real.get(k, ()) for k in like)))
            table = _table(fresh if len(fresh) >= min(1000, len(stock)) else stock, encode, MAX_PIECES, rows, seed)
            if not table.entries:
                raise UserError(
                    f"no surrogate of kind {kind} has {MAX_PIECES} tokens or fewer: raise tokenizer.vocab_size"
                )
            tables.append(table)
    recombined = list(range(len(tables)))
    for type in TYPES:
        for kind in map(KINDS.index, type.recombines):
            table = _table(sorted(real.get(kind, ())), encode, _MAX_REAL_PIECES, rows, seed)
            if table.entries:
                recombined[kind] = len(tables)
                tables.append(table)
    placeholder = len(tables) + np.arange(len(TYPES), dtype=np.int32)
    tables += [_Table([type.placeholder], encode([type.placeholder])) for type in TYPES]
    tables.append(_Table([""], [[]]))
    return _stack(tables)._replace(
        anchor_class=np.pad(anchor_class, (0, len(tables) - len(anchor_class)), constant_values=-1),
        anchors=anchors,
        placeholder=placeholder,
        empty=np.int32(len(tables) - 1),
        recombined=np.array([*recombined, *range(len(recombined), len(tables))], np.int32),
        real=_real(values),
    )


class _Table:
    """The rows of one kind: their texts and token ids."""

    def __init__(self, texts: Sequence[str], entries: Sequence[Sequence[int]]):
        self.texts, self.entries = texts, entries


def _table(stock: Iterable[str], encode: Callable, pieces: int, rows: int, seed: int) -> _Table:
    stock = list(stock)
    random.Random(seed).shuffle(stock)
    pairs = [(text, ids) for text, ids in zip(stock, encode(stock), strict=True) if len(ids) <= pieces][:rows]
    return _Table([text for text, _ in pairs], [ids for _, ids in pairs])


def _stack(tables: Sequence[_Table]) -> SurrogateBank:
    shape = len(tables), max(len(table.entries) for table in tables)
    width = max(len(ids) for table in tables for ids in table.entries)
    tokens, lengths, values = np.zeros((*shape, width), np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for kind, table in enumerate(tables):
        for row, (text, ids) in enumerate(zip(table.texts, table.entries, strict=True)):
            tokens[kind, row, : len(ids)] = ids
            lengths[kind, row] = len(ids)
            values[kind, row] = component_value(text)
    lengths[0] = 0
    counts = np.array([0] + [len(table.entries) for table in tables[1:]], np.int32)
    none = np.zeros(0, np.int32)
    return SurrogateBank(tokens, lengths, counts, none, none, none, none, none, values, none)


def _real(values: list[list[tuple[str, int]]]) -> np.ndarray:
    """Return the `span_values` of all values of the corpus, uint32 [R], sorted; at least one number."""
    if not values:
        return np.zeros(1, np.uint32)
    lengths = [len(parts) for parts in values]
    value = np.array([component_value(text) for parts in values for text, _ in parts], np.int32)
    index = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    span = np.repeat(np.arange(len(values)), lengths).astype(np.int32)
    return np.unique(np.asarray(span_values(value, index, span, spans=len(values))))
