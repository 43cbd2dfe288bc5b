"""Scores of membership attacks: a number for each text, higher = more likely a member of the training set.

Notation: lp_t = log p(x_t | x_<t) in nats over the valid tokens of a text, L of them; NLL = -mean_t lp_t.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def loss_score(log_probs: jax.Array, valid: jax.Array) -> jax.Array:
    """Return -NLL, float32 [...]. log_probs: float [..., L]; valid: bool [..., L].

    Source: Yeom et al. 2018, arXiv 1709.01604.
    """
    return jnp.sum(jnp.where(valid, log_probs, 0), axis=-1) / jnp.maximum(jnp.sum(valid, axis=-1), 1)


def reference_score(log_probs: jax.Array, reference_log_probs: jax.Array, valid: jax.Array) -> jax.Array:
    """Return NLL_ref - NLL, float32 [...]: how much better the model does than one that has not seen the text.

    log_probs, reference_log_probs: float [..., L], the same tokens under both models. Source: Carlini et al. 2021,
    arXiv 2012.07805 (section 5.1).
    """
    return loss_score(log_probs, valid) - loss_score(reference_log_probs, valid)


def zlib_score(log_probs: jax.Array, valid: jax.Array, compressed_bytes: jax.Array) -> jax.Array:
    """Return -NLL / compressed_bytes, float32 [...]. compressed_bytes: [...], length of zlib.compress(text as UTF-8).

    Source: Carlini et al. 2021, arXiv 2012.07805 (section 5.1).
    """
    return loss_score(log_probs, valid) / compressed_bytes


def min_k_score(log_probs: jax.Array, valid: jax.Array, k: float) -> jax.Array:
    """Return the mean of the max(1, floor(k L)) lowest lp_t, float32 [...]. k: a share in (0, 1].

    log_probs: float [..., L]; valid: bool [..., L]. Source: Shi et al. 2023, arXiv 2310.16789 (Min-K% Prob).
    """
    # the small number keeps a product such as 0.29 x 100 from falling under 29
    count = jnp.maximum(1, jnp.floor(k * jnp.sum(valid, axis=-1) + 1e-4))
    lowest = jnp.sort(jnp.where(valid, log_probs, jnp.inf), axis=-1)
    counted = jnp.arange(log_probs.shape[-1]) < count[..., None]
    return jnp.sum(jnp.where(counted, lowest, 0), axis=-1) / count


def min_k_plus_plus_score(
    log_probs: jax.Array, mean: jax.Array, deviation: jax.Array, valid: jax.Array, k: float
) -> jax.Array:
    """Return `min_k_score` of z_t = (lp_t - mean_t) / deviation_t, float32 [...]; all four: [..., L].

    mean, deviation: of log p(v | x_<t) over v drawn from p(. | x_<t), see `vocabulary_statistics`.
    Source: Zhang et al. 2024, arXiv 2404.02936 (Min-K%++).
    """
    return min_k_score((log_probs - mean) / jnp.maximum(deviation, 1e-6), valid, k)


def vocabulary_statistics(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean and standard deviation of log p(v) over v drawn from p = softmax(logits): float32 [...] each.

    logits: [..., V] of any float dtype.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    mean = jnp.sum(p * log_p, axis=-1)
    return mean, jnp.sqrt(jnp.sum(p * (log_p - mean[..., None]) ** 2, axis=-1))
