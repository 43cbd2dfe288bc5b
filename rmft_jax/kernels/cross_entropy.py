"""The language-modelling loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log p(target) in nats, float32 [...]. logits: [..., V] of any float dtype; targets: int [...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def target_mask(segment_ids: jax.Array) -> jax.Array:
    """Return bool [B, N-1]: which next tokens are targets. The next token must belong to the same document.

    segment_ids: int32 [B, N], 0 = padding.
    """
    return (segment_ids[:, 1:] > 0) & (segment_ids[:, 1:] == segment_ids[:, :-1])
