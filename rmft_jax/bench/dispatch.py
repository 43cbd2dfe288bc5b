"""`rmft bench dispatch`: many steps handed over at once, for models so small that handing over takes longer."""

from __future__ import annotations

import time

import jax
import numpy as np

from rmft_jax.bench import environment
from rmft_jax.bench.train import tagged_text
from rmft_jax.config import Config
from rmft_jax.data.loader import batches
from rmft_jax.models.gpt import count_params
from rmft_jax.progress import track
from rmft_jax.training.loop import put
from rmft_jax.training.mesh import make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.step import compile_train_step, init_state
from rmft_jax.training.tracker import tracker_shape

STEPS = 64  # of a sample, whatever the number handed over at once


def run(config: Config, peer: str = "", *, runs: int = 15) -> dict:
    """Time training with training.steps_per_dispatch=64 against one step at a time.

    What is timed is all from blocks on the host to updated weights. A pair is four samples of 64 steps in mirrored order
    (ABBA).

    Returns name, device, versions, unit, shape, parameters, value and peer_value (medians, ms a step; the peer hands over
    one step at a time), ratio (median of peer / ours over the pairs), and runs: the pairs of samples.
    """
    prepared, blocks = tagged_text(config)
    mesh = make_mesh(config.mesh)
    tracker = tracker_shape(config, len(blocks))
    optimizer, bank = make_optimizer(config.training, 10_000), jax.device_put(prepared.bank, replicated(mesh))
    make = lambda: init_state(config, config.tokenizer.vocab_size, prepared.identities, optimizer, tracker)  # noqa: E731
    shapes = jax.eval_shape(make)
    held = {"state": jax.jit(make, out_shardings=shardings_for(shapes, mesh))()}
    step_fns = {count: compile_train_step(config, optimizer, mesh, shapes, steps=count) for count in (STEPS, 1)}
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)

    def sample(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(STEPS // count):
            batch = put([next(source) for _ in range(count)], mesh)
            held["state"], metrics = step_fns[count](held["state"], batch, bank)
        jax.block_until_ready((held["state"], metrics))
        return 1000 * (time.perf_counter() - begin) / STEPS

    pairs = []
    for number in track(range(runs + 1), "bench dispatch", runs + 1):
        order = (STEPS, 1, 1, STEPS) if number % 2 else (1, STEPS, STEPS, 1)
        times = [(count, sample(count)) for count in order]
        if number:
            pairs.append([sum(spent for count, spent in times if count == which) / 2 for which in (STEPS, 1)])
    ours, single = np.median(pairs, axis=0)
    return {
        "name": "dispatch",
        **environment("numpy"),
        "unit": "ms/step",
        "shape": {
            **{name: getattr(config.training, name) for name in ("batch_size", "sequence_length")},
            **{name: getattr(config.model, name) for name in ("layers", "width")},
            "vocab_size": config.tokenizer.vocab_size,
            "tracker": config.tracker.enabled,
            "mesh": dict(mesh.shape),
        },
        "parameters": count_params(shapes["params"]),
        "value": float(ours),
        "peer": "one step at a time",
        "peer_value": float(single),
        "ratio": float(np.median([b / a for a, b in pairs])),
        "runs": [[round(a, 4), round(b, 4)] for a, b in pairs],
    }
