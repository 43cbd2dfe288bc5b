"""`rmft train`: the data flow of one run, from prepared data to evaluated checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from rmft_jax.config import Config, load_config, to_dict, to_yaml
from rmft_jax.data.loader import batches
from rmft_jax.devices import is_main, keep_programs, peak_flops
from rmft_jax.errors import Preempted, UserError
from rmft_jax.files import LineFile, read_json, read_lines, write_json, write_text
from rmft_jax.kernels import TaggedBatch
from rmft_jax.models.gpt import count_params, flops_per_token
from rmft_jax.processes import barrier
from rmft_jax.progress import say, track
from rmft_jax.training.board import Board, load_wandb
from rmft_jax.training.checkpoints import Checkpoints, Clock
from rmft_jax.training.evaluation import early_stopping, evaluate
from rmft_jax.training.goodput import Goodput, describe_goodput
from rmft_jax.training.left_out import LeftOut
from rmft_jax.training.mesh import batch_sharding, replicated
from rmft_jax.training.peers import Peers, peer_timeout
from rmft_jax.training.preemption import Preemption
from rmft_jax.training.setup import Plan, Run, describe, describe_mix, set_up
from rmft_jax.training.step import compile_eval_step, compile_train_step, model_of
from rmft_jax.training.tracker_log import TrackerLog

SCHEMA = 1
_GIVE_UP = 20  # steps left out in a row
_STALL_SECONDS, _WARN_EVERY = 5, 600  # the shortest time that is judged, between two warnings
_FREE = ("out", "data", "audit", "checkpoint", "mesh", "study")  # sections that may change between a run and its resumption


def train(config: Config) -> Path:
    """Train one model as `config` says; return the run's directory.

    The directory holds config.yaml, run.json, metrics.jsonl, tensorboard/, evaluation.json and checkpoints/, with
    tracker.enabled memorization.jsonl, and where steps were left out skipped.jsonl. A run that was interrupted goes on from
    its newest checkpoint, with the same numbers as an undisturbed one; a finished one stays. Raises Preempted, after saving,
    when the process is told to stop.
    """
    if config.training.objective != "causal":
        raise UserError("training.objective is masked: such models cannot be audited; `rmft study scaling` trains them")
    if config.out.startswith("s3://"):
        raise UserError(f"out={config.out}: orbax cannot save checkpoints in s3://; train with out=gs://... or on a disk (a "
                        f"mounted bucket is one); data=s3://... is fine")  # fmt: skip
    if config.training.wandb:
        load_wandb()
    run, directory = set_up(config), config.run_dir
    if is_main():
        _claim(directory, config)
    goodput = Goodput(directory / "goodput.json")
    config, plan = run.config, run.plan
    keep_programs()
    kept = {"keep_last": config.checkpoint.keep_last, "keep_hours": config.checkpoint.keep_hours}
    checkpoints = Checkpoints(directory / "checkpoints", keep_steps=plan.checkpoint_steps, **kept)
    done = checkpoints.steps()
    stopped = _stopped_at(directory, config)
    if done and (done[-1] >= plan.steps or done[-1] == stopped):
        early = f", stopped early out of {plan.steps}" if done[-1] < plan.steps else ""
        say(f"{directory}: already trained, {done[-1]} steps{early}")
        checkpoints.close()
        return directory
    barrier("data are loaded")  # what comes now, all processes do together
    with goodput.of("checkpoint"):
        found = checkpoints.restore_newest(run.target)
    state = found[1] if found else run.begin()
    say(describe(run, state) + (f"\n  going on from step {found[0]}" if found else ""))
    if is_main():
        write_json(directory / "run.json", _describe(run))
    with Peers(peer_timeout()) as peers:  # until the last save is done, which all processes do together
        try:
            with Preemption() as preemption:
                _run(run, state, checkpoints, directory, peers, preemption, goodput)
        finally:
            with goodput.of("checkpoint"):
                checkpoints.close()
            goodput.write()
    say(describe_goodput(goodput.summary))
    return directory


def _run(
    run: Run, state: dict, checkpoints: Checkpoints, directory: Path, peers: Peers, preemption: Preemption, goodput: Goodput
) -> None:
    """Take the steps. Metrics of a step are read after the next one is dispatched, so that the device never waits."""
    config, plan, mesh, blocks = run.config, run.plan, run.mesh, run.blocks
    most, every = config.training.steps_per_dispatch, config.checkpoint.every_steps
    step_fns = {count: compile_train_step(config, run.optimizer, mesh, run.shapes, steps=count) for count in {1, most}}
    eval_step = compile_eval_step(config, mesh)
    bank = jax.device_put(run.prepared.bank, replicated(mesh))
    begin = int(state["step"])
    local = {"process": jax.process_index(), "processes": jax.process_count()}
    batch_size = config.training.batch_size
    source = batches(blocks, batch_size=batch_size, seed=config.seed, start=begin, **local)
    left_out = LeftOut(directory, config, blocks, begin)
    log = MetricsLog(directory, run, begin, goodput, left_out)
    clock = Clock(config.checkpoint.every_minutes, config.training.log_every)
    memory = None
    if config.tracker.enabled:
        memory = TrackerLog(directory, config, len(blocks.own), begin, state["tracker"]["counts"])
    stops = set(plan.checkpoint_steps) | (set(range(every, plan.steps, every)) if every else set())
    profile = Profile(directory / "profile", config.training.profile_at)
    work = dispatches(begin, plan.steps, most, stops)
    title, compiled = f"train {config.run_name}", set()
    goodput.begin(begin)
    for step, count in track(work, title, plan.steps, done=begin, status=log.status, size=lambda item: item[1]):
        handing_over = time.monotonic()
        with log.waiting():
            batch = put([next(source) for _ in range(count)], mesh)
        with profile.of(step), goodput.of("step" if count in compiled else "compile"):
            state, metrics = step_fns[count](state, batch, bank)
            compiled.add(count)
        peers.advance(time.monotonic() - handing_over)
        goodput.reach(step)
        if run.accountant and step in plan.checkpoint_steps:
            metrics |= {"epsilon": run.accountant.epsilon(step)}
        if memory:
            memory.add(step, count, metrics.pop("tracker"))
        log.add(step, count, metrics)
        told = preemption.notified() and step < plan.steps
        save, stop = told or step in stops or clock.due(step), None
        if save:
            log.flush()
            if memory:
                memory.flush()
        if step in plan.checkpoint_steps:
            with goodput.of("evaluation"):
                model, sharding = model_of(state), batch_sharding(mesh)
                scores = evaluate(eval_step, model, run.heldout, batch_size=batch_size, sharding=sharding)
            seen = int(np.ravel(metrics["seen"])[-1])
            stop = _add_evaluation(directory, plan, step, scores, seen, config.training.early_stopping)
            log.scores(step, scores)
            if stop and is_main():
                write_json(directory / "run.json", _describe(run, stop))
        if save:
            with goodput.of("checkpoint"):
                checkpoints.save(state)
            clock.saved()
        if stop and stop["stopped"]:
            say(f"stopped at step {step} of {plan.steps}; held-out perplexity was best at step {stop['best_step']}")
            break
        if told:
            raise Preempted(f"told to stop (SIGTERM): {directory} is saved at step {step} of {plan.steps}, the same command "
                            f"goes on from there")  # fmt: skip
    profile.close()
    log.close()


def dispatches(begin: int, end: int, most: int, stops: set[int]) -> Iterator[tuple[int, int]]:
    """Yield (step reached, number of steps) of each hand-over from `begin` to `end`: `most` steps, or 1 where that would
    pass one of `stops`, after which something is done with the state, so that no third program is ever compiled."""
    step = begin
    for stop in sorted(stops | {end}):
        while step < min(stop, end):
            count = most if step + most <= stop else 1
            step += count
            yield step, count


def put(batches: list[TaggedBatch], mesh) -> TaggedBatch:
    """Put this process' rows of one batch on its devices; of several batches, stacked."""
    stacked = len(batches) > 1
    sharding = batch_sharding(mesh, stacked=stacked)
    batch = jax.tree.map(lambda *x: np.stack(x), *batches) if stacked else batches[0]
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _flops(run: Run) -> tuple[int, float | None]:
    """Return the operations of a step, and the peak of all devices in operations a second, None where it is not known."""
    training, peak = run.config.training, peak_flops()
    tokens = training.batch_size * training.sequence_length
    flops = flops_per_token(run.config.model, run.prepared.tokenizer.vocab_size, training.sequence_length, run.config.lora)
    return tokens * flops, peak and peak * run.mesh.size


class Profile:
    """A trace of 5 dispatches from a step on, for TensorBoard or Perfetto."""

    def __init__(self, directory: Path, at: int):
        self._directory, self._at, self._left = directory, at, 5 if at else 0
        self._on = False

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Trace what is done within, if it is due."""
        if self._left and step >= self._at and not self._on:
            jax.profiler.start_trace(str(self._directory))
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step) if self._on else contextlib.nullcontext():
            yield
        if self._on:
            self._left -= 1
            if not self._left:
                self.close()

    def close(self) -> None:
        """End the trace, if one is under way."""
        if self._on:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._on, self._left = False, 0


class MetricsLog:
    """metrics.jsonl and the Board, one record every `log_every` steps; lines after the resumed step are dropped.

    Besides the metrics of the step, a record has those of the time since the record before: tokens_per_second;
    input_wait_pct, how much of it the host waited for data (the devices are ahead of it or behind: what they waited is no
    more), with a warning where it is a quarter; goodput_pct, of the whole run until then; mfu, operations a second by
    `flops_per_token` / peak of the devices, None where the peak is not known.
    """

    def __init__(self, directory: Path, run: Run, begin: int, goodput: Goodput, left_out: LeftOut):
        """left_out: where steps that did not count are noted."""
        training, self._left_out = run.config.training, left_out
        self._path, self._every, self._plan = directory / "metrics.jsonl", training.log_every, run.plan
        self._tokens, self._flops = training.batch_size * training.sequence_length, _flops(run)
        self._goodput, self._warned = goodput, -math.inf
        self._board = None
        self._file = None
        if is_main():
            kept = [record for record in read_lines(self._path) if record["step"] <= begin]
            self._file = LineFile(self._path, kept)
            self._board = Board(directory, run.config, begin)
        self._pending: tuple[int, int, dict] | None = None
        self._since, self._clock, self._waited = begin, time.monotonic(), 0.0
        self._loss, self._rate = math.nan, math.nan

    def add(self, step: int, count: int, metrics: dict) -> None:
        """Note the metrics of the `count` steps up to `step`, just dispatched; read those of the dispatch before, if due."""
        due, self._pending = self._pending, (step, count, metrics)
        if due:
            self._read(*due)

    def flush(self) -> None:
        """Write the metrics of the newest step."""
        if self._pending:
            step, count, metrics = self._pending
            self._write(step, _of_step(metrics, count, count - 1))
            self._pending = None
        if self._file:
            self._file.flush()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent within as waiting for data."""
        begin = time.monotonic()
        with self._goodput.of("input"):
            yield
        self._waited += time.monotonic() - begin

    def scores(self, step: int, scores: dict) -> None:
        """Send held-out scores to the Board."""
        for name in ("perplexity", "perplexity_pii", "perplexity_other"):
            if self._board and scores[name] is not None:
                self._board.add_scalar(f"heldout/{name}", scores[name], step)
        self._clock, self._since, self._waited = time.monotonic(), step, 0.0

    def status(self) -> str:
        """Return the newest loss and speed, for the progress display."""
        return f"loss {self._loss:.3f}, {self._rate:,.0f} tokens/s" if math.isfinite(self._rate) else ""

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        if self._board:
            self._board.close()

    def _read(self, last: int, count: int, metrics: dict) -> None:
        for place, step in enumerate(range(last - count + 1, last + 1)):
            if step % self._every == 0:
                self._write(step, _of_step(metrics, count, place))

    def _write(self, step: int, metrics: dict) -> None:
        self._left_out.add(metrics.pop("skipped_steps"))
        values = {name: float(value) for name, value in metrics.items()}
        in_a_row = int(values.pop("skipped_in_a_row", 0))
        if in_a_row >= _GIVE_UP:
            raise UserError(
                f"the last {in_a_row} steps up to {step} were left out, with the loss {values['loss']}: lower "
                f"training.learning_rate, clip harder or raise training.skip_above; `rmft replay {self._path.parent}` shows "
                f"what was in them"
            )
        now = time.monotonic()
        if step > self._since:
            seconds, steps = max(now - self._clock, 1e-9), step - self._since
            operations, peak = self._flops
            self._rate = steps * self._tokens / seconds
            values["input_wait_pct"] = 100 * min(1.0, self._waited / seconds)
            values["goodput_pct"] = self._goodput.pct
            self._warn_of_input(self._waited, seconds, now)
            values["mfu"] = steps * operations / seconds / peak if peak else math.nan
        self._since, self._clock, self._waited, self._loss = step, now, 0.0, values["loss"]
        if not self._file:
            return
        record = {"step": step, "epoch": step / self._plan.steps_per_epoch, **values, "tokens_per_second": self._rate}
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.add(record)
        for name, value in values.items():
            if self._board and math.isfinite(value):
                self._board.add_scalar(f"train/{name}", value, step)

    def _warn_of_input(self, waited: float, seconds: float, now: float) -> None:
        if seconds >= _STALL_SECONDS and waited > seconds / 4 and now - self._warned > _WARN_EVERY:
            self._warned = now
            say(f"warning: input holds the devices up: this host waited for data {waited:.0f} of {seconds:.0f} s; "
                f"give it more cores or less else to do", always=True)  # fmt: skip


def _of_step(metrics: dict, count: int, place: int) -> dict:
    """Return the metrics of one of the `count` steps of a dispatch."""
    return {name: np.asarray(value)[place] if count > 1 else np.asarray(value) for name, value in metrics.items()}


def _evaluations(directory: Path) -> list[dict]:
    path = directory / "evaluation.json"
    return read_json(path, "evaluation", "delete the run")["checkpoints"] if path.exists() else []


def _add_evaluation(directory: Path, plan: Plan, step: int, scores: dict, seen: int, patience: int) -> dict | None:
    """Add a checkpoint's scores to evaluation.json; return what it now says about early stopping."""
    kept = [entry for entry in _evaluations(directory) if entry["step"] < step]
    entries = [*kept, {"step": step, "epoch": step / plan.steps_per_epoch, "seen_identities": seen, **scores}]
    stop = early_stopping(entries, patience)
    more = {"early_stopping": stop} if stop else {}
    if is_main():
        write_json(directory / "evaluation.json", {"schema": SCHEMA, **more, "checkpoints": entries})
    return stop


def _stopped_at(directory: Path, config: Config) -> int | None:
    """Return the step at which early stopping ended the run, None if it did not."""
    entries = _evaluations(directory)
    stop = early_stopping(entries, config.training.early_stopping)
    return entries[-1]["step"] if stop and stop["stopped"] else None


def _describe(run: Run, stop: dict | None = None) -> dict:
    config, plan, state, accountant = run.config, run.plan, run.shapes, run.accountant
    taken = stop["step"] if stop and stop["stopped"] else plan.steps
    return {
        "schema": SCHEMA,
        "name": config.run_name,
        "method": config.method,
        "parameters": count_params(state["params"]),
        **({"trained_parameters": count_params(state["adapters"])} if config.lora.rank else {}),
        "steps": plan.steps,
        "epochs": plan.steps / plan.steps_per_epoch,
        "training_tokens": len(run.blocks.own.corpus.tokens),
        **({"mix": describe_mix(run)} if run.others else {}),
        "checkpoint_steps": list(plan.checkpoint_steps),
        **({"early_stopping": stop} if stop else {}),
        **({"privacy": accountant.describe(taken)} if accountant else {}),
    }


def _claim(directory: Path, config: Config) -> None:
    """Take the run's directory: new, or an earlier start of the same run."""
    path = directory / "config.yaml"
    if path.exists():
        old, new = to_dict(load_config(path)), to_dict(config)  # keys that the old file lacks have their defaults
        for section in new:
            if section not in _FREE and old[section] != new[section]:
                raise UserError(
                    f"{directory} holds a run with another {section}: choose another name=, or delete that directory"
                )
        if old["checkpoint"]["count"] != config.checkpoint.count:
            raise UserError(f"{directory} holds a run with another checkpoint.count: choose another name=")
    write_text(path, to_yaml(config))
