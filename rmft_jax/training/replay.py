"""`rmft replay`: a step that was left out, taken again and looked at row by row."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import optax

from rmft_jax.data.loader import batches, examples_of
from rmft_jax.errors import UserError
from rmft_jax.files import read_lines, write_json
from rmft_jax.kernels import SurrogateBank, TaggedBatch
from rmft_jax.progress import track
from rmft_jax.training.checkpoints import Checkpoints
from rmft_jax.training.left_out import FILE
from rmft_jax.training.loop import put
from rmft_jax.training.losses import loss_and_gradient
from rmft_jax.training.mesh import replicated, shardings_for
from rmft_jax.training.setup import Run, load_run_config, set_up
from rmft_jax.training.step import compile_train_step, masked_rows

SCHEMA = 1


def replay(directory: Path, step: int = 0) -> dict:
    """Take the steps from the checkpoint before a step up to it, on the run's data; write and return what its batch did.

    step: 0 = the last one that was left out. Written to RUN/replay/STEP.json: from_step, the checkpoint it began at; loss
    and gradient_norm of the whole batch (None where not finite); left_out, whether the step was left out again;
    parameters_finite; and rows, those that are not finite before the others, the largest loss first: data (with training.mix
    alone: the folder of the corpus), block, epoch, documents (their numbers in the prepared data), tokens, pii_tokens
    (as tagged), loss, gradient_norm (of the row alone, without dropout).
    Raises UserError when no step was left out, or the run has no such step.
    """
    run = set_up(load_run_config(directory))
    step = step or max((record["step"] for record in read_lines(directory / FILE)), default=0)
    if not step:
        raise UserError(f"{directory} left no step out: name one with --step")
    if not 1 <= step <= run.plan.steps:
        raise UserError(f"{directory} has no step {step}: name one of 1 to {run.plan.steps}")
    began, state = _before(run, directory, step)
    batch_size, seed = run.config.training.batch_size, run.config.seed
    source = batches(run.blocks, batch_size=batch_size, seed=seed, start=began)
    bank = jax.device_put(run.prepared.bank, replicated(run.mesh))
    take = compile_train_step(run.config, run.optimizer, run.mesh, run.shapes)
    for number in track(range(began + 1, step + 1), f"replay to step {step}", step - began):
        rows = next(source)
        batch = put([rows], run.mesh)
        if number == step:
            finite = all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(state["params"]))
            each = np.asarray(_score_rows(run)(state, batch, bank))
            before = int(state["guard"]["skipped"])
        state, metrics = take(state, batch, bank)
    pairs = examples_of(run.blocks, batch_size=batch_size, seed=seed, step=step)
    described = [_row(run, pair, rows, place, each[:, place]) for place, pair in enumerate(pairs)]
    described.sort(key=lambda row: -np.inf if None in (row["loss"], row["gradient_norm"]) else -row["loss"])
    found = {
        "schema": SCHEMA,
        "step": step,
        "from_step": began,
        "loss": _number(metrics["loss"]),
        "gradient_norm": _number(metrics["gradient_norm"]),
        "left_out": int(metrics["skipped"]) > before,
        "parameters_finite": finite,
        "rows": described,
    }
    write_json(directory / "replay" / f"{step}.json", found)
    return found


def _before(run: Run, directory: Path, step: int) -> tuple[int, dict]:
    """Return the number and the state of the newest checkpoint before a step, those of the start without any."""
    if (directory / "checkpoints").is_dir():
        checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
        if earlier := [saved for saved in checkpoints.steps() if saved < step]:
            return earlier[-1], checkpoints.restore(earlier[-1], run.target)
    return 0, run.begin()


def _score_rows(run: Run):
    """Return the compiled `(state, batch, bank) -> float32 [2, B]`: loss and gradient norm of each row alone."""
    config, one = run.config, dataclasses.replace(run.config.training, accumulation=1)

    def score(state: dict, batch: TaggedBatch, bank: SurrogateBank) -> jax.Array:
        masked = masked_rows(state["step"], batch, bank, config=config, seed=config.seed)
        part, frozen = ("adapters", {"frozen": state["params"]}) if config.lora.rank else ("params", {})
        average, plain = state.get("average"), dataclasses.replace(config, training=one)
        alone = functools.partial(loss_and_gradient, state[part], plain, average=average, **frozen)

        def of_row(row):
            gradient, scores = alone(jax.tree.map(lambda x: x[None], row))
            return jax.numpy.stack([scores["loss"], optax.global_norm(gradient)])

        return jax.lax.map(of_row, masked).T

    return jax.jit(score, in_shardings=(shardings_for(run.shapes, run.mesh), None, None), out_shardings=replicated(run.mesh))


def _row(run: Run, pair: tuple[int, int], rows: TaggedBatch, place: int, scores: np.ndarray) -> dict:
    number, epoch = pair
    source, block = run.blocks.locate(number)
    documents = run.blocks.sources[source].documents(block)
    folders = [str(run.config.data_dir), *(part.data for part in run.config.training.mix)]
    return {
        **({"data": folders[source]} if run.others else {}),
        "block": block,
        "epoch": epoch,
        "documents": sorted({int(document) for document in documents if document >= 0}),
        "tokens": int((documents >= 0).sum()),
        "pii_tokens": int((rows.component[place] > 0).sum()),
        "loss": _number(scores[0]),
        "gradient_norm": _number(scores[1]),
    }


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None
