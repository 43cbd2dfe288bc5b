"""Replace components of a token row by table entries of other lengths, with static shapes and no host loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class SurrogateBank(NamedTuple):
    """Pre-tokenised replacements for each kind of component; kind 0 is literal text, which is never replaced.

    tokens: int32 [T], those of all entries one after another.
    begins, lengths: int32 [entries], where each entry's tokens are. values: int32 [entries], a hash of each one's text.
    first, counts: int32 [kinds], which entries belong to each kind; its rows are counted from 0.
    anchor_class: int32 [kinds], which anchor of its PII type a kind belongs to; -1 for literal text.
    anchors: int32 [types], number of anchor classes of each PII type; 0 = every component is replaced.
    placeholder: int32 [types], the kind whose one row stands for a whole value. empty: int32 [], the kind of one empty row.
    recombined: int32 [kinds], the kind that holds the corpus' own components of a kind; the kind itself where there is none.
    look_alike: the same, without the components that one value alone has, and with strings like them.
    real: uint32 [values of the corpus], sorted, their `span_values`.
    """

    tokens: jax.Array
    begins: jax.Array
    lengths: jax.Array
    values: jax.Array
    first: jax.Array
    counts: jax.Array
    anchor_class: jax.Array
    anchors: jax.Array
    placeholder: jax.Array
    empty: jax.Array
    recombined: jax.Array
    look_alike: jax.Array
    real: jax.Array

    def entry(self, kind: int, row: int) -> np.ndarray:
        """Return the tokens of one row of a kind, int32 [pieces], on the host."""
        number = int(self.first[kind]) + int(row)
        begin = int(self.begins[number])
        return np.asarray(self.tokens)[begin : begin + int(self.lengths[number])]


class Spliced(NamedTuple):
    """One spliced row.

    tokens: int32 [length], 0 where there is no text left.
    source: int32 [length], position in the input row that each token comes from; W (the row's width) = padding.
    ends: int32 [W], number of output tokens up to and including each input position.
    """

    tokens: jax.Array
    source: jax.Array
    ends: jax.Array


def splice(tokens, valid, component, begin, kind, replaced, row, bank: SurrogateBank, *, length: int) -> Spliced:
    """Splice bank rows into one token row; `jax.vmap` it over a batch.

    Args:
      tokens: int32 [W], the row.
      valid: bool [W], False on padding.
      component: int32 [W], the component of each token, 0 = plain text.
      begin: int32 [C], position of each component's first token; -1 when that lies before this row. Such a component
        was spelled out by the row before, so what is left of it here takes no room when it is replaced.
      kind: int32 [C], bank kind of each component.
      replaced: bool [C], False for component 0.
      row: int32 [C], the row drawn for each component, below the count of its kind.
      bank: the replacements.
      length: output width; what does not fit is cut off, what is missing is padding.

    Returns: the spliced row. Its tokens are those of `splice_reference`, which says the same with lists.
    """
    width_in = tokens.shape[0]
    position = jnp.arange(width_in, dtype=jnp.int32)
    entry = bank.first[kind] + row
    entry_begin, entry_length = bank.begins[entry], bank.lengths[entry]
    is_replaced = replaced[component] & valid
    is_begin = position == begin[component]
    width = jnp.where(is_replaced, jnp.where(is_begin, entry_length[component], 0), valid.astype(jnp.int32))
    ends = jnp.cumsum(width, dtype=jnp.int32)

    out = jnp.arange(length, dtype=jnp.int32)
    source = jnp.searchsorted(ends, out, side="right", method="compare_all").astype(jnp.int32)
    at = jnp.minimum(source, width_in - 1)
    place = entry_begin[component[at]] + out - (ends[at] - width[at])
    spliced = jnp.where(is_replaced[at], bank.tokens.at[place].get(mode="clip"), tokens[at])
    return Spliced(jnp.where(source < width_in, spliced, 0), source, ends)


def splice_reference(tokens, valid, component, begin, kind, replaced, row, bank: SurrogateBank, *, length: int):
    """Say what `splice` computes in plain Python: a list of at most `length` tokens."""
    out: list[int] = []
    for position, token in enumerate(np.asarray(tokens).tolist()):
        if not valid[position]:
            continue
        c = int(component[position])
        if not replaced[c]:
            out.append(token)
        elif position == begin[c]:
            out.extend(bank.entry(kind[c], row[c]).tolist())
    return out[:length]
