"""`rmft compare`: audited runs side by side, the baseline against each method, in one results.json."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import rmft_jax
from rmft_jax.data.prepare import load_prepared, pii_names, source_name
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, read_lines, write_json
from rmft_jax.memorization.extraction import paired_perplexities, read_evaluation
from rmft_jax.memorization.rates import (
    aurc,
    bootstrap_counts,
    max_ter,
    mean_delta_perplexity,
    percentile_interval,
    reduction_pct,
    resample,
    tau_grid,
)
from rmft_jax.training.setup import load_run_config

SCHEMA = 1
_MIX = ("source", "weight", "epochs", "content_hash")
DESCRIPTIONS = {
    "none": "plain training",
    "rmft": "randomized masking",
    "recombination": "masking with recombined parts of other values",
    "redaction": "a placeholder for each value",
    "dedup": "deduplication",
    "rmft+dedup": "randomized masking and deduplication",
    "goldfish": "goldfish loss, one token in k left out of it",
    "pii_loss": "PII tokens weighted down in the loss",
    "surrogate_loss": "surrogate tokens weighted down in the loss",
    "elr": "early-learning regularization",
    "weight_decay": "another weight decay",
    "dropout": "dropout",
    "early_stopping": "early stopping, best checkpoint kept",
    "dp": "DP-SGD, each block's gradient clipped and noised",
}


def compare(runs: list[Path], out: Path, overrides: list[str] | None = None, *, command: str = "rmft compare") -> dict:
    """Compare audited runs with the one trained without a defence; write `out`/results.json and return its content.

    overrides: `audit.confidence` and `audit.bootstrap`. Raises UserError without a baseline, without audits, or when the
    runs do not share data, prompts and number of checkpoints.
    """
    results = comparison([runs], overrides or [], command=command)
    write_json(out / "results.json", results)
    return results


def comparison(seeds: list[list[Path]], overrides: list[str] = (), *, command: str) -> dict:
    """Return the content of results.json for the same methods trained under several seeds.

    seeds: the runs of each seed, of equal names and in equal order. Every figure is the mean over the seeds; so are the ends
    of the intervals under "runs", which are therefore as wide as those of one seed. The intervals under "comparison" come
    from a paired bootstrap over seeds, and within them over prompts (or held-out documents).
    """
    audits = [[_read_audit(run) for run in runs] for runs in seeds]
    evaluations = [[_handed_over(run, read_evaluation(run)["checkpoints"]) for run in runs] for runs in seeds]
    config = load_run_config(seeds[0][0], overrides)
    baseline = _check(seeds, audits, evaluations)
    settings = config.audit
    chosen = _resampled_seeds(len(seeds), settings.bootstrap, config.seed)
    by_run = lambda table: [list(column) for column in zip(*table, strict=True)]  # noqa: E731  [seed][run] -> [run][seed]
    mdps = [
        np.mean([_mdp_by_checkpoint(*pair) for pair in zip(method, by_run(evaluations)[baseline], strict=True)], axis=0)
        for method in by_run(evaluations)
    ]
    last = [scores[-1] for scores in by_run(evaluations)[baseline]]
    usual = float(np.mean([paired_perplexities(scores, scores)[0].mean() for scores in last]))
    tau = tau_grid(usual, settings.aurc_budget_pct)
    samples = [_Samples(of_seeds, chosen, config.seed) for of_seeds in by_run(audits)]
    first = audits[0][baseline]
    names = [audit["run"] for audit in audits[0]]
    return {
        "schema": SCHEMA,
        "version": rmft_jax.__version__,
        "command": command,
        "data": _describe_data(load_prepared(config).manifest, first),
        "settings": {
            "baseline": names[baseline],
            "seeds": len(seeds),
            "confidence": settings.confidence,
            "bootstrap": settings.bootstrap,
            "headline_prompts": "all",
            "prompts": {**first["prompts"], "all": sum(first["prompts"].values())},
            "new_tokens": first["new_tokens"],
            "aurc_grid": {"start": float(tau[0]), "stop": float(tau[-1]), "count": len(tau)},
        },
        "runs": {
            name: mean_tree([
                _describe_run(seeds[s][i], audits[s][i], _mdp_by_checkpoint(evaluations[s][i], evaluations[s][baseline]))
                for s in range(len(seeds))
            ])
            for i, name in enumerate(names)
        },
        "comparison": {
            name: {
                **_reductions(samples[i], samples[baseline], "all", settings.confidence),
                **_cost(by_run(evaluations)[i], by_run(evaluations)[baseline], settings, chosen, config.seed),
                **_frontier(samples[i], mdps[i], samples[baseline], tau, settings.confidence),
                "differences": {
                    other: _differences(samples[i], samples[j], [*first["prompts"], "all"], settings.confidence)
                    for j, other in enumerate(names)
                    if j != i
                },
                "prompts": {
                    prompts: _reductions(samples[i], samples[baseline], prompts, settings.confidence)
                    for prompts in first["prompts"]
                },
            }
            for i, name in enumerate(names)
        },
    }  # fmt: skip


def mean_tree(values: list):
    """Return the mean of equal trees of numbers, place by place; None where one has none. Text is that of the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean_tree([value[key] for value in values]) for key in first}
    if any(value is None for value in values):
        return None
    if isinstance(first, list):
        return [mean_tree(list(items)) for items in zip(*values, strict=True)]
    if isinstance(first, (str, bool)) or all(value == first for value in values):
        return first
    return float(np.mean(values))


def _resampled_seeds(seeds: int, count: int, seed: int) -> np.ndarray:
    """Return float [count, seeds]: the weight of each seed in each resample."""
    return np.random.default_rng([seed, 1]).multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds


class _Samples:
    """TER and SER of one method by checkpoint, as counted and in every bootstrap resample, means over its seeds.

    The runs of a seed have the same prompts, and all methods the same resampled seeds, so the same draws pair them.
    """

    def __init__(self, audits: list[dict], chosen: np.ndarray, seed: int):
        self._audits = [_SeedSamples(audit, len(chosen), seed) for audit in audits]
        self._chosen = chosen

        self._rates: dict[str, dict] = {}

    def rates(self, prompts: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return {"ter", "ser"}: float [C] and resampled float [R, C], for one prompt set or "all"."""
        if prompts not in self._rates:
            parts = [audit.rates(prompts) for audit in self._audits]
            self._rates[prompts] = {
                rate: (
                    np.mean([part[rate][0] for part in parts], axis=0),
                    np.einsum("rs,src->rc", self._chosen, np.stack([part[rate][1] for part in parts])),
                )
                for rate in ("ter", "ser")
            }
        return self._rates[prompts]


class _SeedSamples:
    """TER and SER of one audit by checkpoint, as counted and in every bootstrap resample of its prompts."""

    def __init__(self, audit: dict, count: int, seed: int):
        self.sets, self.known = audit["prompts"], audit["identities"]
        self.checkpoints = audit["checkpoints"]
        self._members = resample(list(self.sets.values()), count, seed) > 0  # bool [R, N]

    def rates(self, prompts: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return {"ter", "ser"}: float [C] and resampled float [R, C], for one prompt set or "all"."""
        point = {rate: np.array([c["prompts"][prompts][rate] or 0.0 for c in self.checkpoints]) for rate in ("ter", "ser")}
        columns: dict[str, list[np.ndarray]] = {"ter": [], "ser": []}
        for checkpoint in self.checkpoints:
            leaks, seen = self._matrix(checkpoint, prompts)
            columns["ter"].append(100 * bootstrap_counts(self._members, leaks) / max(1, self.known))
            seen_count = bootstrap_counts(self._members, leaks[:, seen])
            columns["ser"].append(100 * seen_count / max(1, checkpoint["seen_identities"]))
        return {rate: (point[rate], np.stack(columns[rate], axis=1)) for rate in point}

    def _matrix(self, checkpoint: dict, prompts: str) -> tuple[np.ndarray, np.ndarray]:
        """Return bool [N, I], which prompt brought out which true value, and bool [I], which of them were seen."""
        offsets = dict(zip(self.sets, np.cumsum([0, *self.sets.values()]), strict=False))
        pairs = [
            (offsets[name] + record["prompt"], record["identity"])
            for name in ([prompts] if prompts != "all" else self.sets)
            for record in checkpoint["leaks"][name]
            if record["identity"] is not None
        ]
        identities = sorted({identity for _, identity in pairs})
        column = {identity: number for number, identity in enumerate(identities)}
        matrix = np.zeros((sum(self.sets.values()), len(identities)), bool)
        for row, identity in pairs:
            matrix[row, column[identity]] = True
        return matrix, ~np.isin(identities, checkpoint["unseen_true_leaks"])


def _reductions(method: _Samples, baseline: _Samples, prompts: str, confidence: float) -> dict:
    ours, theirs = method.rates(prompts), baseline.rates(prompts)
    out = {}
    for rate in ("ter", "ser"):
        out[f"{rate}_reduction_pct"] = _number(reduction_pct(ours[rate][0], theirs[rate][0]))
        out[f"{rate}_reduction_pct_ci"] = percentile_interval(reduction_pct(ours[rate][1], theirs[rate][1]), confidence)
    return out


def _differences(method: _Samples, other: _Samples, sets: list[str], confidence: float) -> dict:
    """TER of the method less that of the other, means over checkpoints, in percentage points, for each prompt set.

    The resamples are moved so that their median is the value itself, for the reason given in `_frontier`.
    """
    out = {}
    for prompts in sets:
        (ours, our_draws), (theirs, their_draws) = (samples.rates(prompts)["ter"] for samples in (method, other))
        value, draws = float(np.mean(ours - theirs)), (our_draws - their_draws).mean(1)
        out[prompts] = {"ter": value, "ter_ci": percentile_interval(draws + (value - np.median(draws)), confidence)}
    return out


def _cost(method: list[list[dict]], baseline: list[list[dict]], settings, chosen: np.ndarray, seed: int) -> dict:
    """Perplexity and MDP of the last checkpoint against the baseline's, resampled over seeds and held-out documents.

    method, baseline: evaluations by seed and checkpoint. perplexity_other_increase_pct: on tokens outside PII alone.
    """
    last = [(ours[-1], theirs[-1]) for ours, theirs in zip(method, baseline, strict=True)]
    weights = resample([len(last[0][0]["document_tokens"])], settings.bootstrap, seed)  # int [R, D], for all alike
    interval = lambda draws: percentile_interval(np.sum(chosen.T * draws, axis=0), settings.confidence)  # noqa: E731
    out = {}
    for name, key in (("perplexity", "perplexity"), ("perplexity_other", "perplexity_other")):
        ratios = [100 * (ours[key] / theirs[key] - 1) for ours, theirs in last if ours[key] and theirs[key]]
        draws = [_resampled_increase(*pair, weights, outside_pii=key == "perplexity_other") for pair in last]
        out[f"{name}_increase_pct"] = float(np.mean(ratios)) if len(ratios) == len(last) else None
        out[f"{name}_increase_pct_ci"] = interval(draws)
    some = np.array(last[0][0]["document_tokens"]) > 0
    gaps = [np.subtract(*paired_perplexities(*pair)) for pair in last]
    return {
        **out,
        "mdp": float(np.mean([mean_delta_perplexity(*paired_perplexities(*pair)) for pair in last])),
        "mdp_ci": interval([weights[:, some] @ gap / weights[:, some].sum(1) for gap in gaps]),
    }


def _resampled_increase(ours: dict, theirs: dict, weights: np.ndarray, *, outside_pii: bool) -> np.ndarray:
    """Return float [R]: by how many percent perplexity rose in each resample of the held-out documents."""

    def sums(scores: dict) -> tuple[np.ndarray, np.ndarray]:
        nll, tokens = (np.array(scores[f"document_{what}"], float) for what in ("nll", "tokens"))
        if outside_pii:
            nll, tokens = nll - scores["document_nll_pii"], tokens - scores["document_tokens_pii"]
        return nll, tokens

    (nll, tokens), (base, _) = sums(ours), sums(theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.expm1(weights @ (nll - base) / (weights @ tokens))


def _frontier(samples: _Samples, mdp: np.ndarray, baseline: _Samples, tau: np.ndarray, confidence: float) -> dict:
    """AURC with its interval, resampled over prompts; the resamples are scaled so that their median is the value itself,
    because a resample holds fewer different prompts and so brings out fewer different addresses."""
    point, resampled = samples.rates("all")["ter"]
    curve = max_ter(point, mdp, tau)
    otherwise, others = (max_ter(ter, np.zeros(ter.shape[-1]), tau) for ter in baseline.rates("all")["ter"])
    value, draws = aurc(curve, tau, otherwise), aurc(max_ter(resampled, mdp, tau), tau, others)
    middle = np.median(draws)
    return {
        "aurc": _number(value),
        "aurc_ci": percentile_interval(draws * value / middle if middle > 0 else draws, confidence),
        "maxter": {"tau": tau.tolist(), "maxter": [_number(value) for value in curve]},
    }


def _mdp_by_checkpoint(method: list[dict], baseline: list[dict]) -> np.ndarray:
    pairs = zip(method, baseline, strict=True)
    return np.array([mean_delta_perplexity(*paired_perplexities(ours, theirs)) for ours, theirs in pairs])


def _describe_run(run: Path, audit: dict, mdp: np.ndarray) -> dict:
    about = read_json(run / "run.json", "run description", "train the run again")
    keys = ("step", "epoch", "perplexity", "perplexity_ci", "perplexity_pii", "perplexity_other")
    checkpoints = [
        {
            **{key: entry[key] for key in keys},
            "model_step": entry.get("model_step", entry["step"]),
            "mdp": float(value),
            "prompts": entry["prompts"],
            "metrics": entry.get("metrics", {}),
        }
        for entry, value in zip(audit["checkpoints"], mdp, strict=True)
    ]
    return {
        "method": audit["method"],
        "description": _describe_method(audit["method"]),
        "parameters": about["parameters"],
        "steps": about["steps"],
        "epochs": about["epochs"],
        "training_tokens": about["training_tokens"],
        **({"mix": [{key: part[key] for key in _MIX} for part in about["mix"]]} if "mix" in about else {}),
        **_describe_time(run),
        "mean": mean_tree([entry["prompts"] for entry in checkpoints]),
        "checkpoints": checkpoints,
        **_memorization(run),
    }


def _describe_time(run: Path) -> dict:
    path = run / "goodput.json"
    if not path.exists():  # of an earlier version
        return {}
    found = read_json(path, "goodput", "delete it")
    return {"goodput": {name: found[name] for name in ("goodput_pct", "total_seconds", "restarts", "lost_steps", "seconds")}}


def _memorization(run: Path) -> dict:
    """Return what the tracker counted in each finished epoch, if there was one: M of each slice."""
    records = [record for record in read_lines(run / "memorization.jsonl") if record.get("kind") == "epoch"]
    if not records:
        return {}
    names = records[0]["slices"]
    curves = {name: [record["slices"][name]["m"] for record in records] for name in names}
    return {"memorization": {"epoch": [record["epoch"] + 1 for record in records], "m": curves}}


def _describe_method(method: str) -> str:
    if method in DESCRIPTIONS:
        return DESCRIPTIONS[method]
    return "; ".join(DESCRIPTIONS.get(part, part) for part in method.split("+"))


def _describe_data(manifest: dict, audit: dict) -> dict:
    return {
        "source": source_name(manifest),
        "documents": manifest["train"]["documents"],
        "tokens": manifest["train"]["tokens"],
        "pii_occurrences": manifest["train"]["pii_occurrences"],
        "pii_identities": audit["identities"],
        "pii_types": pii_names(manifest),
        "pii_repeating_pct": manifest["pii_repeating_pct"],
        "heldout_documents": manifest["heldout"]["documents"],
        "content_hash": manifest["content_hash"],
    }


def _read_audit(run: Path) -> dict:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run (no config.yaml in it): name a directory that `rmft train` wrote")
    audit = read_json(run / "audit.json", "audit", "run `rmft audit` on this run first")
    return audit | {"checkpoints": _handed_over(run, audit["checkpoints"])}


def _handed_over(run: Path, entries: list[dict]) -> list[dict]:
    """Return an entry for each checkpoint that a finished run was to have: its own, or what early stopping puts there.

    Early stopping hands over the best checkpoint, so at every later time that is the model one has.
    """
    stop = read_evaluation(run).get("early_stopping")
    about = read_json(run / "run.json", "run description", "train the run again")
    if stop is None or not (stop["stopped"] or stop["step"] == about["checkpoint_steps"][-1]):
        return entries
    kept = [entry for entry in entries if entry["step"] <= stop["best_step"]]
    if not kept or kept[-1]["step"] != stop["best_step"]:
        raise UserError(f"{run} was audited before its best checkpoint, step {stop['best_step']}: audit it again")
    epoch = about["epochs"] / about["steps"]
    later = [step for step in about["checkpoint_steps"] if step > stop["best_step"]]
    return kept + [kept[-1] | {"step": step, "epoch": step * epoch, "model_step": stop["best_step"]} for step in later]


def _check(seeds: list[list[Path]], audits: list[list[dict]], evaluations: list[list[list[dict]]]) -> int:
    """Return the baseline's place; raise UserError when the runs cannot be compared."""
    places = [place for place, audit in enumerate(audits[0]) if audit["method"] == "none"]
    if len(places) != 1:
        raise UserError(f"{len(places)} of the runs have no defence: name exactly one baseline (masking.policy=none)")
    names = [audit["run"] for audit in audits[0]]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs are called {name}: train one of them under another name=")
    first = audits[0][places[0]]
    for runs, of_seed, scores in zip(seeds, audits, evaluations, strict=True):
        if [audit["run"] for audit in of_seed] != names:
            where = f"{runs[0].parent} has other runs than {seeds[0][0].parent}"
            raise UserError(f"{where}: train every method under every seed")
        for run, audit, evaluation in zip(runs, of_seed, scores, strict=True):
            for key, what in (("content_hash", "data"), ("prompts", "prompts"), ("new_tokens", "audit.new_tokens")):
                if audit[key] != first[key]:
                    raise UserError(f"{run} was audited with other {what} than the baseline: audit both with one config")
            if not len(audit["checkpoints"]) == len(evaluation) == len(first["checkpoints"]):
                raise UserError(
                    f"{run} has another number of audited checkpoints than the baseline: finish it, audit again"
                )
    return places[0]


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None
