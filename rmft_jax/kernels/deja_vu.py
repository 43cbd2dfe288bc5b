"""Deja vu memorization: does a caption bring back objects of its training image that it does not name?

Source: Jayaraman et al. 2024, arXiv 2402.02103, section 3. A record z has a caption and the objects of its image; P is a
public set of images with objects, disjoint from all training data. A model predicts for z all objects of the k images of P
whose embeddings are nearest to that of the caption. A target model, trained on z, is held against a reference, which is not.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scores(NamedTuple):
    """How well the predicted objects of each record are its own: float32 [N] in [0, 1].

    precision: share of the predicted ones that are there. recall: share of those there that are predicted. f: their harmonic
    mean. correct: int32 [N], how many are both.
    """

    precision: jax.Array
    recall: jax.Array
    f: jax.Array
    correct: jax.Array


def neighbour_objects(public_objects: jax.Array, indices: jax.Array) -> jax.Array:
    """Return bool [N, C], the union of the neighbours' objects.

    public_objects: bool [P, C]. indices: int32 [N, k], the neighbours of each record; -1 = none.
    """

    public_objects, indices = jnp.asarray(public_objects, bool), jnp.asarray(indices)

    def add(predicted, index):
        return predicted | (public_objects[jnp.maximum(index, 0)] & (index >= 0)[:, None]), None

    none = jnp.zeros((len(indices), public_objects.shape[1]), bool)
    return jax.lax.scan(add, none, indices.T)[0]


def object_scores(objects: jax.Array, predicted: jax.Array) -> Scores:
    """Return the Scores of predicted objects, bool [N, C], against those that are there, bool [N, C].

    Shares of nothing count as 0; records without objects are to be left out (`where` in the functions below).
    """
    correct = jnp.sum(objects & predicted, axis=1, dtype=jnp.int32)
    there, said = (jnp.sum(x, axis=1, dtype=jnp.int32) for x in (objects, predicted))
    share = lambda of: correct / jnp.maximum(of, 1)  # noqa: E731
    return Scores(share(said), share(there), 2 * correct / jnp.maximum(there + said, 1), correct)


def population_gap(target: jax.Array, reference: jax.Array, where: jax.Array) -> jax.Array:
    """Return (records on which the target is better - those on which the reference is) / all of them, float32 [].

    target, reference: float [N]; of precision this is the PPG, of recall the PRG. where: bool [N], the records that count.
    """
    return _mean(jnp.sign(target - reference), where)


def recall_survival(recall: jax.Array, where: jax.Array, at: jax.Array) -> jax.Array:
    """Return the share of records with a recall above each threshold, float32 [T]. recall: float [N]; at: float [T]."""
    return jax.vmap(lambda threshold: _mean(recall > threshold, where))(at)


def aucg(target: jax.Array, reference: jax.Array, where: jax.Array, *, bins: int = 0) -> jax.Array:
    """Return the area between the survival curves of two recalls, float32 []: float [N] each.

    bins: 0 for the exact area, mean recall of the target - that of the reference; the published form is a sum over 100.
    """
    if not bins:
        return _mean(target, where) - _mean(reference, where)
    at = (jnp.arange(bins) + 0.5) / bins
    return jnp.mean(recall_survival(target, where, at) - recall_survival(reference, where, at))


def sample_gaps(order: jax.Array, target: jax.Array, reference: jax.Array, where: jax.Array, count: int) -> jax.Array:
    """Return the mean gap, target - reference, over the `count` records that come first, float32 [].

    order: float [N], what to sort by, smallest first: the distance of the nearest neighbour, minus the number of correct
      predictions, or minus the gap itself. target, reference: float [N], a field of Scores. where: bool [N].
    """
    first = jnp.argsort(jnp.where(where, order, jnp.inf), stable=True)[:count]
    return _mean((target - reference)[first], where[first])


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, values, 0), dtype=jnp.float32) / jnp.maximum(jnp.sum(where), 1)
