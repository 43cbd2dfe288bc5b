"""`rmft bench side_by_side`: eight models trained in one program against one after the other."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from rmft_jax.bench import environment
from rmft_jax.bench.train import tagged_text
from rmft_jax.config import Config
from rmft_jax.data.blocks import all_rows
from rmft_jax.progress import track
from rmft_jax.training.side_by_side import SideBySide, fills_devices, ordinary_rows
from rmft_jax.training.tracker import TrackerShape

MEMBERS, STEPS = 8, 16


def run(config: Config, peer: str = "", *, runs: int = 7) -> dict:
    """Time rounds of 16 steps of 8 seeds side by side against the same rounds of each seed alone, one after the other.

    Side by side is what `rmft study scaling` does: under `vmap`, or where one model keeps the devices busy, in turn within
    one program. One alone is trained in two ways, of which the faster counts: by the same program for one member, on one
    device, which on CPU uses every core for its matrix products; and split over all devices, as `rmft train` does it.
    A pair is four samples in mirrored order (ABBA).

    Returns name, device, versions, unit, shape, parameters (of one), how, value and peer_value (medians, ms a step of all
    eight), peer (which way was the faster one), ratio (median of peer / ours over the pairs), and runs: the pairs.
    """
    prepared, blocks = tagged_text(config)
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=prepared.tokenizer.vocab_size)
    config = dataclasses.replace(config, tokenizer=tokenizer)
    size, shape = config.training.batch_size, TrackerShape(2, 3, config.training.sequence_length, 0)
    rows = all_rows(blocks)

    def trainer(seeds: list[int], sharded: bool = False):
        group = SideBySide(config, prepared, rows, np.array(seeds), {}, shape, steps=10_000, sharded=sharded)
        shown = ordinary_rows(len(blocks), np.array(seeds), batch_size=size, start=0, steps=STEPS)
        group.round(*shown)  # compiles
        return group, lambda: group.round(*shown)

    in_turn = fills_devices(config, prepared.tokenizer.vocab_size)
    together, round_together = trainer(list(range(MEMBERS)), in_turn)
    alone = {"on one device": trainer([0])[1], "split over all devices": trainer([0], sharded=True)[1]}

    def spent(rounds, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            rounds()
        return 1000 * (time.perf_counter() - begin) / STEPS

    once = {name: min(spent(rounds, 1) for _ in range(3)) for name, rounds in alone.items()}
    best = min(once, key=once.get)
    pairs = []
    for number in track(range(runs), "bench side_by_side", runs):
        order = (0, 1, 1, 0) if number % 2 else (1, 0, 0, 1)
        times = [(which, spent(alone[best], MEMBERS) if which else spent(round_together, 1)) for which in order]
        pairs.append([sum(time for which, time in times if which == wanted) / 2 for wanted in (0, 1)])
    ours, single = np.median(pairs, axis=0)
    return {
        "name": "side_by_side",
        **environment("numpy"),
        "unit": "ms/step of 8",
        "shape": {
            **{name: getattr(config.training, name) for name in ("batch_size", "sequence_length")},
            **{name: getattr(config.model, name) for name in ("layers", "width")},
            "vocab_size": config.tokenizer.vocab_size,
            "members": MEMBERS,
        },
        "parameters": together.parameters,
        "value": float(ours),
        "how": "in turn, each split over all devices" if in_turn else "vmap",
        "peer": f"one after the other, each {best}",
        "peer_value": float(single),
        "ratio": float(np.median([b / a for a, b in pairs])),
        "alone_ms": {name: round(value, 3) for name, value in once.items()},
        "runs": [[round(a, 3), round(b, 3)] for a, b in pairs],
    }
