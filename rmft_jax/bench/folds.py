"""`rmft bench folds`: autoencoders trained on ten folds side by side against one after the other."""

from __future__ import annotations

import time

import numpy as np

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.errors import UserError
from rmft_jax.progress import track
from rmft_jax.study_config import FoldedImagesConfig
from rmft_jax.training.folds import FoldTrainer, fold_rows

IMAGES, FOLDS, REPETITIONS, EPOCHS = 1000, 5, 2, 3


def run(config: Config, peer: str = "", *, runs: int = 5) -> dict:
    """Time three epochs of ten runs in one program against the same epochs of each run in a program for one.

    peer: only "" for this one. A pair is four samples in mirrored order (ABBA). Compilation is left out on both sides.
    Returns name, device, versions, unit, shape, value and peer_value (medians, ms an epoch of all ten), ratio (median of
    peer / ours over the pairs), largest_difference (between both ways, of the losses of the first epoch, relative), and
    runs: the pairs.
    """
    if peer:
        raise UserError(f"bench folds has no peer {peer!r}: leave --peer out")
    settings = FoldedImagesConfig(folds=FOLDS, repetitions=REPETITIONS, samples=16)
    images = np.random.default_rng(0).binomial(1, 0.3, (IMAGES, 8, 8, 1)).astype(np.float32)
    rows, _ = fold_rows(IMAGES, FOLDS, REPETITIONS, 0)
    seeds, rates = np.arange(len(rows)), np.full(len(rows), 1e-3)

    def trainer(of: slice):
        one = FoldTrainer(settings, images, rows[of], seeds[of], rates[of])
        return one, one.epoch(0)

    together, losses = trainer(slice(None))
    alone, single_losses = zip(*(trainer(slice(n, n + 1)) for n in range(len(rows))), strict=True)
    ways = (lambda: together.epoch(1), lambda: [one.epoch(1) for one in alone])

    def spent(which: int) -> float:
        begin = time.perf_counter()
        for _ in range(EPOCHS):
            ways[which]()
        return 1000 * (time.perf_counter() - begin) / EPOCHS

    pairs = []
    for number in track(range(runs), "bench folds", runs):
        order = (0, 1, 1, 0) if number % 2 else (1, 0, 0, 1)
        times = [(which, spent(which)) for which in order]
        pairs.append([sum(time for which, time in times if which == wanted) / 2 for wanted in (0, 1)])
    ours, single = np.median(pairs, axis=0)
    single_losses = np.concatenate(single_losses)
    return {
        "name": "folds",
        **environment("numpy"),
        "unit": f"ms/epoch of {len(rows)}",
        "shape": {
            "images": IMAGES,
            "widths": list(settings.widths),
            "latent": settings.latent,
            "batch": settings.batch_size,
        },
        "value": float(ours),
        "peer": "one after the other",
        "peer_value": float(single),
        "ratio": float(np.median([b / a for a, b in pairs])),
        "largest_difference": float(np.max(np.abs(losses - single_losses) / np.abs(single_losses))),
        "runs": [[round(a, 3), round(b, 3)] for a, b in pairs],
    }
