"""Attention and rotary positions, as plain array functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_angles(positions: jax.Array, features: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine of the angles that `rotary` turns by, float32 [B, 1, T, features / 2], for all layers at once.

    positions: int32 [B, T], B = 1 where all rows have the same ones.
    """
    half = features // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    # XLA on CPU would compute them again for every head of every layer that reads them; a quotient it computes once
    one = jax.lax.optimization_barrier(jnp.ones(()))
    return jnp.cos(angle) / one, jnp.sin(angle) / one


def rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs of features by angles that grow with the position (Su et al. 2021, RoFormer, arXiv 2104.09864).

    x: [B, H, T, D] with D even; feature i pairs with i + D/2. cos, sin: from `rotary_angles`. Returns x's shape and dtype.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float = 0.0) -> jax.Array:
    """Softmax attention with the scores in float32.

    q: [B, H, T, D]; k, v: [B, G, S, D], of which head h of q reads number h // (H / G), G = H as a rule (Ainslie et al.
    2023, arXiv 2305.13245); mask: bool [B, T, S], True = may attend; scale: what q k is multiplied by, 0 = D ** -0.5.
    Returns [B, H, T, D] in q's dtype. A query that may attend to nothing gets a finite result, which the caller must not
    use.
    """
    batch, heads, length, features = q.shape
    grouped = (batch, k.shape[1], -1)
    scores = jnp.einsum("bgtd,bgsd->bgts", q.reshape(*grouped, features), k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, length, -1) * (scale or features**-0.5)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bgts,bgsd->bgtd", weights.reshape(*grouped, k.shape[2]), v).reshape(q.shape)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float = 0.0, blocks: int = 4
) -> jax.Array:
    """`attention` of T queries and T keys under a causal mask, without most of what no query may see.

    The queries are cut into `blocks` of equal length, if T can be, and each is computed with the keys up to its end alone:
    of the pairs, (blocks + 1) / (2 blocks) are.
    """
    length = q.shape[2]
    if length % blocks:
        return attention(q, k, v, mask, scale)
    size = length // blocks
    ends = range(size, length + 1, size)
    parts = [attention(q[:, :, e - size : e], k[:, :, :e], v[:, :, :e], mask[:, e - size : e, :e], scale) for e in ends]
    return jnp.concatenate(parts, axis=2)


def causal_mask(segment_ids: jax.Array, window: int = 0) -> jax.Array:
    """Return bool [B, T, T]: position t sees s <= t of its own document.

    segment_ids: int32 [B, T], 0 = padding. window: how many positions t sees at most, itself included; 0 = all.
    """
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    if window:
        causal = jnp.triu(causal, 1 - window)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return causal & same & (segment_ids > 0)[:, None, :]


def document_mask(segment_ids: jax.Array) -> jax.Array:
    """Return bool [B, T, T]: each position sees all of its own document. segment_ids: int32 [B, T], 0 = padding."""
    return (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]


def document_positions(segment_ids: jax.Array) -> jax.Array:
    """Return the place of each token in its document, int32 [B, T], from 0. segment_ids: int32 [B, T]."""
    place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
