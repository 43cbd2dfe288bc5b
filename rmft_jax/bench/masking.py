"""`rmft bench masking`: what masking on the device adds to a train step."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.data.loader import batches
from rmft_jax.data.prepare import load_prepared, prepare
from rmft_jax.kernels import Rule, TaggedBatch, mask_batch
from rmft_jax.progress import track
from rmft_jax.training.masking import masking_key
from rmft_jax.training.mesh import batch_sharding, make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import compile_train_step, init_state


def run(config: Config, peer: str = "", *, runs: int = 100) -> dict:
    """Time the train step with masking on the device against the step without, given the same tokens masked beforehand.

    Both train on the same tokens, so that the difference is what masking itself costs, not what other text costs.

    A pair is four steps, two of each in mirrored order (ABBA), so that a steady drift cancels; the faster of the two
    counts, because what disturbs a step only ever makes it slower. Both programs step one and the same train state in
    turn, so that where it lies in memory can't favour either.

    Returns name, device, versions, unit, value and peer_value (medians, ms a step; the peer is the step without masking),
    ratio (peer / ours), overhead_pct (median over the pairs), and runs: the pairs of samples in ms.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not (config.data_dir / "manifest.json").exists():
            config = dataclasses.replace(config, out=folder, data="")
            prepare(config)
        prepared = load_prepared(config)
        blocks, _ = load_blocks(config, prepared)
    mesh = make_mesh(config.mesh)
    bank = jax.device_put(prepared.bank, replicated(mesh))
    sharding = batch_sharding(mesh)
    steppers, held = [], {}
    for policy in ("keep_first", "none"):
        variant = dataclasses.replace(config, masking=dataclasses.replace(config.masking, policy=policy))
        steppers.append(_stepper(variant, prepared, mesh, bank, held))
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)
    masked_beforehand = jax.jit(lambda batch, bank: _masked_beforehand(config, batch, bank), out_shardings=sharding)
    pairs = []
    for number in track(range(runs + 3), "bench masking", runs + 3):
        batch = jax.device_put(next(source), sharding)
        batches_of = batch, jax.block_until_ready(masked_beforehand(batch, bank))
        order = (0, 1, 1, 0) if number % 2 else (1, 0, 0, 1)  # a drift of the machine hits both alike
        times = [(which, steppers[which](batches_of[which])) for which in order]
        if number >= 3:
            pairs.append([min(time for w, time in times if w == which) for which in (0, 1)])
    ours, peer = np.median(pairs, axis=0)
    overhead = [100 * (with_masking / without - 1) for with_masking, without in pairs]
    return {
        "name": "masking",
        **environment("numpy"),
        "unit": "ms/step",
        "shape": {
            "batch_size": config.training.batch_size,
            "sequence_length": config.training.sequence_length,
            "layers": config.model.layers,
            "width": config.model.width,
            "spans": blocks.max_spans,
            "components": blocks.max_components,
        },
        "value": float(ours),
        "peer": "the step with masking.policy=none on the same tokens, masked beforehand",
        "peer_value": float(peer),
        "ratio": float(peer / ours),
        "overhead_pct": float(np.median(overhead)),
        "overhead_pct_quartiles": [float(q) for q in np.percentile(overhead, [25, 75])],
        "runs": [[round(a, 4), round(b, 4)] for a, b in pairs],
    }


def _masked_beforehand(config: Config, batch: TaggedBatch, bank) -> TaggedBatch:
    """Return the batch as a corpus that was masked in advance would hold it."""
    length = config.training.sequence_length + 1
    masked = mask_batch(batch, bank, masking_key(config.seed), length=length, rules=Rule())
    return batch._replace(tokens=masked.tokens, segment_ids=masked.segment_ids, component=jnp.zeros_like(masked.tokens))


def _stepper(config: Config, prepared, mesh, bank, held: dict) -> Callable:
    """Return a function that takes one step on a batch, from and into `held`, and returns the milliseconds."""
    optimizer = make_optimizer(config.training, 1000)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer)
    state = jax.device_put(state, shardings_for(state, mesh))  # as the training loop holds it
    step = compile_train_step(config, optimizer, mesh, state)
    held["state"] = state

    def timed(batch) -> float:
        begin = time.perf_counter()
        held["state"], metrics = step(held["state"], batch, bank)
        jax.block_until_ready((held["state"], metrics))
        return 1000 * (time.perf_counter() - begin)

    return timed
