"""Early-learning regularization: keep the model near what it said early, before it began to memorize."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def early_learning_penalty(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Return log(1 - <p, t>) for each token, float32 [...]; add lambda times its mean to the cross entropy.

    p = softmax(logits), t = softmax(target_logits), both [..., V] of any float dtype; t counts as constant. For logit c the
    gradient is g_c = p_c / (1 - <p, t>) sum_k (t_k - t_c) p_k: as training goes on p comes to agree with t, so that the term
    counters the cross entropy where the label contradicts the earlier prediction.

    Source: Liu et al. 2020, arXiv 2007.00151, equation 6 and lemma 1. There t is a running average of the predictions for
    each example; for tokens that would be an array [corpus tokens, V], so t comes from an average of the weights, which
    their ELR+ has too. There p and t are clipped to [1e-4, 1 - 1e-4] class by class; over a vocabulary of 50,000 that can
    make <p, t> more than 1, so here <p, t> itself is clipped to that range (outside it the gradient is 0).
    """
    p = jax.nn.softmax(logits.astype(jnp.float32))
    t = jax.lax.stop_gradient(jax.nn.softmax(target_logits.astype(jnp.float32)))
    return jnp.log1p(-jnp.clip(jnp.sum(p * t, axis=-1), 1e-4, 1 - 1e-4))


def average_weights(average, params, step: jax.Array, decay: float):
    """Return decay x average + (1 - decay) x params, leaf by leaf; the decay is at most (1 + step) / (10 + step).

    average, params: equal trees of arrays. step: updates before this one, int []. Without the bound the average over a
    short run would still be mostly its first weights.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1 - decay).astype(a.dtype) * (p - a), average, params)
