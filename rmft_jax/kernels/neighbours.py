"""k-nearest neighbours on the device: exact, in blocks, with some keys left out for each query.

Distances by metric, smaller = nearer: sqeuclidean |q - x|^2; cosine 1 - cos(q, x); inner_product -<q, x>.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

METRICS = ("sqeuclidean", "cosine", "inner_product")

_GROUP = 32  # scores of which the least is taken before any are sorted
SPARE = 8  # candidates beyond k that are measured again: rounding must not decide who is among the k


class Neighbours(NamedTuple):
    """The k nearest keys of each query, nearest first, of equal ones the first.

    distances: float32 [Q, k]; indices: int32 [Q, k]. Where fewer than k keys could be had: inf and -1.
    """

    distances: jax.Array
    indices: jax.Array


@functools.partial(jax.jit, static_argnames=("k", "metric", "query_block", "key_block"))
def nearest_neighbours(
    queries: jax.Array,
    keys: jax.Array,
    k: int,
    *,
    metric: str = "sqeuclidean",
    exclude: jax.Array | None = None,
    valid: jax.Array | None = None,
    query_block: int = 256,
    key_block: int = 8192,
) -> Neighbours:
    """Find the k keys nearest to each query, all pairs compared.

    queries: float [Q, D]. keys: float [N, D].
    metric: a name in METRICS.
    exclude: int [Q] or [Q, E], indices of keys that a query must not find, -1 = none. `jnp.arange(N)` leaves each key out of
      its own search.
    valid: bool [N], False for rows of keys that hold nothing.
    query_block, key_block: pairs held at once, [query_block, key_block] float32.
    Products are of full float32 precision on every device; squared distances are taken from differences in the end, so that
    equal vectors are 0 apart.

    Raises: ValueError for an unknown metric, or k outside 1 ... N.
    """
    count, (keys_count, width) = len(queries), keys.shape
    _check(k, metric, keys_count)
    queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
    factors, rows, bias = as_products(queries, keys, metric)
    bias = bias if valid is None else jnp.where(valid, bias, jnp.inf)
    taken = min(k + SPARE, keys_count) if metric == "sqeuclidean" else k

    key_block = min(key_block, _up(keys_count, _GROUP))
    blocks = -(-keys_count // key_block)
    more = blocks * key_block - keys_count
    rows = jnp.pad(rows, ((0, more), (0, 0))).reshape(blocks, key_block, width)
    bias = jnp.pad(bias, (0, more), constant_values=jnp.inf).reshape(blocks, key_block)

    def of_queries(block):
        factors, query, excluded = block

        def of_keys(best, block):
            number, rows, bias = block
            score = bias - jnp.matmul(factors, rows.T, precision=jax.lax.Precision.HIGHEST)
            score = _without(score, excluded - number * key_block)
            score, at = smallest(score, min(taken, key_block))
            score = jnp.concatenate([best[0], score], axis=1)
            index = jnp.concatenate([best[1], at + number * key_block], axis=1)
            score, at = jax.lax.top_k(-score, taken)
            return (-score, jnp.take_along_axis(index, at, axis=1)), None

        none = jnp.full((len(query), taken), jnp.inf), jnp.full((len(query), taken), -1, jnp.int32)
        (score, index), _ = jax.lax.scan(of_keys, none, (jnp.arange(blocks), rows, bias))
        if metric == "sqeuclidean":
            exact = jnp.sum((query[:, None] - keys[index]) ** 2, axis=-1)
            score = jnp.where(jnp.isinf(score), jnp.inf, exact)
        elif metric == "cosine":
            score = 1 + score
        index = jnp.where(jnp.isinf(score), -1, index)
        return tuple(found[:, :k] for found in jax.lax.sort((score, index), num_keys=2))

    query_block = min(query_block, count) or 1
    excluded = jnp.full((count, 1), -1, jnp.int32) if exclude is None else exclude.astype(jnp.int32).reshape(count, -1)
    blocks_of = lambda x: jnp.pad(x, ((0, -count % query_block), (0, 0))).reshape(-1, query_block, x.shape[1])  # noqa: E731
    found = jax.lax.map(of_queries, tuple(map(blocks_of, (factors, queries, excluded))))
    return Neighbours(*(x.reshape(-1, k)[:count] for x in found))


def smallest(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the k smallest of each row and their places, float32 and int32 [Q, k], in no fixed order among equals.

    scores: float32 [Q, N], k <= N. The k smallest lie in the k groups with the smallest minima, so that few need sorting: on
    CPU that takes a third of the time of `top_k` over all.
    """
    count, total = scores.shape
    groups = total // _GROUP
    if total % _GROUP or groups <= 2 * k:
        found, at = jax.lax.top_k(-scores, k)
        return -found, at
    grouped = scores.reshape(count, _GROUP, groups)  # a group is a column: minima of rows are one vector operation
    _, group = jax.lax.top_k(-jnp.min(grouped, axis=1), k)
    few = jnp.take_along_axis(grouped, group[:, None], axis=2).reshape(count, -1)
    found, at = jax.lax.top_k(-few, k)
    place = at // k * groups + jnp.take_along_axis(group, at % k, axis=1)
    return -found, place


def _check(k: int, metric: str, count: int) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}: choose one of {', '.join(METRICS)}")
    if not 1 <= k <= count:
        raise ValueError(f"k is {k}: choose a number from 1 to that of the keys, {count}")


def as_products(queries, keys, metric: str):
    """Return a, b, c such that c - <a, b> orders keys as the metric does: float32 [Q, D], [N, D], [N]."""
    if metric == "sqeuclidean":
        mean = jnp.mean(keys, axis=0)  # far from the origin, differences would drown in the squares
        a, b = queries - mean, keys - mean
        return 2 * a, b, jnp.sum(b * b, axis=1)
    if metric == "cosine":
        queries, keys = (x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, keys))
    return queries, keys, jnp.zeros(len(keys))


def _without(score, excluded):
    """Return scores [Q, N], inf at the columns in excluded [Q, E]."""
    rows = jnp.arange(len(score))[:, None]
    column = jnp.where((excluded >= 0) & (excluded < score.shape[1]), excluded, score.shape[1])
    return score.at[rows, column].set(jnp.inf, mode="drop")


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
