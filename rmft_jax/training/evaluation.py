"""Held-out perplexity: over all target tokens, PII and other tokens apart, and document by document."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from rmft_jax.data.blocks import Blocks
from rmft_jax.data.loader import sequential_batches


def evaluate(eval_step: Callable, params: dict, blocks: Blocks, *, batch_size: int, sharding) -> dict:
    """Score the held-out blocks as they stand.

    Returns: perplexity, perplexity_pii, perplexity_other (exp of the mean NLL of those target tokens; None without any),
    and document_nll, document_tokens: sums and counts for each document, in order; with _pii, of its PII tokens alone.
    """
    count = int(blocks.corpus.document.max()) + 1
    sums, counts = np.zeros((2, count)), np.zeros((2, count), np.int64)  # other, PII
    for batch, documents in sequential_batches(blocks, batch_size=batch_size):
        nll, is_target, is_pii = (np.asarray(x) for x in eval_step(params, jax.device_put(batch, sharding)))
        where = (is_pii[is_target].astype(int), documents[:, 1:][is_target])
        np.add.at(sums, where, nll[is_target].astype(np.float64))
        np.add.at(counts, where, 1)
    return {
        "perplexity": perplexity(sums.sum(), counts.sum()),
        "perplexity_pii": perplexity(sums[1].sum(), counts[1].sum()),
        "perplexity_other": perplexity(sums[0].sum(), counts[0].sum()),
        "document_nll": sums.sum(0).tolist(),
        "document_tokens": counts.sum(0).tolist(),
        "document_nll_pii": sums[1].tolist(),
        "document_tokens_pii": counts[1].tolist(),
    }


def early_stopping(entries: list[dict], patience: int) -> dict | None:
    """Return what early stopping says of a run's evaluations so far; None where it is off (patience 0) or there is none.

    entries: one a checkpoint, in order, with step and perplexity. Returns: patience; step, of the newest checkpoint;
    best_step, of the one with the lowest perplexity (the first of several); stopped: whether `patience` later ones were no
    better.
    """
    if not patience or not entries:
        return None
    values = [np.inf if entry["perplexity"] is None else entry["perplexity"] for entry in entries]
    best = int(np.argmin(values))
    return {
        "patience": patience,
        "step": entries[-1]["step"],
        "best_step": entries[best]["step"],
        "stopped": len(entries) - 1 - best >= patience,
    }


def perplexity(nll: float, tokens: int) -> float | None:
    """Return exp(nll / tokens), None without tokens; capped where exp would overflow."""
    return float(np.exp(min(nll / tokens, 700.0))) if tokens else None
