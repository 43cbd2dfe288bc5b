"""Exact memorization while training, from argmax hits: which tokens, in runs of what length, in which slices and examples.

A token is memorized if it is the most probable one after those before it (Tirumala et al. 2022, arXiv 2205.10770). Counts
are int32, of one batch. Sums over a training fit in uint32, if differences of them are taken before they wrap around twice.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Runs(NamedTuple):
    """What `run_lengths` says of each row. int32 [...] each, histogram [..., bins].

    histogram: place n counts the runs of length n + 1, the last place those of length `bins` or more.
    count: runs. total: their tokens. longest: the length of the longest, 0 without any.
    """

    histogram: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuple.count, which nobody calls here
    total: jax.Array
    longest: jax.Array


def memorized(hit: jax.Array, is_target: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Return bool [...]: targets that are the likeliest token after those before them.

    hit: bool [...], argmax of the logits = target. is_target: bool [...]. weights: of any type [...]; tokens of weight 0 do
    not count either. Source: Tirumala et al. 2022, arXiv 2205.10770.
    """
    right = hit & is_target
    return right if weights is None else right & (weights != 0)


def run_lengths(memorized: jax.Array, segment_ids: jax.Array, bins: int) -> Runs:
    """Measure the maximal runs of memorized tokens (the memory units) in each row; the border of a document ends a run.

    memorized: bool [..., T]; segment_ids: int [..., T], the document of each of these tokens. bins: of the histogram, 1 or
    more, static. Source: Tirumala et al. 2022, arXiv 2205.10770.
    """
    place = jnp.arange(memorized.shape[-1], dtype=jnp.int32)
    joined = memorized[..., 1:] & memorized[..., :-1] & (segment_ids[..., 1:] == segment_ids[..., :-1])
    edge = jnp.zeros_like(memorized[..., :1])
    begins = memorized & ~jnp.concatenate([edge, joined], axis=-1)
    ends = memorized & ~jnp.concatenate([joined, edge], axis=-1)
    begin = jax.lax.cummax(jnp.where(begins, place, 0), axis=memorized.ndim - 1)
    length = jnp.where(ends, place - begin + 1, 0)
    into = jnp.where(ends, jnp.minimum(length, bins) - 1, bins)  # beyond the end: dropped

    def histogram(into):
        return jnp.zeros(bins, jnp.int32).at[into].add(1, mode="drop")

    flat = jax.vmap(histogram)(into.reshape(-1, into.shape[-1]))
    return Runs(
        histogram=flat.reshape(*into.shape[:-1], bins),
        count=jnp.sum(ends, axis=-1, dtype=jnp.int32),
        total=jnp.sum(length, axis=-1, dtype=jnp.int32),
        longest=jnp.max(length, axis=-1, initial=0),
    )


def slice_counts(
    hit: jax.Array, is_target: jax.Array, slice_ids: jax.Array, slices: int
) -> tuple[jax.Array, jax.Array]:
    """Return hits and targets of each slice, int32 [slices] both.

    hit, is_target: bool [...]; slice_ids: int [...], the slice of each token; one outside [0, slices) counts nowhere.
    slices: static.
    """
    inside = is_target & (slice_ids >= 0)
    into = jnp.where(inside, slice_ids, slices).reshape(-1)
    ones = jnp.stack([hit & inside, inside], axis=-1).reshape(-1, 2).astype(jnp.int32)
    counts = jnp.zeros((slices, 2), jnp.int32).at[into].add(ones, mode="drop")
    return counts[:, 0], counts[:, 1]


def example_counts(hit: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return hits and targets of each example, int32 [...] both. hit, is_target: bool [..., T], an example a row."""
    return jnp.sum(hit & is_target, axis=-1, dtype=jnp.int32), jnp.sum(is_target, axis=-1, dtype=jnp.int32)


def first_memorized(first: jax.Array, example: jax.Array, whole: jax.Array, step: jax.Array) -> jax.Array:
    """Return `first` with `step` where an example of the batch is memorized as a whole and never was before.

    first: int32 [examples], the step at which each example was first memorized as a whole, -1 = never. example: int32 [B],
    the examples of the batch, any of them more than once; one outside the range counts nowhere. whole: bool [B].
    step: int32 [], 0 or more.
    """
    into = jnp.where(whole & (example >= 0), example, first.shape[0])
    return first.at[into].set(jnp.where(first[example] < 0, step, first[example]), mode="drop")
