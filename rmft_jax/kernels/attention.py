"""Attention and rotary positions, as plain array functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotate pairs of features by angles that grow with the position (Su et al. 2021, RoFormer, arXiv 2104.09864).

    x: [B, H, T, D] with D even; feature i pairs with i + D/2. positions: int32 [B, T]. Returns x's shape and dtype.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with the scores in float32.

    q: [B, H, T, D]; k, v: [B, H, S, D]; mask: bool [B, T, S], True = may attend. Returns [B, H, T, D] in q's dtype. A
    query that may attend to nothing gets a finite result, which the caller must not use.
    """
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, v)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """Return bool [B, T, T]: position t sees s <= t of its own document. segment_ids: int32 [B, T], 0 = padding."""
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return causal & same & (segment_ids > 0)[:, None, :]
