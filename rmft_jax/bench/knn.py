"""`rmft bench knn`: nearest neighbours on the device against scikit-learn and faiss-cpu, exact and approximate."""

from __future__ import annotations

import os
import time

import jax
import numpy as np

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.devices import by_rows, everywhere
from rmft_jax.errors import UserError
from rmft_jax.kernels import build_inverted_file, nearest_neighbours, search_inverted_file
from rmft_jax.progress import track

KEYS, QUERIES, WIDTH, K = 100_000, 2_000, 64, 10
CLUSTERS, PROBES = 512, 8
_GROUPS, _SPREAD = 1000, 0.6  # of the vectors: groups of images that are alike


def run(
    config: Config, peer: str = "", *, keys: int = KEYS, queries: int = QUERIES, clusters: int = 512, runs: int = 5
) -> dict:
    """Time the 10 nearest of `keys` vectors for `queries` others: every search in turn, the order turned round each time.

    peer: faiss-cpu (the default) or scikit-learn; both are measured where they are installed, the peer is what the ratio is
    against. Approximate searches of both sides have as many clusters; each visits the fewest cells, of 1, 2, 4, ..., with
    which it finds 99% of the neighbours. Compilation and the building of an index are left out, the latter is stated.
    Returns name, device, versions, unit, shape, value and peer_value (medians, queries a second, exact), ratio (median over
    the runs), searches (of each: queries_per_s, recall, against_ours; of an approximate one also probes and build_s), and
    runs: queries a second of ours and the peer.

    Raises UserError for another peer, or one that is not installed.
    """
    peer = peer or "faiss-cpu"
    if peer not in ("faiss-cpu", "scikit-learn"):
        raise UserError(f"bench knn knows no peer {peer!r}: choose one of faiss-cpu, scikit-learn")
    x, q = _vectors(keys, queries)
    clusters = min(CLUSTERS, keys // 20)
    searches, more = {}, {}
    ours, theirs = _ours(x, q, clusters), _peers(x, q, clusters, peer)
    exact = np.asarray(ours["exact"][0]().indices)
    for name, (search, index_of, facts) in (ours | theirs).items():
        probes = 1
        while "build_s" in facts:  # approximate
            search, index_of = facts["search"](probes)
            if recall(index_of(search()), exact) >= 0.99 or probes >= clusters:
                break
            probes *= 2
        more[name] = {"recall": recall(index_of(search()), exact)}
        if "build_s" in facts:
            more[name] |= {"probes": probes, "build_s": round(facts["build_s"], 2)}
        searches[name] = search
    rates = {name: [] for name in searches}
    for number in track(range(runs), "bench knn", runs):
        for name in list(searches)[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            searches[name]()
            rates[name].append(queries / (time.perf_counter() - begin))
    rival = {"faiss-cpu": "faiss-cpu exact", "scikit-learn": "scikit-learn"}[peer]
    ratio = lambda a, b: float(np.median(np.array(rates[a]) / rates[b]))  # noqa: E731
    like = {name: "approximate" if "build_s" in more[name] else "exact" for name in searches}
    return {
        "name": "knn",
        **environment("numpy", *_installed()),
        "unit": "queries/s",
        "shape": {"keys": keys, "queries": queries, "width": WIDTH, "k": K, "clusters": clusters, "threads": _threads()},
        "value": float(np.median(rates["exact"])),
        "peer": rival,
        "peer_value": float(np.median(rates[rival])),
        "ratio": ratio("exact", rival),
        "searches": {
            name: {"queries_per_s": float(np.median(rates[name])), "against_ours": ratio(like[name], name)} | more[name]
            for name in searches
        },
        "runs": [[round(a, 1), round(b, 1)] for a, b in zip(rates["exact"], rates[rival], strict=True)],
    }


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the exact neighbours that were found. Both int [Q, k]."""
    return float(np.mean((found[:, :, None] == exact[:, None]).any(1)))


def _vectors(keys: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors in groups, as embeddings of images are: float32 [keys, WIDTH] and [queries, WIDTH]."""
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(_GROUPS, WIDTH))
    x = groups[rng.integers(_GROUPS, size=keys + queries)] + _SPREAD * rng.normal(size=(keys + queries, WIDTH))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return x[:keys], x[keys:]


def _ours(x: np.ndarray, q: np.ndarray, clusters: int) -> dict:
    """Return our searches: name -> (search, what gives the indices of its result, facts)."""
    keys = jax.device_put(x, everywhere())
    indices = lambda found: np.asarray(found.indices)  # noqa: E731
    build = lambda: jax.block_until_ready(build_inverted_file(keys, clusters=clusters))  # noqa: E731
    build()
    begin = time.perf_counter()
    file = build()
    spent = time.perf_counter() - begin

    def with_probes(probes: int):
        search = by_rows(lambda rows, file: search_inverted_file(file, rows, K, probes=probes))
        return lambda: jax.block_until_ready(search(q, file)), indices

    search = by_rows(lambda rows, keys: nearest_neighbours(rows, keys, K))
    return {
        "exact": (lambda: jax.block_until_ready(search(q, keys)), indices, {}),
        "approximate": (None, None, {"search": with_probes, "build_s": spent}),
    }


def _peers(x: np.ndarray, q: np.ndarray, clusters: int, peer: str) -> dict:
    """Return the searches of the peers that are installed, as `_ours` does. Raises UserError if `peer` is not."""
    out = {}
    try:
        from sklearn.neighbors import NearestNeighbors

        model = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(x)
        out["scikit-learn"] = (lambda: model.kneighbors(q), lambda found: found[1], {})
    except ImportError:
        _missing("scikit-learn", peer)
    try:
        import faiss
    except ImportError:
        _missing("faiss-cpu", peer)
        return out
    faiss.omp_set_num_threads(_threads())
    flat = faiss.IndexFlatL2(WIDTH)
    flat.add(x)
    begin = time.perf_counter()
    lists = faiss.IndexIVFFlat(faiss.IndexFlatL2(WIDTH), WIDTH, clusters)
    lists.train(x)
    lists.add(x)
    spent = time.perf_counter() - begin

    def with_probes(probes: int):
        def search():
            lists.nprobe = probes
            return lists.search(q, K)

        return search, lambda found: found[1]

    return out | {
        "faiss-cpu exact": (lambda: flat.search(q, K), lambda found: found[1], {}),
        "faiss-cpu approximate": (None, None, {"search": with_probes, "build_s": spent}),
    }


def _missing(name: str, peer: str) -> None:
    from rmft_jax.progress import say

    if name == peer:
        raise UserError(f"bench knn needs {name}: pip install 'rmft-jax[bench]'")
    say(f"{name} is not installed and not measured: pip install 'rmft-jax[bench]'")


def _installed() -> list[str]:
    import importlib.metadata

    there = []
    for name in ("scikit-learn", "faiss-cpu"):
        try:
            importlib.metadata.version(name)
            there.append(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return there


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
