"""Randomized masking of PII on the device: which spans are replaced, what stays, what comes instead.

Source: randomized masked fine-tuning (RMFT), Joshi & Smith, arXiv 2512.03310. There the corpus is rewritten once, before
training; here surrogates are drawn in the compiled step, afresh for each epoch, and the corpus stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmft_jax.kernels.splice import SurrogateBank, splice

TEXT, PII, SURROGATE = 0, 1, 2


class TaggedBatch(NamedTuple):
    """Rows of packed documents with their PII spans, as `prepare` tagged them. All int32.

    Slot 0 of the component and span arrays means "none". Spans consist of components (the words, separators, ... of an
    address); every token of a span belongs to one component.

    tokens, segment_ids, component: [B, W]; segment 0 = padding, documents count from 1 in each row.
    component_begin: [B, C], the row position of a component's first token; -1 = before this row.
    component_kind, component_span, component_index: [B, C]; the index counts within the span.
    span_rank: [B, S], 0 = the first occurrence of this value in the corpus.
    span_type, span_identity, span_id: [B, S]; equal values share an identity, each occurrence has an id of its own.
    span_end: [B, S], the row position of the last token; -1 when the span does not lie in this row as a whole.
    epoch: [B], how often the row has been visited before.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    component: jax.Array
    component_begin: jax.Array
    component_kind: jax.Array
    component_span: jax.Array
    component_index: jax.Array
    span_rank: jax.Array
    span_type: jax.Array
    span_identity: jax.Array
    span_id: jax.Array
    span_end: jax.Array
    epoch: jax.Array


class MaskedBatch(NamedTuple):
    """What the model is shown.

    tokens, segment_ids: int32 [B, N]; origin: int32 [B, N], TEXT, PII (true, or what a replaced span kept) or SURROGATE.
    source: int32 [B, N], the position in the tagged row that each token stands for; W = padding.
    shown: bool [B, S], True where a true PII value stands in the row as a whole.
    cut: int32 [B], tokens that surrogates pushed out of the row.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    origin: jax.Array
    source: jax.Array
    shown: jax.Array
    cut: jax.Array


# A policy says which spans are replaced, from their rank. It is one line over the same splice.
POLICIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda rank: jnp.zeros_like(rank, bool),
    "keep_first": lambda rank: rank > 0,
}


def uniform_below(bits: jax.Array, n: jax.Array) -> jax.Array:
    """Map uniform uint32 bits to integers below n (n < 65,536) as floor(bits n / 2^32), without 64-bit arithmetic."""
    n = n.astype(jnp.uint32)
    high, low = bits >> 16, bits & 0xFFFF
    return ((high * n + ((low * n) >> 16)) >> 16).astype(jnp.int32)


def draw_surrogates(key, row, bank: SurrogateBank) -> tuple[jax.Array, jax.Array]:
    """Draw the anchor of each span and the bank row of each component in one row of a TaggedBatch.

    A draw depends on the key, the epoch and the span's id alone, so neither the mesh, nor the hosts, nor the batch, nor
    the place where a block was cut changes it: both halves of a span cut by a border get the same surrogate.

    Returns: anchor int32 [S], uniform over the anchor classes of the span's type; row int32 [C], uniform over the bank.
    """
    bank = SurrogateBank(*map(jnp.asarray, bank))
    key = jax.random.fold_in(key, row.epoch)
    span_keys = jax.vmap(lambda id: jax.random.fold_in(key, id))(row.span_id)
    anchor_bits = jax.vmap(lambda k: jax.random.bits(k, dtype=jnp.uint32))(span_keys)
    anchor = uniform_below(anchor_bits, bank.anchors[row.span_type])
    entry_bits = jax.vmap(lambda k, i: jax.random.bits(jax.random.fold_in(k, i), dtype=jnp.uint32))(
        span_keys[row.component_span], row.component_index
    )
    return anchor, uniform_below(entry_bits, bank.counts[row.component_kind])


def replaced_components(row, replaced_spans, anchor, bank: SurrogateBank) -> jax.Array:
    """Return bool [C]: components of replaced spans, but for literal text and the anchor."""
    kind, span = row.component_kind, row.component_span
    is_anchor = (bank.anchors[row.span_type[span]] > 0) & (bank.anchor_class[kind] == anchor[span])
    return replaced_spans[span] & (kind > 0) & ~is_anchor & (span > 0)


def mask_batch(batch: TaggedBatch, bank: SurrogateBank, key, *, policy: str, length: int) -> MaskedBatch:
    """Replace PII in a batch of tagged rows; runs under `jit`, on any sharding of the batch.

    Args:
      batch: the rows as tagged, W tokens wide.
      bank: the surrogates.
      key: a `jax.random.key`, the same for the whole run.
      policy: a name in POLICIES.
      length: N, the width of the result.

    Raises: KeyError for an unknown policy.
    """
    replaces = POLICIES[policy]
    bank = SurrogateBank(*map(jnp.asarray, bank))
    if policy == "none":
        return _unmasked(batch, length)

    def one(row: TaggedBatch) -> MaskedBatch:
        valid = row.segment_ids > 0
        anchor, entry = draw_surrogates(key, row, bank)
        replaced_spans = replaces(row.span_rank)
        replaced = replaced_components(row, replaced_spans, anchor, bank)
        spliced = splice(
            row.tokens, valid, row.component, row.component_begin, row.component_kind, replaced, entry, bank,
            length=length,
        )  # fmt: skip
        at = jnp.minimum(spliced.source, row.tokens.shape[0] - 1)
        inside = spliced.source < row.tokens.shape[0]
        component = row.component[at]
        origin = jnp.where(replaced[component], SURROGATE, jnp.where(component > 0, PII, TEXT))
        shown = ~replaced_spans & (row.span_end >= 0) & (spliced.ends[row.span_end] <= length)
        return MaskedBatch(
            tokens=spliced.tokens,
            segment_ids=jnp.where(inside, row.segment_ids[at], 0),
            origin=jnp.where(inside, origin, TEXT),
            source=spliced.source,
            shown=shown,
            cut=jnp.maximum(spliced.ends[-1] - length, 0),
        )

    return jax.vmap(one)(batch)


def _unmasked(batch: TaggedBatch, length: int) -> MaskedBatch:
    """Return the rows as they are, padded or cut to `length`: what any policy gives when it replaces nothing."""
    width = batch.tokens.shape[1]
    valid = batch.segment_ids > 0

    def fit(array, missing=0):
        array = jnp.where(valid, array, missing)
        return jnp.pad(array, ((0, 0), (0, max(0, length - width))), constant_values=missing)[:, :length]

    return MaskedBatch(
        tokens=fit(batch.tokens),
        segment_ids=fit(batch.segment_ids),
        origin=fit(jnp.where(batch.component > 0, PII, TEXT)),
        source=fit(jnp.arange(width, dtype=jnp.int32), width),
        shown=(batch.span_end >= 0) & (batch.span_end < length),
        cut=jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.int32) - length, 0),
    )
