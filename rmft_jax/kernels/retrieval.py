"""Predictions from a datastore of examples beside those of the weights.

Source: Chen et al. 2022 (RetroPrompt), arXiv 2205.14704, section 3. Where its public code differs (it adds probabilities as
if they were logarithms, multiplies batch means, lets a query find itself) the paper's formulas count.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmft_jax.kernels.neighbours import nearest_neighbours

_FLOOR = 1e-4  # of the probability whose logarithm is taken: a label that no neighbour has would weigh infinitely


class Datastore(NamedTuple):
    """What can be looked up, and deleted. keys: float [N, E]; labels: int32 [N]; valid: bool [N], False once deleted."""

    keys: jax.Array
    labels: jax.Array
    valid: jax.Array


class Retrieved(NamedTuple):
    """The entries nearest to each query, nearest first. similarity: float32 [Q, k]; labels, indices: int32 [Q, k].

    Where the store has fewer: -inf, -1, -1.
    """

    similarity: jax.Array
    labels: jax.Array
    indices: jax.Array


def retrieve(
    store: Datastore, queries: jax.Array, k: int, *, metric: str = "inner_product", exclude: jax.Array | None = None
) -> Retrieved:
    """Return the k entries most similar to each query, compared with all.

    queries: float [Q, E]. metric: inner_product (of the paper), or another of `nearest_neighbours`; the similarity is minus
    its distance. exclude: int [Q] or [Q, M], indices of entries that a query must not find, -1 = none: for training examples
    their own (leave one out), else every label is read off its own entry.
    Source of the metric sqeuclidean: Khandelwal et al. 2020, arXiv 1911.00172, section 2.
    """
    found = nearest_neighbours(queries, store.keys, k, metric=metric, exclude=exclude, valid=store.valid)
    labels = jnp.where(found.indices >= 0, store.labels[found.indices], -1)
    return Retrieved(-found.distances, labels, found.indices)


def delete(store: Datastore, which: jax.Array) -> Datastore:
    """Return the store without some entries, their keys and labels zeroed so that nothing of them is left.

    which: bool [N].
    """
    keys = jnp.where(which[:, None], 0, store.keys)
    return Datastore(keys, jnp.where(which, 0, store.labels), store.valid & ~which)


def knn_probabilities(
    similarity: jax.Array, labels: jax.Array, classes: int, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Return P_kNN(y | q), proportional to the sum of exp(similarity / temperature) over neighbours of label y.

    similarity: float [..., k], -inf where there is no neighbour. labels: int [..., k]. In the paper the temperature is 1.
    Returns float32 [..., classes]; without any neighbour all classes are equally likely.
    """
    weight, alone = _neighbour_weights(similarity, temperature)
    flat, of = weight.reshape(-1, weight.shape[-1]), labels.reshape(-1, labels.shape[-1])
    rows = jnp.arange(len(flat))[:, None]
    summed = jnp.zeros((len(flat), classes)).at[rows, jnp.where(of < 0, classes, of)].add(flat, mode="drop")
    return jnp.where(alone[..., None], 1 / classes, summed.reshape(*weight.shape[:-1], classes))


def knn_probability(
    similarity: jax.Array, labels: jax.Array, gold: jax.Array, classes: int, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Return `knn_probabilities` of one label, float32 [...], without an array over classes. gold: int [...]."""
    weight, alone = _neighbour_weights(similarity, temperature)
    return jnp.where(alone, 1 / classes, jnp.sum(weight * (labels == gold[..., None]), axis=-1))


def _neighbour_weights(similarity, temperature):
    scaled = similarity.astype(jnp.float32) / temperature
    alone = jnp.all(jnp.isneginf(scaled), axis=-1)
    return jax.nn.softmax(jnp.where(alone[..., None], 0, scaled), axis=-1), alone


def knn_guided_loss(loss: jax.Array, probability: jax.Array, beta: float | jax.Array) -> jax.Array:
    """Return (1 + beta F) loss of each example, float32 [...], F = -log P_kNN(gold), for which the gradient is 0.

    loss: float [...], the cross entropy of each. probability: float [...], P_kNN of each one's gold label, its own entry
    left out; counted as at least 1e-4. Examples that their neighbours contradict count for more.
    """
    hardness = -jnp.log(jnp.clip(jax.lax.stop_gradient(probability), _FLOOR, 1))
    return (1 + beta * hardness) * loss


def interpolate(knn: jax.Array, model: jax.Array, share: float | jax.Array) -> jax.Array:
    """Return share x P_kNN + (1 - share) x P_model, probabilities of any equal shapes."""
    return share * knn + (1 - share) * model


def neural_demonstrations(
    queries: jax.Array, store: Datastore, label_embeddings: jax.Array, count: int, *, exclude: jax.Array | None = None
) -> jax.Array:
    """Return for each class what its nearest examples amount to, and its label word: float [Q, classes, 2, E].

    The first is sum_i a_i h_i over the `count` entries of the class most similar to the query, a = softmax(q . h_i); the
    second the row of label_embeddings. They are put beside the input embeddings of the query's prompt. The store counts as
    constant for the gradient, label_embeddings do not.

    queries: float [Q, E]. label_embeddings: float [classes, E]. exclude: int [Q], an entry that each must not be shown, -1 =
    none. A class with no entry left gives zeros. All pairs of queries and entries are held: this is for few-shot stores.
    """
    classes, entries = len(label_embeddings), len(store.labels)
    similarity = jnp.matmul(queries, store.keys.T, precision="highest")
    usable = store.valid & (store.labels == jnp.arange(classes)[:, None])  # [classes, N]
    usable = jnp.broadcast_to(usable, (len(queries), classes, entries))
    if exclude is not None:
        usable &= (jnp.arange(entries) != exclude[:, None])[:, None]
    best, at = jax.lax.top_k(jnp.where(usable, similarity[:, None], -jnp.inf), min(count, entries))
    weight, alone = _neighbour_weights(best, 1.0)
    mean = jnp.einsum("qcm,qcme->qce", jnp.where(alone[..., None], 0, weight), store.keys[at])
    words = jnp.broadcast_to(label_embeddings, (len(queries), *label_embeddings.shape))
    return jnp.stack([jax.lax.stop_gradient(mean), words], axis=2)
