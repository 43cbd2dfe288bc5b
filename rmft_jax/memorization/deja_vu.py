"""What a vision-language model knows of its training images beyond their captions, against a model that did not see them.

Source: Jayaraman et al. 2024, arXiv 2402.02103, section 3. The definitions are in `kernels.deja_vu`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rmft_jax.devices import by_rows, everywhere
from rmft_jax.errors import UserError
from rmft_jax.files import read_arrays, write_json
from rmft_jax.kernels import (
    Scores,
    aucg,
    build_inverted_file,
    nearest_neighbours,
    neighbour_objects,
    object_scores,
    population_gap,
    recall_survival,
    sample_gaps,
    search_inverted_file,
)
from rmft_jax.memorization.rates import percentile_interval, resample

SCHEMA = 1
SHARES = (0.001, 0.01, 0.1)  # of the records, in the sample-level test
_BINS = 100  # of the published form of AUCG
_DRAWS = 1000
_AT_ONCE = 20_000  # records: their tables of objects fill memory


class Prediction(NamedTuple):
    """What a model predicts for records: Scores, numpy [N], and distances of their nearest neighbours, float32 [N]."""

    scores: Scores
    distance: np.ndarray


def predict(
    queries: np.ndarray, public: np.ndarray, objects: np.ndarray, public_objects: np.ndarray, *,
    k: int = 10, clusters: int = 0, probes: int = 16,
) -> Prediction:  # fmt: skip
    """Predict the objects of records from the k public items nearest to their captions, by cosine.

    queries: float [N, D], embeddings of captions. public: float [P, D], of public images, or of public captions when the
      model is a text encoder. objects: bool [N, C]; public_objects: bool [P, C].
    clusters: 0 for exact search; else the search is approximate, with `probes` cells visited.
    """
    public, public_objects = jax.device_put(
        (np.asarray(public, np.float32), np.asarray(public_objects, bool)), everywhere()
    )
    if clusters:
        public = build_inverted_file(public, clusters=clusters, metric="cosine")
    search, found = _search(k, probes if clusters else 0), []
    for begin in range(0, len(queries), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        near = search(np.asarray(queries[part], np.float32), public)
        scores = object_scores(np.asarray(objects[part], bool), neighbour_objects(public_objects, near.indices))
        found.append(jax.device_get((scores, near.distances[:, 0])))
    scores, distances = zip(*found, strict=True)
    return Prediction(Scores(*map(np.concatenate, zip(*scores, strict=True))), np.concatenate(distances))


@functools.cache
def _search(k: int, probes: int) -> Callable:
    """Return the search in an inverted file or, without probes, in all keys; one program for all calls."""
    if probes:
        return by_rows(lambda rows, file: search_inverted_file(file, rows, k, probes=probes, metric="cosine"))
    return by_rows(lambda rows, keys: nearest_neighbours(rows, keys, k, metric="cosine"))


def population_gaps(target: Prediction, reference: Prediction, where: np.ndarray) -> dict[str, float]:
    """Return ppg, prg, aucg, and what the last two rest on: recall and precision of both. where: bool [N]."""
    a, b = target.scores, reference.scores
    gaps = {
        "ppg": population_gap(a.precision, b.precision, where),
        "prg": population_gap(a.recall, b.recall, where),
        "aucg": aucg(a.recall, b.recall, where),
        "aucg_100": aucg(a.recall, b.recall, where, bins=_BINS),
    }
    means = {
        f"{field}_{name}": getattr(scores, field)[where].mean()
        for name, scores in (("target", a), ("reference", b))
        for field in ("precision", "recall")
    }
    return {key: float(value) for key, value in (gaps | means).items()}


def gap_intervals(target: Prediction, reference: Prediction, where: np.ndarray) -> dict[str, list]:
    """Return 95% intervals of ppg, prg and aucg over records drawn anew."""
    a, b = target.scores, reference.scores
    gaps = np.stack([np.sign(a.precision - b.precision), np.sign(a.recall - b.recall), a.recall - b.recall])[:, where]
    draws = resample([gaps.shape[1]], _DRAWS, 0) @ gaps.T / gaps.shape[1]
    return {name: percentile_interval(draws[:, n], 0.95) for n, name in enumerate(("ppg", "prg", "aucg"))}


def sample_level(target: Prediction, reference: Prediction, where: np.ndarray) -> dict[str, dict]:
    """Return the mean gaps of the records that come first: order -> share of SHARES -> precision, recall, f, records.

    Orders: distance (nearest neighbour first), correct (most correct predictions first), gap (the largest gap of the
    respective score first, which finds the best of noise too).
    """
    a, b = target.scores, reference.scores
    count, out = int(where.sum()), {}
    for order in ("distance", "correct", "gap"):
        out[order] = {}
        for share in SHARES:
            first = max(1, round(share * count))
            gaps = {}
            for field in ("precision", "recall", "f"):
                x, y = getattr(a, field), getattr(b, field)
                by = {"distance": target.distance, "correct": -a.correct.astype(np.float32), "gap": y - x}[order]
                gaps[field] = float(sample_gaps(by, x, y, where, first))
            out[order][f"{100 * share:g}%"] = gaps | {"records": first}
    return out


def survival_curve(prediction: Prediction, where: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the share of records with a recall above each of `at`, float32 [T]."""
    return np.asarray(recall_survival(prediction.scores.recall, where, at))


def retrieval_recall(texts: np.ndarray, images: np.ndarray, at: tuple[int, ...]) -> dict[str, float]:
    """Return the share of captions whose own image is among the nearest k of all, for each k: what the model is good for.

    texts, images: float [N, D], row n of one belongs to row n of the other.
    """
    ranks = np.asarray(nearest_neighbours(texts, images, max(at), metric="cosine").indices)
    hit = ranks == np.arange(len(texts))[:, None]
    return {f"recall@{k}": float(hit[:, :k].any(1).mean()) for k in at}


def audit_vlm(path: Path, out: Path | None = None, *, k: int = 10, clusters: int = 0, probes: int = 16) -> dict:
    """Test embeddings that somebody exported for deja vu memorization; write the result as JSON and return it.

    path: an .npz file with target_texts [N, D], embeddings of the captions of training records; target_images [P, D], of
      public images; objects [N, C] and public_objects [P, C], 0 or 1. For the test with two models also reference_texts
      [N, E] and reference_images [P, E], of a model that was not trained on the records; for that with one model also
      encoder_texts [N, F] and encoder_public_texts [P, F], captions of both sets under any text encoder.
    out: where to write, by default beside `path` as NAME.deja_vu.json. k: neighbours. clusters, probes: see `predict`.
    Raises UserError when an array is missing or does not fit the others.
    """
    arrays = read_arrays(path, "embeddings", "name an .npz file, see docs/deja_vu.md for what it holds")
    _check(arrays, path, k, clusters)
    objects, public = (arrays[name].astype(bool) for name in ("objects", "public_objects"))
    where, search = objects.any(1), {"k": k, "clusters": clusters, "probes": probes}
    test = lambda of, items: predict(arrays[of], arrays[items], objects, public, **search)  # noqa: E731
    target, tests = test("target_texts", "target_images"), {}
    for name, of, items in (
        ("two_models", "reference_texts", "reference_images"),
        ("one_model", "encoder_texts", "encoder_public_texts"),
    ):
        if of in arrays:
            reference = test(of, items)
            tests[name] = {
                "population": population_gaps(target, reference, where),
                "intervals": gap_intervals(target, reference, where),
                "samples": sample_level(target, reference, where),
            }
    result = {
        "schema": SCHEMA,
        "records": int(where.sum()),
        "without_objects": int((~where).sum()),
        "public": len(public),
        "objects": objects.shape[1],
        "search": search,
        "tests": tests,
    }
    write_json(out or path.with_suffix(".deja_vu.json"), result)
    return result


def _check(arrays: dict[str, np.ndarray], path: Path, k: int, clusters: int) -> None:
    pairs = (("target_texts", "target_images"), ("reference_texts", "reference_images"),
             ("encoder_texts", "encoder_public_texts"), ("objects", "public_objects"))  # fmt: skip
    for pair in (pairs[0], pairs[3]):
        for name in pair:
            if name not in arrays:
                raise UserError(f"{path} has no {name}, only {', '.join(sorted(arrays)) or 'nothing'}: add it")
    if not {"reference_texts", "encoder_texts"} & set(arrays):
        raise UserError(f"{path} has neither reference_texts nor encoder_texts: add one, there is nothing to compare with")
    records, items = len(arrays["target_texts"]), len(arrays["target_images"])
    for pair in pairs:
        if len(there := [name for name in pair if name in arrays]) == 1:
            raise UserError(f"{path} has {there[0]} without {(set(pair) - set(there)).pop()}: add it, or leave both out")
        for name, count in zip(pair, (records, items), strict=True) if there else ():
            found = arrays[name]
            if found.ndim != 2 or len(found) != count:
                raise UserError(f"{name} in {path} has the shape {found.shape}: it must have two axes, {count:,} rows")
            if found.dtype.kind not in "fiub" or not np.isfinite(found).all():
                raise UserError(f"{name} in {path} holds something else than finite numbers: export it again")
        if there and arrays[pair[0]].shape[1] != arrays[pair[1]].shape[1]:
            widths = " and ".join(str(arrays[name].shape[1]) for name in pair)
            raise UserError(f"{pair[0]} and {pair[1]} in {path} have {widths} columns: they must have as many")
    if not 1 <= k <= items:
        raise UserError(f"k is {k}: choose a number from 1 to that of the public images in {path}, {items}")
    if not 0 <= clusters <= items:
        raise UserError(f"clusters are {clusters}: choose a number from 0 to that of the public images in {path}, {items}")
    if not arrays["objects"].any():
        raise UserError(f"objects in {path} are all 0: no record has an object to predict")
