"""The linear model of Theorem 1 of early-learning regularization: two clouds of points, part of their labels wrong.

Source: Liu et al. 2020, arXiv 2007.00151, section 3 and theorem 1. The gradient is the exact one of the loss
log(1 + exp(-2 e <theta, x>)), e = +-1, which is cross entropy at logits (<theta, x>, -<theta, x>).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rmft_jax.kernels import clipped_softmax, elr_loss, elr_update_target
from rmft_jax.study_config import LinearNoiseConfig


def noisy_clouds(config: LinearNoiseConfig, key: jax.Array) -> dict:
    """Draw the data and the start: x [n, p], true and given labels [n] (+-1), v [p] (unit), theta [p] (length 2, at right
    angles to v).

    The theorem starts from anywhere on the sphere of radius 2, where <theta, v> is near 0 if p is large. At a p such as
    1,000 it can begin above 1/10, beyond the early stage; so v is projected out.
    """
    keys = jax.random.split(key, 6)
    shape = (config.points, config.features)
    direction = jax.random.normal(keys[0], shape[1:])
    v = direction / jnp.linalg.norm(direction)
    true = jnp.where(jax.random.bernoulli(keys[1], shape=shape[:1]), 1.0, -1.0)
    x = true[:, None] * v + config.deviation * jax.random.normal(keys[2], shape)
    drawn = jnp.where(jax.random.bernoulli(keys[3], shape=shape[:1]), 1.0, -1.0)
    given = jnp.where(jax.random.bernoulli(keys[4], config.share, shape[:1]), drawn, true)
    start = jax.random.normal(keys[5], shape[1:])
    start = start - jnp.dot(start, v) * v
    return {"x": x, "true": true, "given": given, "v": v, "theta": 2 * start / jnp.linalg.norm(start)}


@functools.partial(jax.jit, static_argnums=0)
def descend(config: LinearNoiseConfig, data: dict, weight: jax.Array) -> dict:
    """Train by gradient descent; weight: of early-learning regularization, float32 [], 0 = cross entropy alone.

    Returns of each step, before its update, float32 [steps]: along (<theta, v>), correlation (of -gradient and v),
    residual_clean and residual_wrong (mean squared tanh<theta, x> - e over points with a right and a wrong label),
    wrong_true and wrong_given (shares of the wrongly labelled points that are classified truly, and as labelled).
    """
    x, true, given = data["x"], data["true"], data["given"]
    labels = jnp.stack([given > 0, given < 0], axis=-1).astype(jnp.float32)
    wrong = given != true
    mean = lambda values, of: jnp.sum(values * of) / jnp.maximum(jnp.sum(of), 1)  # noqa: E731

    def loss(theta, target):
        score = x @ theta
        logits = jnp.stack([score, -score], axis=-1)
        target = elr_update_target(target, clipped_softmax(logits), config.beta)
        return jnp.mean(elr_loss(logits, labels, target, weight)), (target, score)

    def step(state, _):
        theta, target = state
        gradient, (target, score) = jax.grad(loss, has_aux=True)(theta, target)
        residual = (jnp.tanh(score) - given) ** 2
        seen = {
            "along": theta @ data["v"],
            "correlation": -(gradient @ data["v"]) / jnp.linalg.norm(gradient),
            "residual_clean": mean(residual, ~wrong),
            "residual_wrong": mean(residual, wrong),
            "wrong_true": mean(score * true > 0, wrong),
            "wrong_given": mean(score * given > 0, wrong),
        }
        return (theta - config.learning_rate * gradient, target), seen

    start = data["theta"], jnp.zeros_like(labels)
    return jax.lax.scan(step, start, None, length=config.steps)[1]
