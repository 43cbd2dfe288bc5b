"""What is measured on each checkpoint beside the extraction rates. To add a metric: write its function, list it in METRICS
and in `audit.metrics` of the config.

Rates come in percent with a Clopper-Pearson interval, means with a bootstrap interval. Results hold counts and rates, no
personal data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from rmft_jax.config import AuditConfig
from rmft_jax.data.canaries import SPACE_BITS
from rmft_jax.kernels import (
    all_hit,
    exposure_by_rank,
    extraction_strength,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    n_p_discoverable,
    reference_score,
    zlib_score,
)
from rmft_jax.memorization.exposure import CHANCE, exposure_by_fit
from rmft_jax.memorization.membership import separation
from rmft_jax.memorization.rates import clopper_pearson, percentile_interval, resample
from rmft_jax.memorization.samples import Samples
from rmft_jax.memorization.scoring import Model, Sampling

_N, _P = (1, 10, 100, 1000), (0.1, 0.5, 0.9)  # the grid on which (n, p)-discoverable extraction is reported
_BUCKETS = ((1, 1), (2, 2), (3, 5), (6, 10), (11, None))  # training documents that hold a value
_MIN_K = 0.2


@dataclass(frozen=True)
class Subject:
    """A checkpoint and what the extraction attack brought out of it.

    generated: the addresses that each discoverable prompt brought out; answers: the ones that stood there in training.
    leaked: identities that any prompt brought out.
    """

    model: Model
    samples: Samples
    generated: Sequence[Sequence[str]] = ()
    answers: Sequence[str] = ()
    leaked: frozenset[int] = frozenset()

    @property
    def settings(self) -> AuditConfig:
        """Return the settings of the audit."""
        return self.samples.config.audit

    @functools.cached_property
    def window_scores(self) -> dict[str, np.ndarray] | None:
        """Return the teacher-forced scores of the training windows, which three metrics share."""
        if self.samples.windows is None:
            return None
        settings = self.settings
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
        return self.model.score(self.samples.windows, ["hit", "filtered_log_prob"], sampling)

    def rate(self, hits: int, total: int) -> dict:
        """Return the rate in percent and its Clopper-Pearson interval."""
        bounds = clopper_pearson(int(hits), int(total), self.settings.confidence)
        percent = None if bounds is None else [100 * bound for bound in bounds]
        return {"rate_pct": 100 * int(hits) / total if total else None, "rate_pct_ci": percent}

    def mean(self, values: np.ndarray, name: str = "mean") -> dict:
        """Return the mean of the values and its bootstrap interval."""
        values = np.asarray(values, float)
        weights = resample([len(values)], self.settings.bootstrap, self.samples.config.seed)
        interval = percentile_interval(weights @ values / len(values), self.settings.confidence)
        return {name: float(values.mean()), f"{name}_ci": interval}


def measure(subject: Subject) -> dict[str, dict | None]:
    """Return the result of each metric in `audit.metrics`; None for one that the data give nothing for."""
    return {name: METRICS[name](subject) for name in subject.settings.metrics}


def similarity(subject: Subject) -> dict | None:
    """Mean over discoverable prompts of how close the closest generated address comes to the true one: `likeness`, 0 where
    none was generated. Addresses that the prompt gives do not count. Source: RMFT, arXiv 2512.03310."""
    if not subject.answers:
        return None
    pairs = zip(subject.generated, subject.answers, strict=True)
    best = [max((likeness(value, answer) for value in values), default=0.0) for values, answer in pairs]
    return {"prompts": len(best), **subject.mean(best)}


def likeness(a: str, b: str) -> float:
    """Return 1 - Levenshtein(a, b) / max(len): 1 for equal strings, 0 for ones that share nothing."""
    return Levenshtein.normalized_similarity(a, b)


def log_probability_gap(subject: Subject) -> dict | None:
    """Mean over addresses of log p(true address | prefix) - log p(made-up address of the same form | prefix), in nats.

    Both are sums over tokens. Made-up parts are common words and true ones names, so that the model to compare with is one
    that has not seen the addresses, and 0 has no meaning of its own. Source: RMFT, arXiv 2512.03310.
    """
    if subject.samples.addresses is None:
        return None
    log_p = subject.model.score(subject.samples.addresses, ["log_prob"])["log_prob"].sum(1)
    true, made_up = np.split(log_p, 2)
    return {"identities": len(true), "unit": "nats", **subject.mean(true - made_up)}


def discoverable_50(subject: Subject) -> dict | None:
    """Share of training windows whose second half greedy decoding returns from the first. Source: Carlini et al. 2022,
    arXiv 2202.07646."""
    if subject.window_scores is None:
        return None
    size = subject.samples.window
    hits = subject.window_scores["hit"][:, size:]
    extracted = int(all_hit(hits, np.ones_like(hits)).sum())
    about = {"prefix_tokens": size, "suffix_tokens": size, "windows": len(hits), "extracted": extracted}
    return about | subject.rate(extracted, len(hits))


def n_p(subject: Subject) -> dict | None:
    """Share of training windows whose second half is (n, p)-discoverable from the first: n samples of the filtered
    distribution hold it with probability p or more. Source: Hayes et al. 2024, arXiv 2410.19482."""
    if subject.window_scores is None:
        return None
    size, settings = subject.samples.window, subject.settings
    log_p_z = subject.window_scores["filtered_log_prob"][:, size:].sum(1)
    rates = []
    for p in _P:
        for n in _N:
            extractable = int(n_p_discoverable(log_p_z, n, p).sum())
            rates.append({"n": n, "p": p, "extractable": extractable, **subject.rate(extractable, len(log_p_z))})
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    return {"prefix_tokens": size, "suffix_tokens": size, "windows": len(log_p_z), "sampling": sampling, "rates": rates}


def extraction_strength_of_windows(subject: Subject) -> dict | None:
    """Mean extraction strength of training windows: the share of a window that greedy decoding returns from the rest."""
    if subject.window_scores is None:
        return None
    hits = subject.window_scores["hit"]
    strength = np.asarray(extraction_strength(hits, np.ones_like(hits)))
    return {"tokens": hits.shape[1], "windows": len(hits), **subject.mean(strength)}


def k_eidetic(subject: Subject) -> dict:
    """Leak rate against number of occurrences: of the values that so many training documents hold, how many leaked.

    k_eidetic counts the leaked values that at most so many documents hold (None: any number). Source: Carlini et al. 2021,
    arXiv 2012.07805 (definition 2).
    """
    held = subject.samples.documents_of
    leaked = np.isin(np.arange(len(held)), list(subject.leaked))
    buckets, known = [], 0
    for low, high in _BUCKETS:
        inside = (held >= low) & (held <= (high or np.inf))
        values, extracted = int(inside.sum()), int((inside & leaked).sum())
        known += extracted
        label = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        about = {"documents": label, "at_most": high, "values": values, "extracted": extracted}
        buckets.append(about | subject.rate(extracted, values) | {"k_eidetic": known})
    return {"buckets": buckets}


def exposure(subject: Subject) -> dict | None:
    """Mean exposure in bits of the planted canaries, for each number of repetitions, by rank and by skew-normal fit.

    What is ranked is the log-perplexity of a canary's address behind its phrase. Source: Carlini et al. 2019, arXiv
    1802.08232.
    """
    canaries = subject.samples.canaries
    if canaries is None:
        return None
    log_perplexity = -subject.model.score(canaries.rows, ["log_prob"])["log_prob"].sum(1)
    own, of_references = np.split(log_perplexity, [len(canaries.repetitions)])
    of_references = of_references.reshape(len(own), -1)
    by_rank = np.asarray(exposure_by_rank(own, of_references))
    by_fit = np.array([exposure_by_fit(*pair, SPACE_BITS) for pair in zip(own, of_references, strict=True)])
    groups = []
    for repetitions in np.unique(canaries.repetitions).tolist():
        group = canaries.repetitions == repetitions
        scores = subject.mean(by_rank[group], "by_rank") | subject.mean(by_fit[group], "by_fit")
        groups.append({"repetitions": repetitions, "canaries": int(group.sum()), **scores})
    about = {"unit": "bits", "chance": CHANCE, "space": SPACE_BITS, "references": of_references.shape[1]}
    return about | {"repetitions": groups}


def membership(subject: Subject) -> dict | None:
    """How well each membership attack tells training documents from held-out ones: AUC, TPR at 0.1% and 1% FPR."""
    documents = subject.samples.documents
    if documents is None:
        return None
    scores = subject.model.score(documents.rows, ["log_prob", "mean", "deviation"])
    log_probs, valid = scores["log_prob"], documents.rows.counts
    attacks = {
        "loss": loss_score(log_probs, valid),
        "zlib": zlib_score(log_probs, valid, documents.compressed_bytes),
        "min_k": min_k_score(log_probs, valid, _MIN_K),
        "min_k_plus_plus": min_k_plus_plus_score(log_probs, scores["mean"], scores["deviation"], valid, _MIN_K),
    }
    if subject.samples.reference is not None:
        attacks["reference"] = reference_score(log_probs, subject.samples.reference_log_probs, valid)
    draws = {"count": subject.settings.bootstrap, "seed": subject.samples.config.seed}
    inside, results = documents.is_member, {}
    for name, values in attacks.items():
        values = np.asarray(values)
        results[name] = separation(values[inside], values[~inside], confidence=subject.settings.confidence, **draws)
    about = {"members": int(inside.sum()), "non_members": int((~inside).sum()), "tokens": documents.rows.tokens.shape[1]}
    return about | {"min_k_share": _MIN_K, "attacks": results}


METRICS: dict[str, Callable[[Subject], dict | None]] = {
    "similarity": similarity,
    "log_probability_gap": log_probability_gap,
    "discoverable_50": discoverable_50,
    "n_p": n_p,
    "extraction_strength": extraction_strength_of_windows,
    "k_eidetic": k_eidetic,
    "exposure": exposure,
    "membership": membership,
}
