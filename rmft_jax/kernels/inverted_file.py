"""Approximate nearest neighbours for large sets: keys in cells around means of clusters, of which each query visits a few.

Large clusters fill several cells of one size, so that every array has a fixed shape. Queries that visit one cell visit it
together, as one matrix product. Source of inverted files: Jegou et al. 2011, Product quantization for nearest neighbor
search.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmft_jax.kernels.neighbours import SPARE, Neighbours, as_products, nearest_neighbours, smallest

_STEPS, _SAMPLE = 8, 64  # of k-means, and the keys of a cluster that it looks at


class InvertedFile(NamedTuple):
    """Keys by cell. rows: float32 [cells, size, D], less the mean or normalised, as the metric wants them.

    bias: float32 [cells, size]; less the products of rows and queries it is the distance, up to what is a query's own.
    indices: int32 [cells, size], the keys' numbers, -1 where there is none. centres: float32 [cells, D], means of the rows.
    used: bool [cells], which cells hold any. mean: float32 [D], of all keys.
    """

    rows: jax.Array
    bias: jax.Array
    indices: jax.Array
    centres: jax.Array
    used: jax.Array
    mean: jax.Array


@functools.partial(jax.jit, static_argnames=("clusters", "metric", "size"))
def build_inverted_file(
    keys: jax.Array, *, clusters: int, metric: str = "sqeuclidean", size: int = 0, seed: int = 0
) -> InvertedFile:
    """Sort keys, float [N, D], into cells by k-means.

    clusters: about the square root of N or a few times that. metric: as `nearest_neighbours` has it; searches must use the
      same. size: rows of a cell, 0 = the mean cluster.
    seed: of the keys that k-means starts from and looks at.
    Raises: ValueError when there are more clusters than keys.
    """
    count = len(keys)
    if not 1 <= clusters <= count:
        raise ValueError(f"clusters are {clusters}: choose a number from 1 to that of the keys, {count}")
    keys = keys.astype(jnp.float32)
    _, rows, bias = as_products(keys[:1], keys, metric)
    sample = rows[jax.random.permutation(jax.random.key(seed), count)[: _SAMPLE * clusters]]

    def step(centres, _):
        cluster = nearest_neighbours(sample, centres, 1, metric=metric).indices[:, 0]
        total = jax.ops.segment_sum(sample, cluster, num_segments=clusters)
        members = jax.ops.segment_sum(jnp.ones(len(sample)), cluster, num_segments=clusters)[:, None]
        return jnp.where(members > 0, total / jnp.maximum(members, 1), centres), None

    centres, _ = jax.lax.scan(step, sample[:clusters], length=_STEPS)
    cluster = nearest_neighbours(rows, centres, 1, metric=metric).indices[:, 0]
    number = _plan(cluster, clusters, size or max(8, count // clusters)).pairs
    there = number >= 0
    in_cell = jnp.where(there[:, :, None], rows[number], 0)
    members = jnp.sum(there, axis=1)
    return InvertedFile(
        rows=in_cell,
        bias=jnp.where(there, bias[number], jnp.inf),
        indices=number,
        centres=jnp.sum(in_cell, axis=1) / jnp.maximum(members, 1)[:, None],
        used=members > 0,
        mean=jnp.mean(keys, axis=0),
    )


@functools.partial(jax.jit, static_argnames=("k", "probes", "metric", "block"))
def search_inverted_file(
    file: InvertedFile,
    queries: jax.Array,
    k: int,
    *,
    probes: int,
    metric: str = "sqeuclidean",
    exclude: jax.Array | None = None,
    block: int = 64,
) -> Neighbours:
    """Find the k nearest keys to each query among those in its `probes` nearest cells.

    queries: float [Q, D]. metric: that of the file. exclude: as `nearest_neighbours` has it. block: queries that visit a
    cell at once. With as many probes as cells the result is exact.
    Raises: ValueError when probes are not in 1 ... cells, or their cells hold fewer than k keys.
    """
    cells, size, width = file.rows.shape
    if not 1 <= probes <= cells:
        raise ValueError(f"probes are {probes}: choose a number from 1 to that of the cells, {cells}")
    if not 1 <= k <= probes * size:
        raise ValueError(f"k is {k}: {probes} cells hold {probes * size} keys, choose more probes")
    count, taken = len(queries), min(k + SPARE, size)
    queries = queries.astype(jnp.float32)
    if metric == "sqeuclidean":
        queries = queries - file.mean
    elif metric == "cosine":
        queries = queries / jnp.maximum(jnp.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    factor = 2 if metric == "sqeuclidean" else 1
    excluded = jnp.full((count, 1), -2, jnp.int32) if exclude is None else exclude.astype(jnp.int32).reshape(count, -1)
    nearest = nearest_neighbours(queries, file.centres, probes, metric=metric, valid=file.used).indices

    plan = _plan(nearest.reshape(-1), cells, block)

    def visit(visitors):
        cell, pairs = visitors

        def compare():
            query = pairs // probes
            score = file.bias[cell] - factor * jnp.matmul(
                queries[query], file.rows[cell].T, precision=jax.lax.Precision.HIGHEST
            )
            index = file.indices[cell]
            score = jnp.where((index == excluded[query][:, :, None]).any(1), jnp.inf, score)
            found, at = smallest(score, taken)
            return found, cell * size + at

        nobody = (jnp.full((block, taken), jnp.inf), jnp.zeros((block, taken), jnp.int32))
        return jax.lax.cond(pairs[0] >= 0, compare, lambda: nobody)

    score, place = jax.lax.map(visit, (plan.cell, plan.pairs))
    of_query = lambda x, otherwise: (  # noqa: E731
        x.reshape(-1, taken).at[plan.place].get(mode="fill", fill_value=otherwise).reshape(count, probes * taken)
    )
    score, place = of_query(score, jnp.inf), of_query(place, 0)
    score, at = jax.lax.top_k(-score, min(k + SPARE, probes * taken))
    score, place = -score, jnp.take_along_axis(place, at, axis=1)
    if metric == "sqeuclidean":
        exact = jnp.sum((queries[:, None] - file.rows.reshape(-1, width)[place]) ** 2, axis=-1)
        score = jnp.where(jnp.isinf(score), jnp.inf, exact)
    elif metric == "cosine":
        score = 1 + score
    index = jnp.where(jnp.isinf(score), -1, file.indices.reshape(-1)[place])
    return Neighbours(*(found[:, :k] for found in jax.lax.sort((score, index), num_keys=2)))


class _Plan(NamedTuple):
    """Which queries visit which cell together: one cell a block.

    cell: int32 [blocks]. pairs: int32 [blocks, block], numbers of visits, -1 = none. place: int32 [visits], where in the
    blocks, one after the other, each visit is; beyond them where there is none.
    """

    cell: jax.Array
    pairs: jax.Array
    place: jax.Array


def _plan(cell, cells: int, block: int) -> _Plan:
    """Return the plan for visits to cells, int32 [visits], -1 = no visit: those of one cell in blocks of their own."""
    visits = len(cell)
    blocks = -(-visits // block) + min(cells, visits)  # enough, however they fall
    cell = jnp.where(cell < 0, cells, cell)
    counts = jnp.zeros(cells, jnp.int32).at[cell].add(1, mode="drop")
    ends = jnp.cumsum(-(-counts // block))  # in blocks
    begins = ends - -(-counts // block)
    order = jnp.argsort(cell, stable=True).astype(jnp.int32)
    sorted_cell = cell[order]
    rank = jnp.arange(visits, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[sorted_cell]
    slot = jnp.where(sorted_cell < cells, begins[sorted_cell] * block + rank, blocks * block)
    pairs = jnp.full(blocks * block, -1, jnp.int32).at[slot].set(order, mode="drop")
    place = jnp.zeros(visits, jnp.int32).at[order].set(slot)
    of_block = jnp.searchsorted(ends, jnp.arange(blocks), side="right").astype(jnp.int32)
    return _Plan(jnp.minimum(of_block, cells - 1), pairs.reshape(blocks, block), place)
