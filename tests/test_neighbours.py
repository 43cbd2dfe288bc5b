"""Nearest neighbours on the device against scikit-learn's exact search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from rmft_jax.kernels import InvertedFile, build_inverted_file, nearest_neighbours, search_inverted_file
from rmft_jax.kernels.neighbours import smallest


def vectors(*shape, seed=0, mean=0.0):
    return (np.random.default_rng(seed).normal(size=shape) + mean).astype(np.float32)


def by_scikit_learn(queries, keys, k, metric):
    if metric == "inner_product":
        products = queries.astype(float) @ keys.astype(float).T
        index = np.argsort(-products, axis=1, kind="stable")[:, :k]
        return -np.take_along_axis(products, index, axis=1), index
    model = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=metric).fit(keys.astype(float))
    return model.kneighbors(queries.astype(float))


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "inner_product"])
@pytest.mark.parametrize("blocks", [(256, 8192), (7, 96)], ids=["one block", "many blocks"])
def test_equal_to_scikit_learn(metric, blocks):
    queries, keys = vectors(50, 24, seed=1), vectors(1003, 24)
    found = nearest_neighbours(queries, keys, 11, metric=metric, query_block=blocks[0], key_block=blocks[1])
    distances, indices = by_scikit_learn(queries, keys, 11, metric)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=2e-5, atol=2e-6)


def test_far_from_the_origin_differences_are_not_lost():
    queries, keys = vectors(40, 8, seed=1, mean=1000.0), vectors(500, 8, mean=1000.0)
    found = nearest_neighbours(queries, keys, 5, key_block=64)
    distances, indices = by_scikit_learn(queries, keys, 5, "sqeuclidean")
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-5)


def test_equal_vectors_are_zero_apart_and_come_in_order():
    keys = np.repeat(vectors(20, 6, mean=3.0), 3, axis=0)
    found = nearest_neighbours(keys, keys, 3, key_block=32)
    np.testing.assert_array_equal(found.distances, 0)
    np.testing.assert_array_equal(found.indices, np.arange(60)[:, None] // 3 * 3 + np.arange(3))


def test_leave_one_out_finds_the_others():
    keys, count = vectors(300, 5), 300
    found = nearest_neighbours(keys, keys, 4, exclude=jnp.arange(count), key_block=64, query_block=32)
    model = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(keys.astype(float))
    _, indices = model.kneighbors()  # of the points themselves, without each one
    np.testing.assert_array_equal(found.indices, indices)


def test_what_may_not_be_found_is_not():
    keys = vectors(70, 4)
    valid = np.arange(70) % 2 == 0
    exclude = np.stack([np.arange(70), np.arange(70)[::-1], np.full(70, -1)], axis=1)
    found = np.asarray(nearest_neighbours(keys, keys, 30, exclude=exclude, valid=valid, key_block=32).indices)
    assert valid[found].all() and (found >= 0).all()
    assert not (found[:, :, None] == exclude[:, None]).any()
    few = nearest_neighbours(keys[:2], keys, 3, valid=np.arange(70) == 5)
    np.testing.assert_array_equal(few.indices, [[5, -1, -1]] * 2)
    assert np.isinf(few.distances[:, 1:]).all()


def test_the_smallest_are_those_of_a_sort():
    scores = np.random.default_rng(0).integers(0, 50, (9, 32 * 41)).astype(np.float32)
    for k in (1, 7, 20, 41):
        found, at = jax.jit(smallest, static_argnums=1)(scores, k)
        np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(scores, axis=1)[:, :k])
        np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(at), axis=1), found)
        assert all(len(set(row)) == k for row in np.asarray(at).tolist())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="metric is 'l2': choose one of sqeuclidean, cosine"):
        nearest_neighbours(vectors(2, 3), vectors(5, 3), 1, metric="l2")
    with pytest.raises(ValueError, match="k is 6: choose a number from 1 to that of the keys, 5"):
        nearest_neighbours(vectors(2, 3), vectors(5, 3), 6)


def clustered(count, seed, width=16):
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(40, width))
    rng = np.random.default_rng(seed)
    return (centres[rng.integers(40, size=count)] + 0.4 * rng.normal(size=(count, width))).astype(np.float32)


@pytest.mark.parametrize("metric", ["sqeuclidean", "inner_product"])  # cosine: tests/test_deja_vu.py
def test_an_inverted_file_is_exact_with_all_cells_and_nearly_so_with_few(metric):
    keys, itself = clustered(2001, 0), np.arange(60)
    file = build_inverted_file(keys, clusters=30, metric=metric, size=40)
    assert file.rows.shape[1:] == (40, 16)
    assert sorted(np.asarray(file.indices)[np.asarray(file.indices) >= 0].tolist()) == list(range(2001))  # each once
    exact = nearest_neighbours(keys[:60], keys, 10, metric=metric, exclude=itself)
    every, few = (
        search_inverted_file(file, keys[:60], 10, probes=probes, metric=metric, exclude=itself)
        for probes in (len(file.rows), 12)
    )
    np.testing.assert_array_equal(every.indices, exact.indices)
    np.testing.assert_allclose(every.distances, exact.distances, rtol=1e-4, atol=1e-5)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(few.indices.tolist(), exact.indices.tolist(), strict=True)])
    assert recall > 0.95 and (np.asarray(few.distances) >= np.asarray(exact.distances) - 1e-5).all()
    assert not (np.asarray(few.indices) == itself[:, None]).any()


def test_bad_input_to_an_inverted_file_is_named():
    file = InvertedFile(np.zeros((20, 16, 3)), *[np.zeros((20, 16))] * 2, np.zeros((20, 3)), np.ones(20, bool), np.zeros(3))
    with pytest.raises(ValueError, match="probes are 0: choose a number from 1 to that of the cells"):
        search_inverted_file(file, vectors(5, 3), 3, probes=0)
    with pytest.raises(ValueError, match="k is 17: 1 cells hold 16 keys, choose more probes"):
        search_inverted_file(file, vectors(5, 3), 17, probes=1)
    with pytest.raises(ValueError, match="clusters are 501: choose a number from 1 to that of the keys, 500"):
        build_inverted_file(vectors(500, 3), clusters=501)
