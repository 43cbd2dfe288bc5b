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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = 0,
    z_loss: float = 0.0,
    axis: str = "",
) -> tuple[jax.Array, CrossEntropy]:
    """Return sum_n weights[n] (nll[n] + z_loss log_z[n]^2), float32 [], and the CrossEntropy of each token.

    The logits are hidden @ output, nll[n] = log_z[n] - logits[n, targets[n]], log_z their logsumexp (Chowdhery et al. 2022,
    arXiv 2204.02311, section 5, take z_loss = 1e-4, which keeps log_z near 0). Only the sum has a gradient, and only in
    hidden and output.

    hidden: [N, E]; output: [E, V] of the same float dtype; targets: int [N]; weights: bool or float32 [N].
    chunk: tokens whose logits (float32) are in memory at a time, 0 = all. The gradient of each chunk is computed beside its
    loss, while its logits are there: three matrix products in all, as without chunks, none of them twice. That of `output`
    is summed in float32.
    axis: inside `shard_map`, the mesh axis over whose devices the columns of `output` are split in order, "" = whole. Of the
    sum each device then returns an equal share, of the gradient of `hidden` the part that its columns make: summed over the
    axis they are whole. What is sent for it are four numbers a token.
    """
    return _in_chunks(_loss, None, hidden, output, targets, weights, chunk, z_loss, axis)[0]


def _forward(hidden, output, targets, weights, chunk, z_loss, axis):
    start = jnp.zeros(output.shape, jnp.float32)
    given = hidden, output, targets, weights, chunk, z_loss, axis
    result, of_output, of_hidden = _in_chunks(_loss_and_gradient, start, *given)
    at_targets = weights[:, None] * hidden.astype(jnp.float32)
    column, here = _own(targets, output, axis)
    of_output = of_output.at[:, jnp.where(here, column, output.shape[1])].add(-at_targets.T, mode="drop")
    return result, (of_hidden, of_output.astype(output.dtype))


def _own(targets, output, axis):
    """Return the column of `output` that each target has, 0 if it is another device's, and bool [N], whether it is here."""
    if not axis:
        return targets, jnp.ones_like(targets, bool)
    column = targets - jax.lax.axis_index(axis) * output.shape[1]
    here = (column >= 0) & (column < output.shape[1])
    return jnp.where(here, column, 0), here


def _backward(_chunk, _z_loss, _axis, gradients, cotangents):
    return *((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients), None, None


cross_entropy.defvjp(_forward, _backward)


def _in_chunks(function, carried, hidden, output, targets, weights, chunk, z_loss, axis):
    """Apply `function` to `chunk` tokens at a time; return (loss, CrossEntropy), what is carried and what is stacked."""
    count = hidden.shape[0]
    size = min(chunk or count, count)
    pieces = -(-count // size)
    inputs = hidden, targets, weights.astype(jnp.float32)
    step = functools.partial(function, output=output, z_loss=z_loss, axis=axis)
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


def _loss(sums, inputs, *, output, z_loss, axis):
    hidden, targets, weights = inputs
    highest, _, sums_of_rows, scores = _score(hidden, output, targets, axis)
    log_z = highest + jnp.log(sums_of_rows)
    total = sums[0] + _share(jnp.sum(weights * (scores.nll + z_loss * log_z**2)), axis)
    return (total, sums[1]), (scores, None)


def _share(total, axis):
    return total / jax.lax.axis_size(axis) if axis else total


def _loss_and_gradient(sums, inputs, *, output, z_loss, axis):
    """With p = softmax(logits): d nll / d logits = p - onehot(target), d log_z / d logits = p.

    p is never divided out: its row sums go into the thin matrices that it is multiplied with, and the one-hot part, a row of
    `output` for each token, is added by itself. One pass over the logits less for each of the two.
    """
    hidden, targets, weights = inputs
    highest, exponentials, sums_of_rows, scores = _score(hidden, output, targets, axis)
    log_z = highest + jnp.log(sums_of_rows)
    total = sums[0] + _share(jnp.sum(weights * (scores.nll + z_loss * log_z**2)), axis)
    of_row = (weights * (1 + 2 * z_loss * log_z) / sums_of_rows)[:, None]
    exponentials = exponentials.astype(hidden.dtype)
    of_p = of_row * jnp.dot(exponentials, output.T, preferred_element_type=jnp.float32)
    column, here = _own(targets, output, axis)
    of_hidden = of_p - (weights * here)[:, None] * output.T[column].astype(jnp.float32)
    scaled = (of_row * hidden).astype(hidden.dtype)
    of_output = sums[1] + jnp.dot(scaled.T, exponentials, preferred_element_type=jnp.float32)
    return (total, of_output), (scores, of_hidden.astype(hidden.dtype))


def _score(hidden, output, targets, axis):
    """Return the highest logit [N], exp(logits - highest) [N, V], their sums [N], and CrossEntropy."""
    most, add = (functools.partial(f, axis_name=axis) if axis else lambda x: x for f in (jax.lax.pmax, jax.lax.psum))
    logits = jnp.dot(hidden, output, preferred_element_type=jnp.float32)
    highest = most(jnp.max(logits, axis=-1))
    exponentials = jnp.exp(logits - highest[:, None])
    sums = add(jnp.sum(exponentials, axis=-1))
    column, here = _own(targets, output, axis)
    target = add(jnp.where(here, jnp.take_along_axis(logits, column[:, None], axis=-1)[:, 0], 0))
    nll = jnp.log(sums) - (target - highest)
    # argmax(logits) == targets, by maxima: argmax itself takes a twentieth of a train step on CPU
    number = jnp.arange(logits.shape[-1]) + (jax.lax.axis_index(axis) * logits.shape[-1] if axis else 0)
    before = most(jnp.max(jnp.where(number < targets[:, None], logits, -jnp.inf), axis=-1))
    return highest, exponentials, sums, CrossEntropy(nll, (target >= highest) & (before < target))


def target_mask(segment_ids: jax.Array) -> jax.Array:
    """Return bool [B, N-1]: which next tokens are targets. The next token must belong to the same document.

    segment_ids: int32 [B, N], 0 = padding.
    """
    return (segment_ids[:, 1:] > 0) & (segment_ids[:, 1:] == segment_ids[:, :-1])
