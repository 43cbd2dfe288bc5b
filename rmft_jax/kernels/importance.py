"""The likelihood of a latent-variable model by importance sampling, and the memorization score over folds.

Source: van den Burg & Williams 2021, arXiv 2106.03216.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logmeanexp(values: jax.Array, axis: int = 0, where: jax.Array | None = None) -> jax.Array:
    """Return log(mean(exp(values))) along an axis. values: float; where: bool of its shape, what counts, None = all.

    Where nothing counts it is NaN.
    """
    count = values.shape[axis] if where is None else jnp.sum(where, axis=axis)
    return jax.nn.logsumexp(values, axis=axis, where=where) - jnp.log(jnp.float32(count))


def importance_weighted_log_likelihood(log_joint: jax.Array, log_proposal: jax.Array) -> jax.Array:
    """Return the estimate of log p(x) from S samples z of q(z|x), float [...].

    log_joint: float [S, ...], log p(x, z); log_proposal: float [S, ...], log q(z|x). In expectation it is a lower bound,
    which S closes. Source: section 3.2, equation 5; Burda et al. 2015, arXiv 1509.00519.
    """
    return logmeanexp(log_joint - log_proposal, axis=0)


def m_score(log_likelihood: jax.Array, trained_on: jax.Array) -> jax.Array:
    """Return the memorization score M = U - V of each point, float [N], in nats.

    log_likelihood: float [R, N], log p(x_i) of each of R runs; trained_on: bool [R, N], whether run r trained on point i,
    each point in some runs and not in others. U is the logmeanexp over the runs that did, V over those that did not.
    Source: section 3.1, equation 3, where R = K L runs are L repetitions of K folds.
    """
    seen = logmeanexp(log_likelihood, axis=0, where=trained_on)
    return seen - logmeanexp(log_likelihood, axis=0, where=~trained_on)
