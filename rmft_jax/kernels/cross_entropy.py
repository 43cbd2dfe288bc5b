"""The language-modelling loss, from logits or, without ever holding all of them, from features."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class CrossEntropy(NamedTuple):
    """What `cross_entropy` says of each token: nll, -log p(target) in nats; hit, whether the target is the likeliest token.

    nll: float32 [N]; hit: bool [N], of equally likely tokens the first counts.
    """

    nll: jax.Array
    hit: jax.Array


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log p(target) in nats, float32 [...]. logits: [..., V] of any float dtype; targets: int [...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: jax.Array, output: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = 0, z_loss: float = 0.0
) -> tuple[jax.Array, CrossEntropy]:
    """Return sum_n weights[n] (nll[n] + z_loss log_z[n]^2), float32 [], and the CrossEntropy of each token.

    The logits are hidden @ output, nll[n] = log_z[n] - logits[n, targets[n]], log_z their logsumexp (Chowdhery et al. 2022,
    arXiv 2204.02311, section 5, take z_loss = 1e-4, which keeps log_z near 0). Only the sum has a gradient, and only in
    hidden and output.

    hidden: [N, E]; output: [E, V] of the same float dtype; targets: int [N]; weights: bool or float32 [N].
    chunk: tokens whose logits (float32) are in memory at a time, 0 = all. The gradient of each chunk is computed beside its
    loss, while its logits are there: three matrix products in all, as without chunks, none of them twice. That of `output`
    is summed in float32.
    """
    return _in_chunks(_loss, None, hidden, output, targets, weights, chunk, z_loss)[0]


def _forward(hidden, output, targets, weights, chunk, z_loss):
    start = jnp.zeros(output.shape, jnp.float32)
    result, of_output, of_hidden = _in_chunks(_loss_and_gradient, start, hidden, output, targets, weights, chunk, z_loss)
    at_targets = weights[:, None] * hidden.astype(jnp.float32)
    of_output = of_output.at[:, targets].add(-at_targets.T)
    return result, (of_hidden, of_output.astype(output.dtype))


def _backward(_chunk, _z_loss, gradients, cotangents):
    return *((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients), None, None


cross_entropy.defvjp(_forward, _backward)


def _in_chunks(function, carried, hidden, output, targets, weights, chunk, z_loss):
    """Apply `function` to `chunk` tokens at a time; return (loss, CrossEntropy), what is carried and what is stacked."""
    count = hidden.shape[0]
    size = min(chunk or count, count)
    pieces = -(-count // size)
    inputs = hidden, targets, weights.astype(jnp.float32)
    step = functools.partial(function, output=output, z_loss=z_loss)
    if pieces == 1:
        (total, carried), (scores, stacked) = step((jnp.zeros((), jnp.float32), carried), inputs)
        return (total, scores), carried, stacked
    padding = pieces * size - count  # of weight 0
    inputs = jax.tree.map(
        lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(pieces, size, *x.shape[1:]), inputs
    )
    (total, carried), stacked = jax.lax.scan(step, (jnp.zeros((), jnp.float32), carried), inputs)
    scores, stacked = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], stacked)
    return (total, scores), carried, stacked


def _loss(sums, inputs, *, output, z_loss):
    hidden, targets, weights = inputs
    highest, _, sums_of_rows, scores = _score(hidden, output, targets)
    log_z = highest + jnp.log(sums_of_rows)
    total = sums[0] + jnp.sum(weights * (scores.nll + z_loss * log_z**2))
    return (total, sums[1]), (scores, None)


def _loss_and_gradient(sums, inputs, *, output, z_loss):
    """With p = softmax(logits): d nll / d logits = p - onehot(target), d log_z / d logits = p.

    p is never divided out: its row sums go into the thin matrices that it is multiplied with, and the one-hot part, a row of
    `output` for each token, is added by itself. One pass over the logits less for each of the two.
    """
    hidden, targets, weights = inputs
    highest, exponentials, sums_of_rows, scores = _score(hidden, output, targets)
    log_z = highest + jnp.log(sums_of_rows)
    total = sums[0] + jnp.sum(weights * (scores.nll + z_loss * log_z**2))
    of_row = (weights * (1 + 2 * z_loss * log_z) / sums_of_rows)[:, None]
    exponentials = exponentials.astype(hidden.dtype)
    of_p = of_row * jnp.dot(exponentials, output.T, preferred_element_type=jnp.float32)
    of_hidden = of_p - weights[:, None] * output.T[targets].astype(jnp.float32)
    scaled = (of_row * hidden).astype(hidden.dtype)
    of_output = sums[1] + jnp.dot(scaled.T, exponentials, preferred_element_type=jnp.float32)
    return (total, of_output), (scores, of_hidden.astype(hidden.dtype))


def _score(hidden, output, targets):
    """Return the highest logit [N], exp(logits - highest) [N, V], their sums [N], and CrossEntropy."""
    logits = jnp.dot(hidden, output, preferred_element_type=jnp.float32)
    highest = jnp.max(logits, axis=-1)
    exponentials = jnp.exp(logits - highest[:, None])
    sums = jnp.sum(exponentials, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    nll = jnp.log(sums) - (target - highest)
    # argmax(logits) == targets, by maxima: argmax itself takes a twentieth of a train step on CPU
    before = jnp.max(jnp.where(jnp.arange(logits.shape[-1]) < targets[:, None], logits, -jnp.inf), axis=-1)
    return highest, exponentials, sums, CrossEntropy(nll, (target >= highest) & (before < target))


def target_mask(segment_ids: jax.Array) -> jax.Array:
    """Return bool [B, N-1]: which next tokens are targets. The next token must belong to the same document.

    segment_ids: int32 [B, N], 0 = padding.
    """
    return (segment_ids[:, 1:] > 0) & (segment_ids[:, 1:] == segment_ids[:, :-1])
