"""Early-learning regularization: keep the model near what it said early, before it began to memorize.

Source of all: Liu et al. 2020, arXiv 2007.00151.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_FLOOR = 1e-4  # of probabilities


def clipped_softmax(logits: jax.Array) -> jax.Array:
    """Return softmax(logits), each class clipped to [1e-4, 1 - 1e-4], float32 [..., C]. logits: any float [..., C]."""
    return jnp.clip(jax.nn.softmax(logits.astype(jnp.float32)), _FLOOR, 1 - _FLOOR)


def elr_update_target(target: jax.Array, probabilities: jax.Array, beta: jax.Array | float) -> jax.Array:
    """Return the new running average of an example's predictions, beta x target + (1 - beta) x probabilities.

    target, probabilities: float [..., C], of the step before and of this one; constant for the gradient. beta: the momentum.
    In each step the update comes before the loss. Source: section 4.2, equation 9.
    """
    return beta * target + (1 - beta) * jax.lax.stop_gradient(probabilities)


def elr_loss(logits: jax.Array, labels: jax.Array, target: jax.Array, weight: jax.Array | float) -> jax.Array:
    """Return cross entropy + weight x log(1 - <p, t>) for each example, float32 [...].

    logits: any float [..., C]. labels: float [..., C], one-hot, or mixed by mixup. target: float [..., C], t as
    `elr_update_target` has it. weight: lambda, at least 0. p is softmax(logits), clipped in the second term alone; where it
    is not, the gradient of logit c is p_c - y_c + weight x p_c / (1 - <p, t>) sum_k (t_k - t_c) p_k.
    Source: equation 6 and lemma 1.
    """
    agreement = jnp.sum(clipped_softmax(logits) * jax.lax.stop_gradient(target), axis=-1)
    return _cross_entropy(logits, labels) + weight * jnp.log1p(-jnp.minimum(agreement, 1 - _FLOOR))


def kl_loss(logits: jax.Array, labels: jax.Array, target: jax.Array, weight: jax.Array | float) -> jax.Array:
    """Return cross entropy - weight x sum_c t_c log p_c for each example, float32 [...]: the control that does not work.

    Arguments as for `elr_loss`. The divergence pulls hardest where p is far from t, so hardly at an example whose label is
    being memorized slowly; t follows. Source: the appendix on Kullback-Leibler regularization.
    """
    likely = jnp.log(clipped_softmax(logits))
    return _cross_entropy(logits, labels) - weight * jnp.sum(jax.lax.stop_gradient(target) * likely, axis=-1)


def mixup(share: jax.Array, partner: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return each array mixed with itself in another order: share x a + (1 - share) x a[partner].

    share: float [], in [0, 1]. partner: int [B]. arrays: float [B, ...] each. Source: Zhang et al. 2017, arXiv 1710.09412.
    """
    return tuple(share * a + (1 - share) * a[partner] for a in arrays)


def early_learning_penalty(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Return log(1 - <p, t>) for each token, float32 [...]; add lambda times its mean to the cross entropy.

    p = softmax(logits), t = softmax(target_logits), both [..., V] of any float dtype; t counts as constant. For logit c the
    gradient is g_c = p_c / (1 - <p, t>) sum_k (t_k - t_c) p_k: as training goes on p comes to agree with t, so that the term
    counters the cross entropy where the label contradicts the earlier prediction.

    Source: equation 6 and lemma 1. There t is a running average of the predictions for
    each example; for tokens that would be an array [corpus tokens, V], so t comes from an average of the weights, which
    their ELR+ has too. There p and t are clipped to [1e-4, 1 - 1e-4] class by class; over a vocabulary of 50,000 that can
    make <p, t> more than 1, so here <p, t> itself is clipped to that range (outside it the gradient is 0).
    """
    p = jax.nn.softmax(logits.astype(jnp.float32))
    t = jax.lax.stop_gradient(jax.nn.softmax(target_logits.astype(jnp.float32)))
    return jnp.log1p(-jnp.clip(jnp.sum(p * t, axis=-1), _FLOOR, 1 - _FLOOR))


class TopTargets(NamedTuple):
    """The largest classes of running averages of predictions. ids: int32 [..., K], all different; probabilities: float32
    [..., K]. All other classes count as 0."""

    ids: jax.Array
    probabilities: jax.Array


def top_targets(shape: tuple[int, ...]) -> TopTargets:
    """Return targets that nothing has been said of yet. shape: [..., K]."""
    return TopTargets(jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape), jnp.zeros(shape))


def update_top_targets(target: TopTargets, probabilities: jax.Array, beta: float) -> TopTargets:
    """Return the K largest classes of `elr_update_target`, among those of before and the K likeliest ones now.

    target: [..., K]; probabilities: float32 [..., V], V >= K; constant for the gradient. What falls out of the K classes is
    lost: with K = V nothing is, else the sum of a target, at most 1, says how much is left.
    """
    p, count = jax.lax.stop_gradient(probabilities), target.ids.shape[-1]
    kept = beta * target.probabilities + (1 - beta) * jnp.take_along_axis(p, target.ids, axis=-1)
    new, new_ids = jax.lax.top_k(p, count)
    known = jnp.any(new_ids[..., :, None] == target.ids[..., None, :], axis=-1)
    values = jnp.concatenate([kept, jnp.where(known, -1, (1 - beta) * new)], axis=-1)
    best, place = jax.lax.top_k(values, count)
    return TopTargets(jnp.take_along_axis(jnp.concatenate([target.ids, new_ids], axis=-1), place, axis=-1), best)


def top_penalty(probabilities: jax.Array, target: TopTargets) -> jax.Array:
    """Return log(1 - <p, t>) for each token, float32 [...]; <p, t> is clipped as in `early_learning_penalty`.

    probabilities: float32 [..., V]; target: [..., K], constant for the gradient.
    """
    of_target = jnp.take_along_axis(probabilities, target.ids, axis=-1)
    agreement = jnp.sum(of_target * jax.lax.stop_gradient(target.probabilities), axis=-1)
    return jnp.log1p(-jnp.clip(agreement, _FLOOR, 1 - _FLOOR))


def average_weights(average, params, step: jax.Array, decay: float):
    """Return decay x average + (1 - decay) x params, leaf by leaf; the decay is at most (1 + step) / (10 + step).

    average, params: equal trees of arrays. step: updates before this one, int []. Without the bound the average over a
    short run would still be mostly its first weights.
    """
    share = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + share.astype(a.dtype) * (p - a), average, params)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.sum(labels * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
