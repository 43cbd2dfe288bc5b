"""Memorization over a training: the tracker inside the step, and `rmft track`, the same counts for saved checkpoints.

The first goes along with training and sees each block as it is masked, by the model of that moment; the second shows each
checkpoint all training blocks, unmasked. What is counted, and the format of the files: docs/tracker.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rmft_jax import progress
from rmft_jax.config import Config
from rmft_jax.data.blocks import Blocks
from rmft_jax.data.loader import sequential_batches
from rmft_jax.data.prepare import Prepared, load_prepared
from rmft_jax.devices import everywhere, rows_for, spread_rows
from rmft_jax.errors import UserError
from rmft_jax.files import write_json
from rmft_jax.kernels import Rule, TaggedBatch, mask_batch, target_mask
from rmft_jax.models.gpt import hidden, init_params, output_matrix
from rmft_jax.training.checkpoints import Checkpoints, abstract
from rmft_jax.training.losses import DTYPES, spread_cross_entropy
from rmft_jax.training.setup import load_blocks, load_run_config, make_plan
from rmft_jax.training.tracker import TrackerShape, init_tracker, slice_names, tracker_shape, update_tracker
from rmft_jax.training.tracker_log import Tally, TrackerLog

__all__ = [
    "Tally", "TrackerLog", "TrackerShape", "init_tracker", "load_examples", "slice_names", "track", "tracker_shape",
    "update_tracker",
]  # fmt: skip
SCHEMA = 1


def track(runs: list[Path], overrides: list[str] = ()) -> list[dict]:
    """Count what each saved checkpoint of the runs has memorized; write RUN/track.json for each and return what was written.

    Every block of the run's training data is shown once, unmasked, teacher forced. overrides: settings to change, such as
    data=DIR, the text to look for in a folder that `rmft convert import` made. Raises UserError for a directory that is no
    run or has no checkpoint.
    """
    configs = [load_run_config(run, overrides) for run in runs]
    return [_track_run(run, config) for run, config in zip(runs, configs, strict=True)]


def load_examples(run: Path) -> dict[str, np.ndarray]:
    """Return the tracker's arrays of examples at a run's newest checkpoint, or at that of RUN/checkpoints/STEP.

    Returns: hits, targets uint32 [blocks], over all visits; first int32 [blocks], the step at which each block was first
    memorized as a whole, -1 = never. Raises UserError where the run has not followed examples.
    """
    config = load_run_config(run.parent.parent if run.name.isdigit() else run)
    if not (config.tracker.enabled and config.tracker.examples):
        raise UserError(f"{run} has not followed examples: train with tracker.enabled=true and tracker.examples=true")
    blocks, _ = load_blocks(config, load_prepared(config))
    shapes = {"tracker": jax.eval_shape(lambda: init_tracker(tracker_shape(config, len(blocks))))}
    checkpoints, step = Checkpoints.open(run)
    target = abstract(shapes, jax.tree.map(lambda _: everywhere(), shapes))
    state = checkpoints.restore(step, target, items=("tracker",))
    checkpoints.close()
    return jax.device_get(state["tracker"]["examples"])


def _track_run(run: Path, config: Config) -> dict:
    prepared = load_prepared(config)
    blocks, _ = load_blocks(config, prepared)
    checkpoints, _ = Checkpoints.open(run)
    steps, names, per_epoch = checkpoints.steps(), slice_names(config), make_plan(config, len(blocks)).steps_per_epoch
    params = jax.eval_shape(lambda: init_params(config.model, prepared.tokenizer.vocab_size, jax.random.key(0)))
    target = abstract(params, jax.tree.map(lambda _: everywhere(), params))
    count = _counter(config, prepared)
    entries = []
    for step in progress.track(steps, f"track {config.run_name}", len(steps)):
        tracker = jax.device_get(_count_blocks(count, checkpoints.restore_params(step, target), config, blocks))
        counts = tracker["counts"]
        tally = Tally(*(counts[name][0] for name in ("hits", "targets", "lengths")))
        about = {"step": step, "epoch": step / per_epoch, "examples_memorized": int(counts["whole"])}
        entries.append(about | tally.record(names, config.training.sequence_length))
    checkpoints.close()
    result = {
        "schema": SCHEMA,
        "run": config.run_name,
        "method": config.method,
        "content_hash": prepared.manifest["content_hash"],
        "examples": len(blocks),
        "checkpoints": entries,
    }
    write_json(run / "track.json", result)
    return result


def _count_blocks(count: Callable, params: dict, config: Config, blocks: Blocks) -> dict:
    """Return the counters after every block."""
    bins = config.training.sequence_length
    shape = TrackerShape(rounds=1, slices=len(slice_names(config)), bins=bins, examples=len(blocks))
    tracker = jax.device_put(init_tracker(shape), everywhere())
    for batch, _ in sequential_batches(blocks, batch_size=rows_for(config.training.batch_size)):
        tracker = count(tracker, params, TaggedBatch(*spread_rows(*batch)))
    return tracker


def _counter(config: Config, prepared: Prepared) -> Callable:
    """Return the jitted `(tracker, params, batch) -> tracker`."""
    length, dtype = config.training.sequence_length + 1, DTYPES[config.training.dtype]

    def count(tracker, params, batch: TaggedBatch):
        masked = mask_batch(batch, prepared.bank, jax.random.key(0), length=length, rules=Rule("none"))
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        inputs, targets = (masked.tokens[:, :-1], masked.segment_ids[:, :-1]), masked.tokens[:, 1:]
        features = hidden(params, config.model, *inputs)
        weights = target_mask(masked.segment_ids)
        _, scores = spread_cross_entropy(features, output_matrix(params), targets, weights, config)
        return update_tracker(tracker, batch, masked, scores.hit, np.int32(0))

    return jax.jit(count, donate_argnums=0, out_shardings=everywhere())
