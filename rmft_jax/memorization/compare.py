"""`rmft compare`: audited runs side by side, the baseline against each method, in one results.json."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import rmft_jax
from rmft_jax.data.prepare import load_prepared
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_json
from rmft_jax.memorization.extraction import load_run_config, paired_perplexities, read_evaluation
from rmft_jax.memorization.rates import (
    aurc,
    bootstrap_counts,
    max_ter,
    mdp_interval,
    mean_delta_perplexity,
    percentile_interval,
    reduction_pct,
    resample,
    tau_grid,
)

SCHEMA = 1
DESCRIPTIONS = {
    "none": "plain training",
    "rmft": "randomized masking, first occurrence kept",
    "dedup": "deduplication",
    "rmft+dedup": "randomized masking and deduplication",
}


def compare(runs: list[Path], out: Path, overrides: list[str] | None = None, *, command: str = "rmft compare") -> dict:
    """Compare audited runs with the one trained without a defence; write `out`/results.json and return its content.

    overrides: `audit.confidence` and `audit.bootstrap`. Raises UserError without a baseline, without audits, or when the
    runs do not share data, prompts and number of checkpoints.
    """
    audits = [_read_audit(run) for run in runs]
    evaluations = [read_evaluation(run)["checkpoints"] for run in runs]
    configs = [load_run_config(run, overrides or []) for run in runs]
    baseline = _check(runs, audits, evaluations)
    settings = configs[baseline].audit
    mdps = [_mdp_by_checkpoint(e, evaluations[baseline]) for e in evaluations]
    tau = tau_grid(mdps)
    samples = [_Samples(audit, settings.bootstrap, configs[baseline].seed) for audit in audits]
    manifest = load_prepared(configs[baseline]).manifest
    names = [audit["run"] for audit in audits]
    results = {
        "schema": SCHEMA,
        "version": rmft_jax.__version__,
        "command": command,
        "data": _describe_data(manifest, audits[baseline]),
        "settings": {
            "baseline": names[baseline],
            "confidence": settings.confidence,
            "bootstrap": settings.bootstrap,
            "headline_prompts": "all",
            "prompts": {**audits[baseline]["prompts"], "all": sum(audits[baseline]["prompts"].values())},
            "new_tokens": audits[baseline]["new_tokens"],
            "aurc_grid": {"start": float(tau[0]), "stop": float(tau[-1]), "count": len(tau)},
        },
        "runs": {
            name: _describe_run(run, audit, mdp)
            for name, run, audit, mdp in zip(names, runs, audits, mdps, strict=True)
        },
        "comparison": {
            name: {
                **_reductions(samples[i], samples[baseline], "all", settings.confidence),
                **_cost(evaluations[i], evaluations[baseline], settings, configs[baseline].seed),
                **_frontier(samples[i], mdps[i], tau, settings.confidence),
                "prompts": {
                    prompts: _reductions(samples[i], samples[baseline], prompts, settings.confidence)
                    for prompts in audits[baseline]["prompts"]
                },
            }
            for i, name in enumerate(names)
        },
    }
    write_json(out / "results.json", results)
    return results


class _Samples:
    """TER and SER of one audit by checkpoint, as counted and in every bootstrap resample of its prompts.

    All audits of a comparison have the same prompts, so the same seed pairs their resamples.
    """

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


def _cost(method: list[dict], baseline: list[dict], settings, seed: int) -> dict:
    """Perplexity and MDP of the last checkpoint against the baseline's, resampled over held-out documents."""
    ours, theirs = method[-1], baseline[-1]
    perplexities = paired_perplexities(ours, theirs)
    tokens = np.array(ours["document_tokens"], float)
    some = tokens > 0
    tokens = tokens[some]
    gap = (np.array(ours["document_nll"]) - np.array(theirs["document_nll"]))[some]
    weights = resample([len(tokens)], settings.bootstrap, seed)  # int [R, D]
    increases = 100 * np.expm1(weights @ gap / (weights @ tokens))
    return {
        "perplexity_increase_pct": 100 * (ours["perplexity"] / theirs["perplexity"] - 1),
        "perplexity_increase_pct_ci": percentile_interval(increases, settings.confidence),
        "mdp": mean_delta_perplexity(*perplexities),
        "mdp_ci": mdp_interval(*perplexities, count=settings.bootstrap, seed=seed, confidence=settings.confidence),
    }


def _frontier(samples: _Samples, mdp: np.ndarray, tau: np.ndarray, confidence: float) -> dict:
    """AURC with its interval, resampled over prompts; the resamples are scaled so that their median is the value itself,
    because a resample holds fewer different prompts and so brings out fewer different addresses."""
    point, resampled = samples.rates("all")["ter"]
    curve = max_ter(point, mdp, tau)
    value, draws = aurc(curve, tau), aurc(max_ter(resampled, mdp, tau), tau)
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
        {**{key: entry[key] for key in keys}, "mdp": float(value), "prompts": entry["prompts"]}
        for entry, value in zip(audit["checkpoints"], mdp, strict=True)
    ]
    return {
        "method": audit["method"],
        "description": DESCRIPTIONS.get(audit["method"], audit["method"]),
        "parameters": about["parameters"],
        "steps": about["steps"],
        "epochs": about["epochs"],
        "training_tokens": about["training_tokens"],
        "checkpoints": checkpoints,
    }


def _describe_data(manifest: dict, audit: dict) -> dict:
    source = manifest["settings"]["source"]
    return {
        "source": Path(source["path"]).name or source["format"],
        "documents": manifest["train"]["documents"],
        "tokens": manifest["train"]["tokens"],
        "pii_occurrences": manifest["train"]["pii_occurrences"],
        "pii_identities": audit["identities"],
        "pii_repeating_pct": manifest["pii_repeating_pct"],
        "heldout_documents": manifest["heldout"]["documents"],
        "content_hash": manifest["content_hash"],
    }


def _read_audit(run: Path) -> dict:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run (no config.yaml in it): name a directory that `rmft train` wrote")
    return read_json(run / "audit.json", "audit", "run `rmft audit` on this run first")


def _check(runs: list[Path], audits: list[dict], evaluations: list[list[dict]]) -> int:
    """Return the baseline's place; raise UserError when the runs cannot be compared."""
    places = [place for place, audit in enumerate(audits) if audit["method"] == "none"]
    if len(places) != 1:
        raise UserError(f"{len(places)} of the runs have no defence: name exactly one baseline (masking.policy=none)")
    names = [audit["run"] for audit in audits]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs are called {name}: train one of them under another name=")
    first = audits[places[0]]
    for run, audit, evaluation in zip(runs, audits, evaluations, strict=True):
        for key, what in (("content_hash", "data"), ("prompts", "prompts"), ("new_tokens", "audit.new_tokens")):
            if audit[key] != first[key]:
                raise UserError(f"{run} was audited with other {what} than the baseline: audit both with one config")
        if not len(audit["checkpoints"]) == len(evaluation) == len(first["checkpoints"]):
            raise UserError(f"{run} has another number of audited checkpoints than the baseline: finish it, audit again")
    return places[0]


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None
