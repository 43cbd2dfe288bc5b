"""Retrieval: the formulas of the paper, against plain loops; nothing finds itself; what is deleted is gone."""

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.kernels import (
    Datastore,
    delete,
    interpolate,
    knn_guided_loss,
    knn_probabilities,
    knn_probability,
    neural_demonstrations,
    retrieve,
)

CLASSES = 3


def store_of(count=20, width=5, seed=0):
    rng = np.random.default_rng(seed)
    keys, labels = rng.normal(size=(count, width)), rng.integers(CLASSES, size=count)
    return Datastore(jnp.asarray(keys, jnp.float32), jnp.asarray(labels, jnp.int32), jnp.ones(count, bool))


def test_probabilities_are_those_of_a_plain_loop_and_sum_to_one():
    store, queries = store_of(), jax.random.normal(jax.random.key(0), (7, 5))
    found = retrieve(store, queries, 4)
    p = knn_probabilities(found.similarity, found.labels, CLASSES)
    for query, row in zip(np.asarray(queries, float), p, strict=True):
        nearest = sorted(range(20), key=lambda n: -query @ np.asarray(store.keys[n], float))[:4]
        mass = np.zeros(CLASSES)
        for n in nearest:
            mass[store.labels[n]] += np.exp(query @ np.asarray(store.keys[n], float))
        np.testing.assert_allclose(row, mass / mass.sum(), rtol=1e-4)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    for gold in range(CLASSES):
        of_gold = knn_probability(found.similarity, found.labels, jnp.full(7, gold), CLASSES)
        np.testing.assert_allclose(of_gold, p[:, gold], rtol=1e-6)


def test_large_similarities_neither_overflow_nor_lose_the_sum():
    similarity = jnp.array([[3000.0, 2999.0, -3000.0], [-jnp.inf, -jnp.inf, -jnp.inf]])
    labels = jnp.array([[0, 1, 2], [-1, -1, -1]])
    p = knn_probabilities(similarity, labels, CLASSES)
    np.testing.assert_allclose(p, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0], [1 / 3] * 3], rtol=1e-5)
    np.testing.assert_allclose(knn_probability(similarity, labels, jnp.array([1, 2]), CLASSES), [p[0, 1], 1 / 3], rtol=1e-6)
    warm = knn_probabilities(similarity, labels, CLASSES, temperature=1e6)
    np.testing.assert_allclose(warm, 1 / 3, rtol=1e-2)


def test_leave_one_out_never_returns_the_query():
    store = store_of(40)
    every = jnp.arange(40)
    own = retrieve(store, 5 * store.keys, 40, metric="sqeuclidean", exclude=every)
    assert not (own.indices == every[:, None]).any()
    assert (own.indices[:, -1] == -1).all() and (own.labels[:, -1] == -1).all()  # 39 others are all there are
    free = retrieve(store, store.keys, 3, metric="sqeuclidean")
    np.testing.assert_array_equal(free.indices[:, 0], every)
    pairs = retrieve(store, store.keys, 5, exclude=jnp.stack([every, (every + 1) % 40], axis=1))
    assert not ((pairs.indices == every[:, None]) | (pairs.indices == (every[:, None] + 1) % 40)).any()


def test_what_is_deleted_is_neither_found_nor_left_in_the_store():
    store = store_of()
    gone = store.labels == 1
    smaller = delete(store, gone)
    found = retrieve(smaller, store.keys, 20)
    assert not np.isin(found.indices, np.flatnonzero(gone)).any()
    p = knn_probabilities(found.similarity, found.labels, CLASSES)
    assert (p[:, 1] == 0).all()
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    assert not np.asarray(smaller.keys)[gone].any() and gone.any()
    demonstrations = neural_demonstrations(store.keys, smaller, jnp.eye(CLASSES, 5), 4)
    assert not demonstrations[:, 1, 0].any() and demonstrations[:, 0, 0].any()


def test_the_guided_loss_is_cross_entropy_at_beta_0_and_weighs_up_what_neighbours_contradict():
    loss = jnp.array([0.3, 0.3, 0.3, 0.3])
    p = jnp.array([1.0, 0.5, 0.1, 0.0])
    np.testing.assert_array_equal(knn_guided_loss(loss, p, 0.0), loss)
    guided = knn_guided_loss(loss, p, 0.7)
    assert (np.diff(guided) > 0).all() and np.isfinite(guided).all()
    np.testing.assert_allclose(guided[:3], [0.3 * (1 - 0.7 * np.log(x)) for x in (1.0, 0.5, 0.1)], rtol=1e-6)
    # each example is weighed by its own neighbours, not a batch by the product of its means
    losses = jnp.array([2.0, 0.1])
    by_example, by_means = knn_guided_loss(losses, p[1:3], 1.0).mean(), knn_guided_loss(losses.mean(), p[1:3], 1.0).mean()
    assert abs(by_example - by_means) > 0.1
    assert not jax.grad(lambda p: knn_guided_loss(loss, p, 0.7).sum())(p).any()
    labels = jnp.array([[0, 0, 0, 1], [0, 1, 1, 1]])  # gold class 0: common among the neighbours, then rare
    rare = knn_guided_loss(loss[:2], knn_probability(jnp.zeros((2, 4)), labels, jnp.zeros(2, int), CLASSES), 1.0)
    assert rare[1] > rare[0]


def test_interpolation_goes_from_the_model_to_the_neighbours():
    knn, model = jnp.array([[0.7, 0.3]]), jnp.array([[0.2, 0.8]])
    np.testing.assert_array_equal(interpolate(knn, model, 0.0), model)
    np.testing.assert_array_equal(interpolate(knn, model, 1.0), knn)
    np.testing.assert_allclose(interpolate(knn, model, 0.2), [[0.3, 0.7]], rtol=1e-6)


def test_demonstrations_are_those_of_a_plain_loop():
    store, words = store_of(12, seed=3), jnp.asarray(np.random.default_rng(4).normal(size=(CLASSES, 5)), jnp.float32)
    found = np.asarray(neural_demonstrations(store.keys, store, words, 2, exclude=jnp.arange(12)))
    keys, labels = np.asarray(store.keys, float), np.asarray(store.labels)
    for q in range(12):
        for c in range(CLASSES):
            of_class = [n for n in range(12) if labels[n] == c and n != q]
            nearest = sorted(of_class, key=lambda n: -keys[q] @ keys[n])[:2]
            a = np.exp([keys[q] @ keys[n] for n in nearest])
            np.testing.assert_allclose(found[q, c, 0], (a / a.sum()) @ keys[nearest], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(found[q, c, 1], words[c])
    gradients = jax.grad(lambda words: neural_demonstrations(store.keys, store, words, 2).sum())(words)
    np.testing.assert_allclose(gradients, 12, rtol=1e-6)
