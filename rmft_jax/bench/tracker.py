"""`rmft bench tracker`: what following memorization adds to a train step."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.data.loader import batches
from rmft_jax.data.prepare import load_prepared, prepare
from rmft_jax.progress import track
from rmft_jax.training.mesh import batch_sharding, make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import compile_train_step, init_state
from rmft_jax.training.tracker import tracker_shape


def run(config: Config, peer: str = "", *, runs: int = 300) -> dict:
    """Time the train step with the tracker against the step without, on the same batches.

    Pairs are in mirrored order and both programs step one train state, as in `bench.masking`. Every training.log_every
    pairs the step with the tracker also reads the counters, as a report does, within the time measured.

    Returns name, device, versions, unit, value and peer_value (medians, ms a step; the peer is the step without the
    tracker), ratio (peer / ours), overhead_pct (median over the pairs) with its 95 % interval (percentile bootstrap over
    pairs) and quartiles, and runs: the pairs of samples in ms.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not (config.data_dir / "manifest.json").exists():
            config = dataclasses.replace(config, out=folder, data="")
            prepare(config)
        prepared = load_prepared(config)
        blocks, _ = load_blocks(config, prepared)
    mesh = make_mesh(config.mesh)
    sharding, bank = batch_sharding(mesh), jax.device_put(prepared.bank, replicated(mesh))
    held: dict = {}
    steppers = []
    for enabled in (True, False):
        variant = dataclasses.replace(config, tracker=dataclasses.replace(config.tracker, enabled=enabled))
        steppers.append(_stepper(variant, prepared, blocks, mesh, bank, held))
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)
    pairs = []
    for number in track(range(runs + 3), "bench tracker", runs + 3):
        batch = jax.device_put(next(source), sharding)
        order = (0, 1, 1, 0) if number % 2 else (1, 0, 0, 1)  # a drift of the machine hits both alike
        report = number % config.training.log_every == 0
        times = [(which, steppers[which](batch, report)) for which in order]
        if number >= 3:
            pairs.append([min(time for w, time in times if w == which) for which in (0, 1)])
    ours, peer = np.median(pairs, axis=0)
    overhead = np.array([100 * (with_tracker / without - 1) for with_tracker, without in pairs])
    resampled = np.median(np.random.default_rng(0).choice(overhead, (2000, len(overhead))), axis=1)
    return {
        "name": "tracker",
        **environment("numpy"),
        "unit": "ms/step",
        "shape": {
            "batch_size": config.training.batch_size,
            "sequence_length": config.training.sequence_length,
            "layers": config.model.layers,
            "width": config.model.width,
            "examples": len(blocks),
        },
        "value": float(ours),
        "peer": "the step with tracker.enabled=false",
        "peer_value": float(peer),
        "ratio": float(peer / ours),
        "overhead_pct": float(np.median(overhead)),
        "overhead_pct_interval": [float(q) for q in np.percentile(resampled, [2.5, 97.5])],
        "overhead_pct_quartiles": [float(q) for q in np.percentile(overhead, [25, 75])],
        "runs": [[round(a, 4), round(b, 4)] for a, b in pairs],
    }


def _stepper(config: Config, prepared, blocks, mesh, bank, held: dict) -> Callable:
    """Return a function that takes one step on a batch, from and into `held`, and returns the milliseconds.

    `held` has the arrays of both programs, so that what only one of them carries stays where it is meanwhile.
    """
    optimizer, shape = make_optimizer(config.training, 1000), tracker_shape(config, len(blocks))
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, shape)
    state = jax.device_put(state, shardings_for(state, mesh))  # as the training loop holds it
    step, names = compile_train_step(config, optimizer, mesh, state), tuple(state)
    held.update({name: value for name, value in state.items() if name not in held})

    def timed(batch, report: bool) -> float:
        begin = time.perf_counter()
        state, metrics = step({name: held[name] for name in names}, batch, bank)
        jax.block_until_ready((state, metrics))
        if report and "tracker" in metrics:
            jax.device_get(metrics["tracker"])
        spent = 1000 * (time.perf_counter() - begin)
        held.update(state)
        return spent

    return timed
