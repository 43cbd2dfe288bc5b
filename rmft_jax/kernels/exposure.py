"""Exposure: how far down a secret's rank among all the values it could have had has sunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def exposure_by_rank(perplexity: jax.Array, references: jax.Array) -> jax.Array:
    """Return log2 |R| - log2 rank in bits, float32 [...]; rank = 1 + number of references with a lower perplexity.

    perplexity: float [...], of the secret (or any increasing function of it, such as its log-perplexity).
    references: float [..., R], of values drawn at random from the same space, the same function. A value that the model
    knows nothing about has 1 / ln 2 = 1.44 bits on average.
    Source: Carlini et al. 2019, "The Secret Sharer", arXiv 1802.08232.
    """
    count = references.shape[-1]
    rank = 1 + jnp.sum(references < perplexity[..., None], axis=-1)
    return jnp.log2(count) - jnp.log2(rank)
