"""The surrogate bank: replacement strings, tokenised once."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping

import numpy as np

from rmft_jax.errors import UserError
from rmft_jax.kernels import SurrogateBank
from rmft_jax.pii.types import KINDS, TYPES, anchor_tables

MAX_PIECES = 4


def build_bank(
    encode: Callable[[list[str]], list[list[int]]], real: Mapping[int, Collection[str]], *, rows: int, seed: int
) -> SurrogateBank:
    """Tokenise the surrogates of every kind.

    Args:
      encode: strings -> token ids, each string as it is encoded in the middle of a line.
      real: kind number -> lower-cased components that occur in the corpus. They are left out, so that no combination of
        surrogates and an anchor is a real value, except where a kind's whole stock is real (the common TLDs).
      rows: surrogates of each kind at most; seed: which ones.

    Returns: a SurrogateBank of numpy arrays, at most MAX_PIECES pieces a row (longer ones are left out, which also keeps
    a surrogate from crowding text out of its block).
    """
    tables: list[list[list[int]]] = [[[0]]]
    for type in TYPES:
        for kind in type.kinds:
            stock = type.surrogates(kind)
            fresh = [word for word in stock if word not in real.get(KINDS.index(kind), ())]
            stock = fresh if len(fresh) >= min(1000, len(stock)) else stock
            random.Random(seed).shuffle(stock)
            entries = [ids for ids in encode(stock) if len(ids) <= MAX_PIECES][:rows]
            if not entries:
                raise UserError(
                    f"no surrogate of kind {kind} has {MAX_PIECES} tokens or fewer: raise tokenizer.vocab_size"
                )
            tables.append(entries)
    most = max(len(entries) for entries in tables)
    tokens = np.zeros((len(tables), most, MAX_PIECES), np.int32)
    lengths = np.zeros((len(tables), most), np.int32)
    for kind_number, entries in enumerate(tables):
        for row, ids in enumerate(entries):
            tokens[kind_number, row, : len(ids)] = ids
            lengths[kind_number, row] = len(ids)
    counts = np.array([0] + [len(entries) for entries in tables[1:]], np.int32)
    return SurrogateBank(tokens, lengths, counts, *anchor_tables())
