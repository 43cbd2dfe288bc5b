"""`rmft study early-learning`: models learn from right labels first and memorize wrong ones later, unless kept from it.

Source: Liu et al. 2020, arXiv 2007.00151. What it claims, and what of that was found here, is in `early_learning_claims`.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.images import load_images
from rmft_jax.errors import UserError
from rmft_jax.files import write_json
from rmft_jax.models.classifier import KINDS
from rmft_jax.studies.early_learning_claims import linear_claims, set_claims
from rmft_jax.studies.parts import curve, frame, over_seeds, part
from rmft_jax.study_config import LinearNoiseConfig, NoisyLabelsConfig
from rmft_jax.training.linear_noise import descend, noisy_clouds
from rmft_jax.training.noisy_labels import Member, train_on_wrong_labels, wrong_labels

METHODS = ("ce", "elr", "elr_plus", "kl")
_CURVES = {
    "test": ("Test accuracy", "of true labels"),
    "clean": ("Right labels", "training images with a right label that are classified so"),
    "wrong_true": ("Wrong labels, seen through", "training images with a wrong label that are classified truly"),
    "wrong_given": ("Wrong labels, memorized", "training images with a wrong label that are classified as labelled"),
}
_POINTS = 60  # of a curve of the linear model


def run(config: Config, *, command: str = "rmft study early-learning") -> dict:
    """Run the linear model and each set of `config.study.early_learning`, write `out`/results.json and return its content.

    The same call goes on where an earlier one was interrupted; results.json appears after the first part.
    Raises UserError, before anything is trained, when the settings break a rule or images cannot be read.
    """
    study, out = config.study.early_learning, Path(config.out)
    seeds = range(config.seed, config.seed + config.study.seeds)
    sets = {name: _checked(name, settings) for name, settings in study.sets.items()}
    todo = [("linear", None)] + [
        (name, plus) for name, settings in sets.items() for plus in (False, True) if _arms(settings, plus)
    ]
    findings: dict = {}
    for number, (name, plus) in enumerate(todo, 1):
        title = f"study early-learning: part {number} of {len(todo)}, {name}{' with ELR+' if plus else ''}"
        if name == "linear":
            settings = dataclasses.asdict(study.linear) | {"seeds": list(seeds)}
            made = part(out / "parts" / "linear.json", settings, lambda: _linear(study.linear, seeds), title)
        else:
            settings = dataclasses.asdict(sets[name]) | {"seeds": list(seeds), "plus": plus}
            make = lambda: _train_set(name, sets[name], seeds, plus)  # noqa: B023, E731
            path = out / "parts" / f"{name}{'-plus' if plus else ''}.json"
            made = part(path, settings, make, title)
        if name in findings:  # ELR+ beside the other methods
            findings[name]["arms"] |= made["arms"]
            findings[name]["seconds"] += made["seconds"]
        else:
            findings[name] = made
        results = frame("early-learning", command, len(seeds), number, len(todo)) | _results(findings, sets)
        write_json(out / "results.json", results)
    return results


def _checked(name: str, settings: NoisyLabelsConfig) -> NoisyLabelsConfig:
    where = f"study.early_learning.sets.{name}"
    if name == "linear":
        raise UserError(f"{where}: linear is the name of the linear model, choose another one")
    if settings.model not in KINDS:
        raise UserError(f"{where}.model is {settings.model!r}: choose one of {', '.join(KINDS)}")
    if not settings.arms:
        raise UserError(f"{where}.arms is empty: see configs/studies/early_learning_cpu.yaml for some")
    if min(settings.epochs, settings.score_every, settings.batch_size) < 1 or settings.epochs % settings.score_every:
        raise UserError(f"{where}: epochs, score_every and batch_size are 1 or more, epochs a multiple of score_every")
    for arm, chosen in settings.arms.items():
        if chosen.method not in METHODS:
            raise UserError(f"{where}.arms.{arm}.method is {chosen.method!r}: choose one of {', '.join(METHODS)}")
        if chosen.noise not in ("symmetric", "asymmetric"):
            raise UserError(f"{where}.arms.{arm}.noise is {chosen.noise!r}: choose one of symmetric, asymmetric")
        if chosen.noise == "asymmetric" and not settings.flips:
            raise UserError(f"{where}.flips is empty: asymmetric noise needs it, such as {{7: 1, 3: 8}}")
        if not (0 <= chosen.share <= 1 and 0 <= chosen.beta < 1 and chosen.weight >= 0):
            raise UserError(f"{where}.arms.{arm}: share lies in [0, 1], beta in [0, 1), weight is 0 or more")
    images = _images(settings)
    if len(images.train) < settings.batch_size:
        raise UserError(f"{where} has {len(images.train)} images, fewer than its batch_size {settings.batch_size}")
    flips = _flips(settings, len(images.classes), where)
    return dataclasses.replace(settings, flips={str(before): after for before, after in flips.items()})  # as JSON has them


def _images(settings: NoisyLabelsConfig):
    return load_images(settings.images, settings.path, limit=settings.limit, test_limit=settings.test_limit)


def _flips(settings: NoisyLabelsConfig, classes: int, where: str = "") -> dict[int, int]:
    try:
        flips = {int(before): int(after) for before, after in settings.flips.items()}
    except (TypeError, ValueError):
        flips = {-1: -1}
    if any(not 0 <= number < classes for pair in flips.items() for number in pair):
        raise UserError(f"{where}.flips is {settings.flips}: give numbers of classes, from 0 to {classes - 1}")
    return flips


def _arms(settings: NoisyLabelsConfig, plus: bool) -> dict:
    return {name: arm for name, arm in settings.arms.items() if (arm.method == "elr_plus") == plus}


def _linear(settings: LinearNoiseConfig, seeds: range) -> dict:
    """Return of each seed what the theorem speaks of, and curves of all."""
    found, tracks = [], []
    for seed in seeds:
        data = noisy_clouds(settings, jax.random.key(seed))
        plain, kept = (jax.device_get(descend(settings, data, jnp.float32(weight))) for weight in (0, settings.weight))
        early = int(np.argmax(plain["along"] >= 0.1)) if (plain["along"] >= 0.1).any() else settings.steps - 1
        change = {
            name: float(plain[f"residual_{name}"][early] - plain[f"residual_{name}"][0]) for name in ("clean", "wrong")
        }
        found.append({
            "early_steps": early,
            "correlation": float(plain["correlation"][: max(1, early)].min()),
            "wrong_true_start": float(plain["wrong_true"][0]), "wrong_true_peak": float(plain["wrong_true"].max()),
            "clean_change": change["clean"], "wrong_change": change["wrong"],
            "memorized": float(plain["wrong_given"][-1]), "memorized_elr": float(kept["wrong_given"][-1]),
        })  # fmt: skip
        tracks.append({"cross entropy": plain["wrong_given"], "ELR": kept["wrong_given"]})
    steps = np.unique(np.geomspace(1, settings.steps, _POINTS).astype(int)) - 1
    curves = {name: curve(steps + 1, np.stack([track[name][steps] for track in tracks])) for name in tracks[0]}
    return {"seeds": found, "curves": curves}


def _train_set(name: str, settings: NoisyLabelsConfig, seeds: range, plus: bool) -> dict:
    """Train the arms of one set under every seed; return curves and end of each."""
    images, arms = _images(settings), _arms(settings, plus)
    classes = len(images.classes)
    pairs = list(itertools.product(arms.values(), seeds))
    noise = [
        wrong_labels(images.train_labels, arm.share, arm.noise, seed, classes=classes, flips=_flips(settings, classes))
        for arm, seed in pairs
    ]
    weight = lambda *methods: np.array([arm.weight * (arm.method in methods) for arm, _ in pairs], np.float32)  # noqa: E731
    members = Member(
        seed=np.array([seed for _, seed in pairs], np.int32), elr=weight("elr", "elr_plus"), kl=weight("kl"),
        beta=np.array([arm.beta for arm, _ in pairs], np.float32), given=np.stack(noise),
    )  # fmt: skip
    found = train_on_wrong_labels(settings, images, members, plus=plus, title=name)
    epochs = np.arange(1, found["test"].shape[1] + 1) * settings.score_every
    out = {}
    for number, (arm, chosen) in enumerate(arms.items()):
        of = slice(number * len(seeds), (number + 1) * len(seeds))
        wrong, suspects = members.given[of] != images.train_labels, found["suspects"][of]
        out[arm] = {
            "settings": dataclasses.asdict(chosen),
            "final": over_seeds(found["test"][of, -1]),
            "best": over_seeds(found["test"][of].max(1)),
            "wrong_true_best": over_seeds(found["wrong_true"][of].max(1)),
            "memorized": over_seeds(found["wrong_given"][of, -1]),
            "found": over_seeds((wrong & suspects).sum(1) / np.maximum(wrong.sum(1), 1)),
            "found_precision": over_seeds((wrong & suspects).sum(1) / np.maximum(suspects.sum(1), 1)),
            "curves": {key: curve(epochs, found[key][of]) for key in _CURVES},
        }
    return {"images": settings.images, "model": settings.model, "train": len(images.train), "arms": out}


_COLUMNS = (
    ("final", "test accuracy at the end"), ("best", "at its best"), ("memorized", "wrong labels memorized"),
    ("found", "wrong labels found by the target"), ("found_precision", "precision of that"),
)  # fmt: skip


def _results(findings: dict, sets: dict) -> dict:
    """Return findings, tables and charts for the report, and claims."""
    claims, tables, charts = linear_claims(findings["linear"]["seeds"]), [], []
    charts.append({
        "key": "linear", "heading": "Linear model", "note": "wrong labels memorized", "x_label": "step (log scale)",
        "log_x": True, "lines": findings["linear"]["curves"],
    })  # fmt: skip
    for name in sets:
        if name not in findings:
            continue
        found = findings[name]
        claims += set_claims(name, found)
        tables.append({
            "key": name, "title": f"{name}: {found['train']:,} images, {found['model']}",
            "note": "Mean over seeds and their range.", "columns": [title for _, title in _COLUMNS],
            "rows": [[arm, *(result[key] for key, _ in _COLUMNS)] for arm, result in found["arms"].items()],
        })  # fmt: skip
        for key, (heading, note) in _CURVES.items():
            lines = {arm: result["curves"][key] for arm, result in found["arms"].items()}
            charts.append({"key": f"{name}-{key}", "heading": f"{heading}, {name}", "note": note, "x_label": "epoch",
                           "log_x": False, "lines": lines})  # fmt: skip
    return {"tables": tables, "charts": charts, "findings": findings, "claims": claims}
