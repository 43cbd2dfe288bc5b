"""`rmft study deja-vu`: which objects of training images a dual encoder remembers from their captions, and what prevents it.

Source: Jayaraman et al. 2024, arXiv 2402.02103.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from rmft_jax.config import Config, ModelConfig, model_rules
from rmft_jax.data.captions import CaptionedImages, load_captions, tokenize_captions
from rmft_jax.errors import UserError
from rmft_jax.files import write_json
from rmft_jax.memorization.deja_vu import (
    population_gaps,
    predict,
    retrieval_recall,
    sample_level,
    survival_curve,
)
from rmft_jax.models.dual_encoder import KINDS
from rmft_jax.progress import say
from rmft_jax.studies.parts import claim_over_seeds, curve, frame, over_seeds, part
from rmft_jax.study_config import CaptionedSetConfig
from rmft_jax.training.dual_encoders import train_dual_encoders

SOURCE = "arXiv 2402.02103"
EXPECTED = "expected at this scale"
_AT = np.linspace(0, 0.95, 20)  # thresholds of the survival curves
_GAPS = {"ppg": "PPG", "prg": "PRG", "aucg": "AUCG"}
REPLACEMENTS = ("placeholder", "surrogate")


def run(config: Config, *, command: str = "rmft study deja-vu") -> dict:
    """Train and test every set of `config.study.deja_vu` under every seed, write `out`/results.json, return its content.

    The same call goes on where an earlier one was interrupted; results.json appears after the first part.
    Raises UserError, before anything is trained, when the settings break a rule or images cannot be read.
    """
    sets, out = {name: one for name, one in config.study.deja_vu.sets.items() if _is_there(name, one)}, Path(config.out)
    if not sets:
        raise UserError("study.deja_vu.sets is empty: see configs/studies/deja_vu_cpu.yaml for some")
    data = {name: _checked(name, settings, config.seed) for name, settings in sets.items()}
    seeds = range(config.seed, config.seed + config.study.seeds)
    todo = [(name, seed) for name in sets for seed in seeds]
    findings: dict = {}
    for number, (name, seed) in enumerate(todo, 1):
        title = f"study deja-vu: part {number} of {len(todo)}, {name}, seed {seed}"
        settings = dataclasses.asdict(sets[name]) | {"seed": seed, "data_seed": config.seed}
        settings.pop("optional")
        make = lambda: _train(sets[name], data[name], seed, f"{name}, seed {seed}")  # noqa: B023, E731
        findings.setdefault(name, []).append(part(out / "parts" / f"{name}-{seed}.json", settings, make, title))
        results = frame("deja-vu", command, len(seeds), number, len(todo)) | _results(findings, sets)
        write_json(out / "results.json", results)
    return results


def _is_there(name: str, settings: CaptionedSetConfig) -> bool:
    """Return whether a set can be run; of one that is optional, say which file it lacks."""
    if not settings.optional or Path(settings.path).exists():
        return True
    say(f"study deja-vu: without the set {name}, as {settings.path} is not there")
    return False


def _checked(name: str, settings: CaptionedSetConfig, seed: int) -> CaptionedImages:
    """Return the records of a set whose settings keep all rules."""
    where, encoder = f"study.deja_vu.sets.{name}", settings.encoder
    if encoder.image not in KINDS:
        raise UserError(f"{where}.encoder.image is {encoder.image!r}: choose one of {', '.join(KINDS)}")
    if not settings.arms:
        raise UserError(f"{where}.arms is empty: see configs/studies/deja_vu_cpu.yaml for some")
    for arm, chosen in settings.arms.items():
        if chosen.replacement not in REPLACEMENTS:
            raise UserError(f"{where}.arms.{arm}.replacement is {chosen.replacement!r}: choose one of "
                            f"{', '.join(REPLACEMENTS)}")  # fmt: skip
        if not (0 <= chosen.masking <= 1 and chosen.max_scale > 0 and chosen.weight_decay >= 0):
            raise UserError(f"{where}.arms.{arm}: masking lies in [0, 1], max_scale above 0, weight_decay is 0 or more")
    for rule in model_rules(ModelConfig(layers=encoder.layers, width=encoder.width, heads=encoder.heads)):
        raise UserError(f"{where}.encoder, as a GPT: {rule}")
    positive = ("train", "public", "heldout", "epochs", "batch_size", "neighbours")
    if min(getattr(settings, key) for key in positive) < 1 or settings.caption_tokens < 2 or settings.learning_rate <= 0:
        raise UserError(f"{where}: {', '.join(positive)} are 1 or more, caption_tokens 2 or more, learning_rate above 0")
    if settings.batch_size > settings.train or settings.neighbours > settings.public:
        raise UserError(f"{where}: batch_size is at most train, {settings.train}, neighbours at most public, "
                        f"{settings.public}")  # fmt: skip
    at, most = settings.recall_at, settings.heldout
    if not at or not 1 <= min(at) <= max(at) <= most:
        raise UserError(f"{where}.recall_at is {list(at)}: give numbers from 1 to heldout, {most}")
    if any(not 1 <= epoch <= settings.epochs for epoch in settings.score_at):
        raise UserError(f"{where}.score_at is {list(settings.score_at)}: give epochs from 1 to {settings.epochs}")
    needed = 2 * settings.train + settings.public + settings.heldout
    limit = settings.limit or (needed if settings.images == "glyphs" else 0)
    found = load_captions(settings.images, settings.path, limit=limit, side=settings.side, seed=seed)
    if len(found.captions) < needed:
        raise UserError(f"{where} has {len(found.captions):,} records, but 2 train + public + heldout are {needed:,}: "
                        f"lower them")  # fmt: skip
    sides, patch = found.images.shape[1:3], encoder.patch
    if encoder.image == "vit" and (patch < 1 or any(side % patch for side in sides)):
        raise UserError(f"{where}.encoder.patch is {patch}: choose a number that divides {sides[0]} and {sides[1]}")
    return found


def _train(settings: CaptionedSetConfig, data: CaptionedImages, seed: int, title: str) -> dict:
    """Train target and reference of each arm side by side; return what is measured of each at each epoch."""
    tokens = tokenize_captions(data.captions, vocab_size=settings.vocab_size, length=settings.caption_tokens)
    n, p = settings.train, settings.public
    order = np.random.default_rng([seed, 3]).permutation(len(data.captions))
    a, b, public, heldout = np.split(order[: 2 * n + p + settings.heldout], [n, 2 * n, 2 * n + p])
    arms = list(settings.arms)
    rows = np.stack([a, b] * len(arms))
    both = [settings.arms[arm] for arm in arms for _ in range(2)]
    found: dict = {arm: {} for arm in arms}
    words = _bags(tokens.ids, tokens.vocab_size, public)
    by_words = [_predict(words, words, records, public, data, settings.neighbours) for records in (a, heldout)]
    for scored in train_dual_encoders(settings, data, tokens, rows, np.full(len(rows), seed), both, title=title):
        last = scored.epoch == settings.epochs
        for number, arm in enumerate(arms if last else arms[:1]):  # early stopping is that of the first arm
            pair = [(scored.texts[m], scored.images[m]) for m in (2 * number, 2 * number + 1)]
            found[arm][str(scored.epoch)] = _measure(settings, data, pair, (a, b, public, heldout), by_words, last=last)
    return {"arms": found, "records": {"train": n, "public": p, "heldout": len(heldout), "objects": len(data.names)}}


def _bags(ids: np.ndarray, vocab_size: int, public: np.ndarray) -> np.ndarray:
    """Return captions as bags of tokens weighed by how rare those are in the public captions, float32 [N, vocabulary].

    This is the text encoder of the test with one model: it knows no images, and nothing of the training set.
    """
    there = np.zeros((len(ids), vocab_size), np.float32)
    np.put_along_axis(there, ids, 1, axis=1)
    there[:, :4] = 0  # padding, end, mask, unknown
    return there * np.log((1 + len(public)) / (1 + there[public].sum(0)))


def _predict(texts, items, records, public, data: CaptionedImages, k: int):
    return predict(texts[records], items[public], data.objects[records], data.objects[public], k=k)


def _measure(settings, data, pair, splits, by_words, *, last: bool) -> dict:
    """Return the gaps of one pair of models, each of which is the target once and the reference once, and their use."""
    a, b, public, heldout = splits
    known = data.objects.any(1)
    of = lambda model, records: _predict(*pair[model], records, public, data, settings.neighbours)  # noqa: E731
    on_a, on_b = (of(0, a), of(1, a)), (of(1, b), of(0, b))
    gaps = [population_gaps(*found, known[rows]) for found, rows in ((on_a, a), (on_b, b))]
    on_heldout = of(0, heldout), of(1, heldout)
    recalls = [retrieval_recall(text[heldout], image[heldout], settings.recall_at) for text, image in pair]
    out = {
        "gaps": _mean(gaps), "gaps_on_a": gaps[0],
        "control": population_gaps(*on_heldout, known[heldout]),
        "same": population_gaps(on_a[0], of(0, a), known[a]),
        "utility": _mean(recalls),
    }  # fmt: skip
    if last:
        out["samples"] = sample_level(*on_a, known[a])
        out["one_model"] = population_gaps(on_a[0], by_words[0], known[a])
        out["one_model_control"] = population_gaps(on_heldout[0], by_words[1], known[heldout])
        out["survival"] = {
            name: survival_curve(found, known[a], _AT).tolist()
            for name, found in (("target", on_a[0]), ("reference", on_a[1]))
        }
    return out


def _mean(values: list[dict]) -> dict:
    return {key: float(np.mean([value[key] for value in values])) for key in values[0]}


def _results(findings: dict, sets: dict) -> dict:
    """Return findings, tables and charts for the report, and claims."""
    claims, tables, charts = [], [], []
    for name, seeds in findings.items():
        settings = sets[name]
        arms, end = list(settings.arms), str(settings.epochs)
        values = lambda arm, *path, epoch=end: [_at(found["arms"][arm][epoch], path) for found in seeds]  # noqa: B023, E731
        claims += _claims(name, settings, values)
        tables += _tables(name, settings, values, seeds[0]["records"])
        charts += _charts(name, settings, values, arms)
    return {"tables": tables, "charts": charts, "findings": findings, "claims": claims}


def _at(tree: dict, path: tuple):
    for key in path:
        tree = tree[key]
    return tree


def _tables(name: str, settings: CaptionedSetConfig, values, records: dict) -> list[dict]:
    use = [f"recall@{k}" for k in settings.recall_at]
    epochs = sorted({*settings.score_at, settings.epochs})
    plain = next(iter(settings.arms))
    rows = [
        [label, *(over_seeds(values(arm, "gaps", gap, epoch=epoch)) for gap in _GAPS),
         *(over_seeds(values(arm, "utility", key, epoch=epoch)) for key in use)]
        for label, arm, epoch in [(arm, arm, str(settings.epochs)) for arm in settings.arms]
        + [(f"{plain}, stopped at epoch {epoch}", plain, str(epoch)) for epoch in epochs[:-1]]
    ]  # fmt: skip
    note = (f"{records['train']:,} records each, {records['public']:,} public ones, {records['objects']} objects; mean over "
            f"seeds and their range. Each model is the target once and the reference once.")  # fmt: skip
    mitigation = {"key": f"{name}-mitigation", "title": f"{name}: memorization and use", "rows": rows, "note": note,
                  "columns": [*_GAPS.values(), *(f"held-out {key}" for key in use)]}  # fmt: skip
    tests = {"target and reference": "gaps_on_a", "pairs that none saw": "control", "one model, text encoder": "one_model",
             "the same, pairs that it did not see": "one_model_control", "target = reference": "same"}  # fmt: skip
    population = {
        "key": f"{name}-population", "title": f"{name}: population level, {plain}", "note": "After the last epoch.",
        "columns": [*_GAPS.values(), "AUCG, sum over 100 bins", "recall, target", "recall, reference"],
        "rows": [[label, *(over_seeds(values(plain, key, field)) for field in (*_GAPS, "aucg_100", "recall_target",
                                                                              "recall_reference"))]
                 for label, key in tests.items()],
    }  # fmt: skip
    samples = {
        "key": f"{name}-samples", "title": f"{name}: sample level, {plain}",
        "note": "Mean gap of the records that come first by the distance of the nearest neighbour, by the number of correct "
                "predictions, by the gap itself.",
        "columns": ["precision gap", "recall gap", "F gap"],
        "rows": [[f"{order}, first {share}", *(over_seeds(values(plain, "samples", order, share, field))
                                               for field in ("precision", "recall", "f"))]
                 for order, shares in values(plain, "samples")[0].items() for share in shares],
    }  # fmt: skip
    return [mitigation, population, samples]


def _charts(name: str, settings: CaptionedSetConfig, values, arms: list[str]) -> list[dict]:
    plain, key = arms[0], f"recall@{max(settings.recall_at)}"
    epochs = sorted({*settings.score_at, settings.epochs})
    ways = {"early stopping": [(plain, str(epoch)) for epoch in reversed(epochs)]} if len(epochs) > 1 else {}
    for arm, chosen in settings.arms.items():
        way = f"{'masked' if chosen.replacement == 'placeholder' else 'random'} tokens" if chosen.masking else arm
        ways.setdefault(way, [(plain, str(settings.epochs))] if arm != plain else [])
        ways[way].append((arm, str(settings.epochs)))
    lines = {}
    for way, points in ways.items():
        x = [np.mean(values(arm, "gaps", "aucg", epoch=epoch)) for arm, epoch in points]
        y = np.array([values(arm, "utility", key, epoch=epoch) for arm, epoch in points])
        order = np.argsort(x)
        lines[way] = curve(np.array(x)[order], y[order].T)
    trade = {"key": f"{name}-trade", "heading": f"Use against memorization, {name}", "note": f"held-out {key}",
             "x_label": "AUCG", "log_x": False, "lines": lines}  # fmt: skip
    survival = {
        "key": f"{name}-survival", "heading": f"Recall of training records, {name}", "x_label": "recall above",
        "note": f"share of records, {plain}", "log_x": False,
        "lines": {model: curve(_AT, np.array(values(plain, "survival", model))) for model in ("target", "reference")},
    }  # fmt: skip
    return [trade, survival]


def _claims(name: str, settings: CaptionedSetConfig, values) -> list[dict]:
    """Return what must appear; a claim holds if every seed keeps its bound."""
    plain, out = next(iter(settings.arms)), []

    def add(id, source, statement, expected, measured, **bound):
        out.append(claim_over_seeds(f"{name}-{id}", source, f"{name}: {statement}", expected, measured, **bound))

    for gap, title in (("ppg", "PPG"), ("prg", "PRG")):
        add(gap, SOURCE, f"{title} of training records", 0.1, values(plain, "gaps", gap), at_least=0.1)
    for gap, title in _GAPS.items():
        add(f"control-{gap}", EXPECTED, f"size of {title} on pairs that neither model saw", 0.06,
            np.abs(values(plain, "control", gap)), at_most=0.06)  # fmt: skip
        add(f"same-{gap}", EXPECTED, f"size of {title} where target and reference are one model", 0,
            np.abs(values(plain, "same", gap)), at_most=0)  # fmt: skip
    gain = np.subtract(values(plain, "one_model", "prg"), values(plain, "one_model_control", "prg"))
    add("one-model", SOURCE, "one model against a text encoder: PRG of training records above that of unseen pairs, by",
        0, gain, at_least=0)  # fmt: skip
    masked = [(arm, chosen.masking) for arm, chosen in settings.arms.items()
              if chosen.masking and chosen.replacement == "placeholder"]  # fmt: skip
    if masked:
        arm, share = max(masked, key=lambda pair: pair[1])
        for gap, bound in (("prg", 0.85), ("aucg", 0.9)):
            ratio = np.array(values(arm, "gaps", gap)) / np.maximum(values(plain, "gaps", gap), 1e-9)
            add(f"masking-{gap}", SOURCE, f"{_GAPS[gap]} with {100 * share:g}% of the tokens masked, over that without",
                bound, ratio, at_most=bound)  # fmt: skip
        key = f"recall@{max(settings.recall_at)}"
        lost = np.array(values(arm, "utility", key)) / np.maximum(values(plain, "utility", key), 1e-9)
        add("masking-use", SOURCE, f"held-out {key} with {100 * share:g}% masked, over that without (cost is moderate)", 0.9,
            lost, at_least=0.9)  # fmt: skip
    return out


