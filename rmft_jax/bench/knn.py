"""`rmft bench knn`: nearest neighbours on the device against scikit-learn and faiss-cpu, exact and approximate."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.cores import cores
from rmft_jax.devices import by_rows, everywhere
from rmft_jax.errors import UserError
from rmft_jax.kernels import build_inverted_file, nearest_neighbours, search_inverted_file
from rmft_jax.progress import say, track

KEYS, QUERIES, WIDTH, K, CLUSTERS = 100_000, 2_000, 64, 10, 512
PEERS = {"faiss-cpu": "faiss", "scikit-learn": "sklearn"}  # package -> module
_ENOUGH = 0.99  # recall of an approximate search
_GROUPS, _SPREAD = 1000, 0.6  # of the vectors: groups of images that are alike


class Search(NamedTuple):
    """One way to search. find: cells to visit -> indices, int [Q, K]. build_s: seconds to build an index, None if exact."""

    find: Callable[[int], np.ndarray]
    build_s: float | None = None


def run(
    config: Config, peer: str = "", *, keys: int = KEYS, queries: int = QUERIES, clusters: int = CLUSTERS, runs: int = 5
) -> dict:
    """Time the 10 nearest of `keys` vectors for `queries` others: every search in turn, the order turned round each time.

    peer: faiss-cpu (the default) or scikit-learn; both are measured where they are installed, the peer is what the ratio is
    against. Approximate searches of both sides have as many clusters; each visits the fewest cells, of 4, 8, 16, ..., with
    which it finds 99% of the neighbours. Compilation and the building of an index are left out, the latter is stated.
    Returns name, device, versions, unit, shape, value and peer_value (medians, queries a second, exact), ratio (median over
    the runs), searches (of each: queries_per_s, recall, ours_over_it; of an approximate one also probes and build_s), and
    runs: queries a second of ours and the peer.

    Raises UserError for another peer, or one that is not installed.
    """
    peer = peer or "faiss-cpu"
    if peer not in PEERS:
        raise UserError(f"bench knn knows no peer {peer!r}: choose one of {', '.join(PEERS)}")
    there = [package for package, module in PEERS.items() if importlib.util.find_spec(module)]
    if peer not in there:
        raise UserError(f"bench knn needs {peer}: pip install 'rmft-jax[bench]', or choose another --peer")
    for package in set(PEERS) - set(there):
        say(f"{package} is not installed and not measured: pip install 'rmft-jax[bench]'")
    x, q = _vectors(keys, queries)
    searches = _ours(x, q, clusters)
    searches |= _scikit_learn(x, q) if "scikit-learn" in there else {}
    searches |= _faiss(x, q, clusters) if "faiss-cpu" in there else {}
    exact = searches["exact"].find(0)
    probes = {name: _fewest(search, exact, clusters) for name, search in searches.items()}
    found = {name: recall(search.find(probes[name]), exact) for name, search in searches.items()}
    rates: dict[str, list] = {name: [] for name in searches}
    for number in track(range(runs), "bench knn", runs):
        for name in list(searches)[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            searches[name].find(probes[name])
            rates[name].append(queries / (time.perf_counter() - begin))
    rival = "faiss-cpu exact" if peer == "faiss-cpu" else peer
    over = lambda a, b: float(np.median(np.array(rates[a]) / rates[b]))  # noqa: E731
    each = {}
    for name, search in searches.items():
        each[name] = {
            "queries_per_s": float(np.median(rates[name])),
            "recall": found[name],
            "ours_over_it": over("exact" if search.build_s is None else "approximate", name),
        }
        if search.build_s is not None:
            each[name] |= {"probes": probes[name], "build_s": round(search.build_s, 2)}
    return {
        "name": "knn",
        **environment("numpy", *there),
        "unit": "queries/s",
        "shape": {"keys": keys, "queries": queries, "width": WIDTH, "k": K, "clusters": clusters, "threads": cores()},
        "value": float(np.median(rates["exact"])),
        "peer": rival,
        "peer_value": float(np.median(rates[rival])),
        "ratio": over("exact", rival),
        "searches": each,
        "runs": [[round(a, 1), round(b, 1)] for a, b in zip(rates["exact"], rates[rival], strict=True)],
    }


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the exact neighbours that were found. Both int [Q, k]."""
    return float(np.mean((found[:, :, None] == exact[:, None]).any(1)))


def _fewest(search: Search, exact: np.ndarray, clusters: int) -> int:
    """Return how many cells an approximate search must visit, 0 for an exact one."""
    probes, most = 4, 2 * clusters  # ours has that many cells
    while search.build_s is not None and 2 * probes <= most and recall(search.find(probes), exact) < _ENOUGH:
        probes *= 2
    return 0 if search.build_s is None else probes


def _vectors(keys: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors in groups, as embeddings of images are: float32 [keys, WIDTH] and [queries, WIDTH]."""
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(_GROUPS, WIDTH))
    x = groups[rng.integers(_GROUPS, size=keys + queries)] + _SPREAD * rng.normal(size=(keys + queries, WIDTH))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return x[:keys], x[keys:]


def _ours(x: np.ndarray, q: np.ndarray, clusters: int) -> dict[str, Search]:
    keys = jax.device_put(x, everywhere())
    build = lambda: jax.block_until_ready(build_inverted_file(keys, clusters=clusters))  # noqa: E731
    build()
    begin = time.perf_counter()
    file = build()
    spent = time.perf_counter() - begin
    exact = by_rows(lambda rows, keys: nearest_neighbours(rows, keys, K))

    @functools.cache
    def visiting(probes: int) -> Callable:
        return by_rows(lambda rows, file: search_inverted_file(file, rows, K, probes=probes))

    return {
        "exact": Search(lambda _: np.asarray(exact(q, keys).indices)),
        "approximate": Search(lambda probes: np.asarray(visiting(probes)(q, file).indices), spent),
    }


def _scikit_learn(x: np.ndarray, q: np.ndarray) -> dict[str, Search]:
    from sklearn.neighbors import NearestNeighbors

    model = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(x)
    return {"scikit-learn": Search(lambda _: model.kneighbors(q)[1])}


def _faiss(x: np.ndarray, q: np.ndarray, clusters: int) -> dict[str, Search]:
    import faiss

    faiss.omp_set_num_threads(cores())
    flat = faiss.IndexFlatL2(WIDTH)
    flat.add(x)
    begin = time.perf_counter()
    lists = faiss.IndexIVFFlat(faiss.IndexFlatL2(WIDTH), WIDTH, clusters)
    lists.train(x)
    lists.add(x)
    spent = time.perf_counter() - begin

    def visit(probes: int) -> np.ndarray:
        lists.nprobe = probes
        return lists.search(q, K)[1]

    return {"faiss-cpu exact": Search(lambda _: flat.search(q, K)[1]), "faiss-cpu approximate": Search(visit, spent)}
