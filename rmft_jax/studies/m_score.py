"""`rmft study m-score`: which images a generative model memorizes, by training it with and without each of them.

Source: van den Burg & Williams 2021, arXiv 2106.03216. The same score of texts is in `m_score_text`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path

import numpy as np

from rmft_jax.config import Config, to_dict
from rmft_jax.data.images import Images, load_images
from rmft_jax.errors import UserError
from rmft_jax.files import write_json
from rmft_jax.kernels import logmeanexp, m_score
from rmft_jax.models.vae import KINDS
from rmft_jax.studies.claims import claim
from rmft_jax.studies.m_score_text import arm_configs, text_results, train_arm
from rmft_jax.studies.parts import bootstrap, check_epochs, frame, part, rank_correlation, size_interval
from rmft_jax.study_config import FoldedImagesConfig
from rmft_jax.training.folds import fold_rows, train_folds

SOURCE = "arXiv 2106.03216"
EXPECTED = "expected at this scale"
_DRAWS = 1000
_QUANTILES = {"q95": 0.95, "q999": 0.999}


def run(config: Config, *, command: str = "rmft study m-score") -> dict:
    """Run every set of `config.study.m_score`, write `out`/results.json and return its content.

    The same call goes on where an earlier one was interrupted; results.json appears after the first part.
    Raises UserError, before anything is trained, when the settings break a rule or images cannot be read.
    """
    sets, out = config.study.m_score.sets, Path(config.out)
    arms = arm_configs(config)
    if not sets and not arms:
        raise UserError("study.m_score has neither sets nor text.arms: see configs/studies/m_score_cpu.yaml for some")
    images = {name: _checked(name, settings) for name, settings in sets.items()}
    todo = [(name, rate) for name, settings in sets.items() for rate in settings.learning_rates] + [
        (arm, None) for arm in arms
    ]
    findings, texts = {}, {}
    for number, (name, rate) in enumerate(todo, 1):
        title = f"study m-score: part {number} of {len(todo)}, {name}"
        if rate is None:
            settings = to_dict(arms[name]) | {"folds": dataclasses.asdict(config.study.m_score.text) | {"arms": {}}}
            make = lambda: train_arm(config, arms[name], f"text {name}")  # noqa: B023, E731
            texts[name] = part(out / "parts" / f"text-{name}.json", settings, make, title)
        else:
            settings = dataclasses.asdict(sets[name]) | {"seed": config.seed, "rate": rate}
            make = lambda: _train(name, sets[name], images[name], rate, config.seed)  # noqa: B023, E731
            path = out / "parts" / f"{name}-{rate:g}.json"
            findings.setdefault(name, {})[f"{rate:g}"] = part(path, settings, make, f"{title} at learning rate {rate:g}")
        results = frame("m-score", command, 1, number, len(todo)) | _results(findings, sets, images)
        if texts:
            more = text_results(texts)
            results |= {key: [*results[key], *more[key]] for key in ("tables", "charts", "claims")}
            results["findings"] = findings | {"text": texts}
        write_json(out / "results.json", results)
    return results


def _checked(name: str, settings: FoldedImagesConfig) -> Images:
    where = f"study.m_score.sets.{name}"
    if settings.model not in KINDS:
        raise UserError(f"{where}.model is {settings.model!r}: choose one of {', '.join(KINDS)}")
    if settings.folds < 2 or min(settings.repetitions, settings.batch_size, settings.latent) < 1:
        raise UserError(f"{where}: folds are 2 or more; repetitions, batch_size and latent 1 or more")
    check_epochs(settings.score_at, where)
    if settings.samples < 1 or settings.samples % min(settings.samples, 16):
        raise UserError(f"{where}.samples is {settings.samples}: use a multiple of 16")
    if not settings.learning_rates or min(settings.learning_rates) <= 0:
        raise UserError(f"{where}.learning_rates is {list(settings.learning_rates)}: give one or more, above 0")
    found = load_images(settings.images, settings.path, limit=settings.limit)
    kept = len(found.train) // settings.folds * (settings.folds - 1)
    if kept < settings.batch_size:
        raise UserError(f"{where}: {kept} images to train on do not fill a batch of {settings.batch_size}")
    side = 2 ** len(settings.widths)
    if settings.model == "conv" and any(length % side for length in found.train.shape[1:3]):
        raise UserError(
            f"{where}.widths: {len(settings.widths)} layers halve the image, whose sides are not multiples of {side}"
        )
    return found


def binarised(images: np.ndarray, seed: int) -> np.ndarray:
    """Return zeros and ones, float32, drawn once with each pixel's value as the probability of one."""
    return np.random.default_rng([seed, 11]).binomial(1, images).astype(np.float32)


def _train(name: str, settings: FoldedImagesConfig, images: Images, rate: float, seed: int) -> dict:
    """Train the runs of one learning rate; return of each point in time M, U and V of each image, and the neighbour test."""
    rows, trained = fold_rows(len(images.train), settings.folds, settings.repetitions, seed)
    x = images.train[: trained.shape[1]]
    x = binarised(x, seed) if settings.model == "mlp" else x
    runs = len(rows)
    rates, title = np.full(runs, rate), f"{name} at {rate:g}"
    found = train_folds(settings, x, rows, np.arange(seed, seed + runs), rates, title=title)
    of_time = [
        {"epoch": epoch, "m": np.asarray(m_score(scores, trained)), "u": np.asarray(logmeanexp(scores, where=trained)),
         "v": np.asarray(logmeanexp(scores, where=~trained)), "held_out": scores[~trained].mean(),
         "seen": scores[trained].mean()}
        for epoch, scores in zip(settings.score_at, found.log_likelihood, strict=True)
    ]  # fmt: skip
    plain = lambda value: np.round(np.asarray(value, float), 4).tolist()  # noqa: E731
    out = {"scores": [{key: plain(value) for key, value in scores.items()} for scores in of_time]}
    if settings.neighbours:
        out["rho"] = plain(neighbour_ratio(x, trained, found.images))
    return out


def neighbour_ratio(images: np.ndarray, trained_on: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return rho of each image, float [N], the mean over the runs that trained on it.

    rho is the distance to the nearest image that the run held out, divided by that to the nearest of equally many of its
    samples: above 1, the model makes images nearer than chance.

    images: [N, ...]; trained_on: bool [R, N]; samples: [R, S, ...], in the study mean images of latents drawn from the
      prior, as in the authors' program, whose distances are right for the first image of each block of 256 only.
    Source: section 3.3.
    """
    from sklearn.neighbors import NearestNeighbors

    flat, total = images.reshape(len(images), -1), np.zeros(len(images))
    for trained, drawn in zip(trained_on, samples, strict=True):
        others, own = flat[~trained], flat[trained]
        nearest = [
            NearestNeighbors(n_neighbors=1, algorithm="brute").fit(group).kneighbors(own)[0][:, 0]
            for group in (others, drawn.reshape(len(drawn), -1)[: len(others)])
        ]
        total[trained] += nearest[0] / np.maximum(nearest[1], 1e-6)
    return total / trained_on.sum(0)


def _quantiles(scores: list[dict]) -> dict:
    """Return of each of _QUANTILES and the median, at each point in time, the value and bootstrap draws over images."""
    m = np.array([of_time["m"] for of_time in scores])
    rng, names = np.random.default_rng(0), {"median": 0.5} | _QUANTILES
    draws = np.stack([np.quantile(m[:, rng.integers(m.shape[1], size=m.shape[1])], list(names.values()), axis=1)
                      for _ in range(_DRAWS)])  # fmt: skip
    values = np.quantile(m, list(names.values()), axis=1)
    return {name: (values[n], draws[:, n]) for n, name in enumerate(names)}


def _interval(draws: np.ndarray) -> list[float]:
    return [float(end) for end in np.percentile(draws, [2.5, 97.5])]


def _results(findings: dict, sets: dict, images: dict) -> dict:
    claims, tables, charts, galleries = [], [], [], []
    for name, by_rate in findings.items():
        quantiles = {rate: _quantiles(found["scores"]) for rate, found in by_rate.items()}
        epochs = sets[name].score_at
        claims += _claims(name, by_rate, quantiles, epochs)
        rows = []
        for rate, values in quantiles.items():
            for n, epoch in enumerate(epochs):
                held = by_rate[rate]["scores"][n]
                rows.append([
                    f"lr {rate}, epoch {epoch}",
                    *({"mean": float(value[n]), "mean_ci": _interval(draws[:, n])} for value, draws in values.values()),
                    *({"mean": held[key], "mean_ci": None} for key in ("held_out", "seen")),
                ])  # fmt: skip
        tables.append({
            "key": name, "title": f"{name}: memorization score, nats", "rows": rows,
            "columns": ["median", "0.95 quantile", "0.999 quantile", "log p(x) held out", "log p(x) trained on"],
            "note": f"{len(by_rate[rate]['scores'][0]['m']):,} images, {sets[name].folds} folds x {sets[name].repetitions} "
                    "repetitions; intervals by bootstrap over images.",
        })  # fmt: skip
        for key, heading in (("q95", "0.95 quantile of M"), ("q999", "0.999 quantile of M")):
            lines = {}
            for rate, values in quantiles.items():
                value, draws = values[key]
                low, high = np.percentile(draws, [2.5, 97.5], axis=0)
                lines[f"lr {rate}"] = {
                    "x": list(map(float, epochs)),
                    "mean": value.tolist(),
                    "low": low.tolist(),
                    "high": high.tolist(),
                }
            charts.append({"key": f"{name}-{key}", "heading": f"{heading}, {name}", "note": "nats", "x_label": "epoch",
                           "log_x": False, "lines": lines})  # fmt: skip
        rate, found = next(iter(by_rate.items()))
        galleries.append(_gallery(name, rate, found["scores"][-1], images[name].train, sets[name].gallery))
    return {"tables": tables, "charts": charts, "images": galleries, "findings": findings, "claims": claims}


def _gallery(name: str, rate: str, last: dict, images: np.ndarray, count: int) -> dict:
    """Return the images of highest M, as they are in the set."""
    top = np.argsort(last["m"])[::-1][:count]
    shown = [{"title": f"M {last['m'][n]:.1f}, V {last['v'][n]:.0f}", "png": _png(images[n])} for n in top]
    note = f"After the last epoch at learning rate {rate}; V is the log likelihood under models that did not train on it."
    return {"title": f"{name}: most memorized", "note": note, "images": shown}


def _png(image: np.ndarray) -> str:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("pictures in reports need Pillow: pip install 'rmft-jax[studies]'") from None
    file, pixels = io.BytesIO(), np.round(255 * image).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _claims(name: str, by_rate: dict, quantiles: dict, epochs: tuple) -> list[dict]:
    """Return what section 4 of the paper claims, of the highest learning rate where nothing else is said."""
    rates = sorted(by_rate, key=float, reverse=True)
    top, found = quantiles[rates[0]], by_rate[rates[0]]
    out = []

    def ratio(id, statement, bound, above, below):
        value = float(above[0] / below[0]) if below[0] > 0 else None
        ends = _interval(above[1] / np.maximum(below[1], 1e-9)) if value is not None else None
        out.append(claim(f"{name}-{id}", EXPECTED, f"{name}: {statement}", bound, value, ends, at_least=bound))

    at = lambda entry, n: (entry[0][n], entry[1][:, n])  # noqa: E731
    if len(epochs) > 1:
        for key, words, bound in (("q95", "0.95", 2), ("q999", "0.999", 3)):
            ratio(f"{key}-grows", f"{words} quantile of M at epoch {epochs[-1]} over that at {epochs[0]}", bound,
                  at(top[key], -1), at(top[key], 0))  # fmt: skip
    if len(rates) > 1:
        ratio("rate", f"0.95 quantile of M at learning rate {rates[0]} over that at {rates[-1]}", 2,
              at(top["q95"], -1), at(quantiles[rates[-1]]["q95"], -1))  # fmt: skip
    for rate in rates:
        value, draws = at(quantiles[rate]["median"], -1)
        statement = f"{name}: median of M, learning rate {rate}"
        out.append(claim(f"{name}-median-{rate}", EXPECTED, statement, 0, float(value), _interval(draws), at_least=0))
    last = found["scores"][-1]
    m, likely = np.array(last["m"]), np.array(last["v"])

    def unlikely(pick):
        high = m[pick] >= np.quantile(m[pick], 0.95)
        return np.mean(likely[pick][high] <= np.quantile(likely[pick], 0.2))

    statement = f"{name}: share of the highly memorized among the least likely fifth of images"
    out.append(claim(f"{name}-unlikely", SOURCE, statement, 0.2, *bootstrap(unlikely, len(m)), at_least=0.2))
    if "rho" in found:
        rho = np.array(found["rho"])
        size = size_interval(*bootstrap(lambda pick: rank_correlation(m[pick], rho[pick]), len(m)))
        statement = f"{name}: size of the rank correlation of M and the neighbour test"
        out.append(claim(f"{name}-neighbours", SOURCE, statement, 0.2, *size, at_most=0.2))
    return out
