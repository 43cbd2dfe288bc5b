"""How well scores tell members of the training set from non-members: AUC and TPR at a fixed FPR, with intervals."""

from __future__ import annotations

import numpy as np

from rmft_jax.memorization.rates import percentile_interval, resample

FPR_PCT = (0.1, 1.0)


def auc(members: np.ndarray, non_members: np.ndarray) -> float:
    """Return the area under the ROC curve: P(member's score > non-member's), ties counted half. float [M], [N]."""
    return float(_wins(members, non_members).mean())


def tpr_at_fpr(members: np.ndarray, non_members: np.ndarray, fpr: float) -> float:
    """Return the largest share of members above a threshold that at most `fpr` of the non-members are above.

    members: float [M]; non_members: float [N]. With N < 1 / fpr no false positive is allowed at all.
    Source: Carlini et al. 2022, "Membership Inference Attacks From First Principles", arXiv 2112.03570.
    """
    once = np.ones((1, len(members))), np.ones((1, len(non_members)))
    return float(_tpr(members, non_members, fpr, *once)[0])


def separation(members: np.ndarray, non_members: np.ndarray, *, count: int, seed: int, confidence: float) -> dict:
    """Return AUC and the TPR at each of FPR_PCT, each with a bootstrap interval over members and non-members.

    members: float [M]; non_members: float [N], higher = more likely a member. count: resamples.
    """
    weights = resample([len(members), len(non_members)], count, seed)
    of_members, of_others = weights[:, : len(members)], weights[:, len(members) :]
    aucs = np.einsum("rm,mn,rn->r", of_members, _wins(members, non_members), of_others, optimize=True)
    rates = {fpr: (tpr_at_fpr(members, non_members, fpr / 100), _tpr(members, non_members, fpr / 100, of_members, of_others))
             for fpr in FPR_PCT}  # fmt: skip
    return {
        "auc": auc(members, non_members),
        "auc_ci": percentile_interval(aucs / (len(members) * len(non_members)), confidence),
        "tpr": [
            {"fpr_pct": fpr, "tpr_pct": 100 * point, "tpr_pct_ci": percentile_interval(100 * draws, confidence)}
            for fpr, (point, draws) in rates.items()
        ],
    }


def _wins(members: np.ndarray, non_members: np.ndarray) -> np.ndarray:
    """Return float [M, N]: 1 where the member has the higher score, 1/2 where both have the same."""
    a, b = np.asarray(members)[:, None], np.asarray(non_members)[None, :]
    return (a > b) + 0.5 * (a == b)


def _tpr(members, non_members, fpr: float, of_members: np.ndarray, of_others: np.ndarray) -> np.ndarray:
    """Return float [R] for R resamples, given how often each holds each member [R, M] and each non-member [R, N]."""
    order = np.argsort(-np.asarray(non_members), kind="stable")
    thresholds = np.append(np.asarray(non_members)[order], -np.inf)  # the last lets all pass
    drawn = of_others[:, order].cumsum(axis=1)
    allowed = np.floor(fpr * len(order) + 1e-9)
    place = (drawn <= allowed).sum(axis=1)  # of the first non-member that must not be passed
    share = of_members @ (np.asarray(members)[:, None] > thresholds) / np.shape(members)[0]
    return share[np.arange(len(share)), place]
