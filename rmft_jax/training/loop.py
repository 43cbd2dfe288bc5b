"""`rmft train`: the data flow of one run, from prepared data to evaluated checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import Config, load_config, to_dict, to_yaml
from rmft_jax.data.blocks import Blocks, Corpus, kept
from rmft_jax.data.loader import batches
from rmft_jax.data.packing import best_fit
from rmft_jax.data.prepare import Prepared, load_prepared
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.devices import device_memory, is_main, keep_programs, peak_flops
from rmft_jax.errors import Preempted, UserError
from rmft_jax.files import read_json, read_lines, write_json, write_text
from rmft_jax.kernels import TaggedBatch
from rmft_jax.models.gpt import count_params, flops_per_token
from rmft_jax.progress import say, track
from rmft_jax.training.attention import choose_attention
from rmft_jax.training.checkpoints import Checkpoints, abstract
from rmft_jax.training.evaluation import early_stopping, evaluate
from rmft_jax.training.fitting import check_fit
from rmft_jax.training.masking import masked_share
from rmft_jax.training.memory import describe_memory, estimate, inputs_of
from rmft_jax.training.mesh import batch_sharding, check_mesh, make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.peers import Peers, peer_timeout
from rmft_jax.training.preemption import Preemption
from rmft_jax.training.privacy import UNIT, Accountant, resolve_privacy
from rmft_jax.training.step import compile_eval_step, compile_train_step, init_state, model_of
from rmft_jax.training.tracker import read_tags, tag_canaries, tracker_shape
from rmft_jax.training.tracker_log import TrackerLog

SCHEMA = 1
_GIVE_UP = 20  # steps left out in a row
_FREE = ("out", "data", "audit", "checkpoint", "mesh", "study")  # sections that may change between a run and its resumption


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arithmetic of a run."""

    steps: int
    steps_per_epoch: float
    checkpoint_steps: tuple[int, ...]


def train(config: Config) -> Path:
    """Train one model as `config` says; return the run's directory.

    The directory holds config.yaml, run.json, metrics.jsonl, tensorboard/, evaluation.json and checkpoints/, and with
    tracker.enabled memorization.jsonl. A run that was interrupted goes on from its newest checkpoint, with the same numbers
    as an undisturbed one; a finished one stays. Raises Preempted, after saving, when the process is told to stop.
    """
    if config.training.objective != "causal":
        raise UserError("training.objective is masked: such models cannot be audited; `rmft study scaling` trains them")
    prepared = load_prepared(config)
    blocks, heldout = load_blocks(config, prepared)
    plan = make_plan(config, len(blocks))
    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh, prepared.tokenizer.vocab_size)
    inputs = inputs_of(prepared, blocks)
    attending = choose_attention(config, mesh)
    memory, limit = estimate(attending, inputs, mesh), device_memory()
    check_fit(config, inputs, mesh, memory, limit, certain=True)
    initial = _initial_params(config, prepared) if config.training.init_from else None
    resolved, accountant = resolve_privacy(attending, len(blocks), plan.steps)
    directory = config.run_dir
    if is_main():
        _claim(directory, config)
    config = resolved
    keep_programs()

    optimizer = make_optimizer(config.training, plan.steps)
    sizes = config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, tracker_shape(config, len(blocks))
    init = lambda: init_state(*sizes, blocks=len(blocks))  # noqa: E731
    shapes = jax.eval_shape(init)
    shardings = shardings_for(shapes, mesh)
    checkpoints = Checkpoints(
        directory / "checkpoints", keep_steps=plan.checkpoint_steps, keep_last=config.checkpoint.keep_last
    )
    done = checkpoints.steps()
    stopped = _stopped_at(directory, config)
    if done and (done[-1] >= plan.steps or done[-1] == stopped):
        early = f", stopped early out of {plan.steps}" if done[-1] < plan.steps else ""
        say(f"{directory}: already trained, {done[-1]} steps{early}")
        checkpoints.close()
        return directory
    found = checkpoints.restore_newest(abstract(shapes, shardings))
    if found:
        state = found[1]
    else:
        state = jax.jit(init, out_shardings=shardings)()
        if initial is not None:
            state["params"] = jax.device_put(initial, shardings["params"])
            if "average" in state:
                state["average"] = jax.tree.map(jnp.copy, state["adapters" if config.lora.rank else "params"])
    _say_plan(config, prepared, plan, mesh, state, blocks, accountant, found, describe_memory(memory, limit))
    if is_main():
        write_json(directory / "run.json", _describe(config, plan, shapes, blocks, accountant))
    try:
        with Peers(peer_timeout()) as peers, Preemption() as preemption:
            _run(config, plan, mesh, state, shapes, optimizer, prepared, blocks, heldout, accountant, checkpoints, directory,
                 peers, preemption)  # fmt: skip
    finally:
        checkpoints.close()
    return directory


def load_blocks(config: Config, prepared: Prepared) -> tuple[Blocks, Blocks]:
    """Return the training and the held-out blocks; the former without duplicates, as dedup.policy says."""
    drop = {"drop_near": config.dedup.policy != "none", "drop_exact": config.dedup.policy == "near_exact"}
    stride = config.training.sequence_length - config.masking.margin
    tags, records, edges = read_tags(config, prepared), read_corpus(prepared.directory, "train"), None
    if config.training.packing == "best_fit":
        records = list(records)
        order, edges = best_fit(np.array([kept(record, **drop).sum() for record in records]), stride)
        if tags is not None:
            cuts = np.cumsum([len(record["tokens"]) for record in records])[:-1]
            parts = np.split(tags, cuts)
            tags = np.concatenate([parts[number] for number in order])
        records = [records[number] for number in order]
    train = Corpus(records, **drop, scope=config.masking.scope, tags=tags)
    tag_canaries(train, prepared, config)
    blocks = Blocks(train, stride=stride, edges=edges)
    return blocks, Blocks(Corpus(read_corpus(prepared.directory, "heldout")), stride=config.training.sequence_length)


def make_plan(config: Config, blocks: int) -> Plan:
    """Return how many steps the run takes and after which ones it is saved."""
    training, count = config.training, config.checkpoint.count
    per_epoch = blocks / training.batch_size
    steps = training.steps or max(1, round(training.epochs * per_epoch))
    if count > steps:
        raise UserError(f"checkpoint.count {count} is more than the {steps} steps of the run: lower it or train longer")
    return Plan(steps, per_epoch, tuple(sorted({round(steps * (i + 1) / count) for i in range(count)})))


def _run(
    config, plan, mesh, state, shapes, optimizer, prepared, blocks, heldout, accountant, checkpoints, directory, peers,
    preemption,
) -> None:  # fmt: skip
    """Take the steps. Metrics of a step are read after the next one is dispatched, so that the device never waits."""
    most, every = config.training.steps_per_dispatch, config.checkpoint.every_steps
    step_fns = {count: compile_train_step(config, optimizer, mesh, shapes, steps=count) for count in {1, most}}
    eval_step = compile_eval_step(config, mesh)
    bank = jax.device_put(prepared.bank, replicated(mesh))
    begin = int(state["step"])
    local = {"process": jax.process_index(), "processes": jax.process_count()}
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed, start=begin, **local)
    log = MetricsLog(directory, plan, config, begin, flops=_flops(config, prepared, mesh))
    memory = None
    if config.tracker.enabled:
        memory = TrackerLog(directory, config, len(blocks), begin, state["tracker"]["counts"])
    stops = set(plan.checkpoint_steps) | (set(range(every, plan.steps, every)) if every else set())
    profile = Profile(directory / "profile", config.training.profile_at)
    work = dispatches(begin, plan.steps, most, stops)
    title = f"train {config.run_name}"
    for step, count in track(work, title, plan.steps, done=begin, status=log.status, size=lambda item: item[1]):
        with log.waiting():
            batch = put([next(source) for _ in range(count)], mesh)
        with profile.of(step):
            state, metrics = step_fns[count](state, batch, bank)
        peers.advance()
        if accountant and step in plan.checkpoint_steps:
            metrics |= {"epsilon": accountant.epsilon(step)}
        if memory:
            memory.add(step, count, metrics.pop("tracker"))
        log.add(step, count, metrics)
        if memory and step in stops:
            memory.flush()
        if step in plan.checkpoint_steps:
            log.flush()
            scores = evaluate(
                eval_step, model_of(state), heldout, batch_size=config.training.batch_size, sharding=batch_sharding(mesh)
            )
            seen = int(np.ravel(metrics["seen"])[-1])
            stop = _add_evaluation(directory, plan, step, scores, seen, config.training.early_stopping)
            log.scores(step, scores)
            if stop and is_main():
                write_json(directory / "run.json", _describe(config, plan, shapes, blocks, accountant, stop))
            checkpoints.save(state)
            if stop and stop["stopped"]:
                say(f"stopped at step {step} of {plan.steps}; held-out perplexity was best at step {stop['best_step']}")
                break
        elif step in stops:
            log.flush()
            checkpoints.save(state)
        if preemption.notified() and step < plan.steps:
            log.flush()
            if step not in stops:
                if memory:
                    memory.flush()
                checkpoints.save(state)
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


def _flops(config: Config, prepared: Prepared, mesh) -> tuple[int, float | None]:
    """Return the operations of a step, and the peak of all devices in operations a second, None where it is not known."""
    training, peak = config.training, peak_flops()
    tokens = training.batch_size * training.sequence_length
    flops = flops_per_token(config.model, prepared.tokenizer.vocab_size, training.sequence_length, config.lora)
    return tokens * flops, peak and peak * mesh.size


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
    """metrics.jsonl and TensorBoard, one record every `log_every` steps; lines after the resumed step are dropped.

    Besides the metrics of the step, a record has those of the time since the record before: tokens_per_second;
    input_wait_pct, how much of it the host waited for data (the devices are ahead of it or behind: what they waited is no
    more); mfu, operations a second by `flops_per_token` / peak of the devices, None where the peak is not known.
    """

    def __init__(self, directory: Path, plan: Plan, config: Config, begin: int, *, flops: tuple[int, float | None]):
        """flops: operations of a step, peak of all devices in operations a second."""
        self._path, self._every, self._plan = directory / "metrics.jsonl", config.training.log_every, plan
        self._tokens, self._flops = config.training.batch_size * config.training.sequence_length, flops
        self._board = None
        if is_main():
            import tensorboardX

            kept = [record for record in read_lines(self._path) if record["step"] <= begin]
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._board = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=begin)
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
            step, _, metrics = self._pending
            self._write(step, {name: np.ravel(value)[-1] for name, value in metrics.items()})
            self._pending = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent within as waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def scores(self, step: int, scores: dict) -> None:
        """Send held-out scores to TensorBoard."""
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
                self._write(step, {name: np.ravel(value)[place if count > 1 else -1] for name, value in metrics.items()})

    def _write(self, step: int, metrics: dict) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        in_a_row = int(values.pop("skipped_in_a_row", 0))
        if in_a_row >= _GIVE_UP:
            raise UserError(
                f"the last {in_a_row} steps up to {step} were left out, with the loss {values['loss']}: lower "
                f"training.learning_rate, clip harder or raise training.skip_above"
            )
        now = time.monotonic()
        if step > self._since:
            seconds, steps = max(now - self._clock, 1e-9), step - self._since
            operations, peak = self._flops
            self._rate = steps * self._tokens / seconds
            values["input_wait_pct"] = 100 * min(1.0, self._waited / seconds)
            values["mfu"] = steps * operations / seconds / peak if peak else math.nan
        self._since, self._clock, self._waited, self._loss = step, now, 0.0, values["loss"]
        if not self._board:
            return
        record = {"step": step, "epoch": step / self._plan.steps_per_epoch, **values, "tokens_per_second": self._rate}
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"train/{name}", value, step)


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


def _describe(
    config: Config, plan: Plan, state: dict, blocks: Blocks, accountant: Accountant | None, stop: dict | None = None
) -> dict:
    taken = stop["step"] if stop and stop["stopped"] else plan.steps
    return {
        "schema": SCHEMA,
        "name": config.run_name,
        "method": config.method,
        "parameters": count_params(state["params"]),
        **({"trained_parameters": count_params(state["adapters"])} if config.lora.rank else {}),
        "steps": plan.steps,
        "epochs": plan.steps / plan.steps_per_epoch,
        "training_tokens": len(blocks.corpus.tokens),
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


def _initial_params(config: Config, prepared: Prepared) -> dict:
    from rmft_jax.models.gpt import init_params

    checkpoints, step = Checkpoints.open(Path(config.training.init_from))
    key = jax.random.key(0)
    target = jax.eval_shape(lambda: init_params(config.model, prepared.tokenizer.vocab_size, key))
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = abstract(target, jax.tree.map(lambda _: host, target))
    return checkpoints.restore_params(step, target)


def _say_plan(
    config: Config, prepared: Prepared, plan: Plan, mesh, state: dict, blocks: Blocks, accountant, found: tuple | None,
    memory: str,
) -> None:  # fmt: skip
    training = config.training
    flops = flops_per_token(config.model, prepared.tokenizer.vocab_size, training.sequence_length, config.lora)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    tokens = training.batch_size * training.sequence_length
    rank = prepared.manifest["train"]
    replaced, occurrences = masked_share(config, blocks)
    say(
        f"run {config.run_name}: {count_params(state['params']):,} parameters, {flops / 1e6:.1f} MFLOP/token, "
        f"{training.dtype}, attention {training.attention}, {training.optimizer}\n"
        f"  mesh {sizes} on {jax.device_count()} {jax.devices()[0].platform} device(s); "
        f"{training.batch_size} sequences x {training.sequence_length} = {tokens:,} tokens a step\n"
        f"  {plan.steps:,} steps, {plan.steps / plan.steps_per_epoch:.2f} epochs of {len(blocks):,} blocks "
        f"({len(blocks.corpus.tokens):,} of {rank['tokens']:,} tokens; dedup {config.dedup.policy})\n"
        f"  {memory}\n"
        f"  masking {config.masking.policy}: {replaced:,} ({100 * replaced / max(1, occurrences):.1f}%) of {occurrences:,} "
        f"PII occurrences are replaced"
        + (f"\n  {_lora_line(config, state)}" if config.lora.rank else "")
        + _privacy_line(accountant, plan)
        + _mfu_line(mesh)
        + (f"\n  going on from step {found[0]}" if found else "")
    )


def _lora_line(config: Config, state: dict) -> str:
    lora, count = config.lora, count_params(state["adapters"])
    base = config.training.init_from or "random weights (training.init_from is empty)"
    return f"LoRA of rank {lora.rank} on {', '.join(lora.targets)}: {count:,} parameters are trained, on top of {base}"


def _mfu_line(mesh) -> str:
    if not (peak := peak_flops()):
        return ""
    return (
        f"\n  MFU = tokens/s x FLOP/token / ({mesh.size} x {peak / 1e12:,.0f} TFLOP/s), where a token counts 6 FLOP for a "
        f"weight in a matrix product and 12 H D for each of the T / 2 positions that it sees on average"
    )


def _privacy_line(accountant: Accountant | None, plan: Plan) -> str:
    if accountant is None:
        return ""
    about = accountant.describe(plan.steps)
    return (
        f"\n  DP-SGD: epsilon {about['epsilon']:.3g} at delta {about['delta']:.2g} after the last step, for {UNIT}; "
        f"assumed: {about['sampling_means']}; noise multiplier {about['noise_multiplier']:.3g}, clip {about['clip_norm']:g}"
    )
