"""What a run is made of before its first step: data, arithmetic, mesh, optimizer, the shapes of its state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rmft_jax.config import Config, load_config
from rmft_jax.data.blocks import Blocks, Corpus, kept
from rmft_jax.data.loader import Mixture, shares
from rmft_jax.data.mixing import open_mix, unite
from rmft_jax.data.packing import best_fit
from rmft_jax.data.prepare import Prepared, load_prepared, source_name
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.devices import device_memory, peak_flops
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import count_params, flops_per_token, init_params
from rmft_jax.paths import as_path
from rmft_jax.training.attention import choose_attention
from rmft_jax.training.checkpoints import Checkpoints, abstract
from rmft_jax.training.fitting import check_fit
from rmft_jax.training.masking import masked_share
from rmft_jax.training.memory import describe_memory, estimate, inputs_of
from rmft_jax.training.mesh import check_mesh, make_mesh, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.privacy import UNIT, Accountant, resolve_privacy
from rmft_jax.training.step import init_state
from rmft_jax.training.tracker import read_tags, tag_canaries, tracker_shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arithmetic of a run. steps_per_epoch: of the run's own corpus."""

    steps: int
    steps_per_epoch: float
    checkpoint_steps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """config: with what was left to choose chosen. prepared: the run's own data, with the surrogates of all corpora. others:
    those of training.mix. memory: a line on it. shapes: of the train state. initial: parameters to start from, None where
    they are random. accountant: of privacy, None without DP-SGD."""

    config: Config
    prepared: Prepared
    others: list[Prepared]
    blocks: Mixture
    heldout: Blocks
    plan: Plan
    mesh: Mesh
    optimizer: optax.GradientTransformation
    accountant: Accountant | None
    memory: str
    shapes: dict
    initial: dict | None

    @property
    def target(self) -> dict:
        """Return shapes, dtypes and shardings of the train state, for `Checkpoints.restore`."""
        return abstract(self.shapes, shardings_for(self.shapes, self.mesh))

    def begin(self) -> dict:
        """Return the train state at step 0, on the devices."""
        shardings = shardings_for(self.shapes, self.mesh)
        state = jax.jit(self._init, out_shardings=shardings)()
        if self.initial is not None:
            state["params"] = jax.device_put(self.initial, shardings["params"])
            if "average" in state:
                state["average"] = jax.tree.map(jnp.copy, state["adapters" if self.config.lora.rank else "params"])
        return state

    def _init(self) -> dict:
        return _initial_state(self.config, self.prepared, self.blocks, self.optimizer)


def set_up(config: Config) -> Run:
    """Read the data and choose what the config leaves open; nothing is written. Raises UserError where it cannot be run."""
    prepared = load_prepared(config)
    prepared, others, blocks, heldout = load_mixture(config, prepared)
    plan = make_plan(config, len(blocks.own))
    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh, prepared.tokenizer.vocab_size)
    inputs = inputs_of(prepared, blocks)
    attending = choose_attention(config, mesh)
    memory, limit = estimate(attending, inputs, mesh), device_memory()
    check_fit(config, inputs, mesh, memory, limit, certain=True)
    initial = _initial_params(config, prepared) if config.training.init_from else None
    config, accountant = resolve_privacy(attending, len(blocks.own), plan.steps)
    optimizer = make_optimizer(config.training, plan.steps)
    shapes = jax.eval_shape(lambda: _initial_state(config, prepared, blocks, optimizer))
    return Run(config, prepared, others, blocks, heldout, plan, mesh, optimizer, accountant, describe_memory(memory, limit),
               shapes, initial)  # fmt: skip


def _initial_state(config: Config, prepared: Prepared, blocks: Mixture, optimizer: optax.GradientTransformation) -> dict:
    tracker = tracker_shape(config, len(blocks.own))
    return init_state(
        config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, tracker, blocks=len(blocks)
    )


def load_run_config(run: Path, overrides: list[str] = ()) -> Config:
    """Read a run's resolved config; `out` and `data` follow the directory if it was moved. UserError if it is no run."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run (no config.yaml in it): name a directory that `rmft train` wrote")
    config = load_config(run / "config.yaml", overrides)
    if not config.data and not (config.data_dir / "manifest.json").exists():
        config = load_config(run / "config.yaml", [*overrides, f"data={run.resolve().parent.parent / 'data'}"])
    return config


def load_mixture(config: Config, prepared: Prepared) -> tuple[Prepared, list[Prepared], Mixture, Blocks]:
    """Return the prepared data with the surrogates of all corpora, those of training.mix, the training blocks of all, and
    the held-out blocks of the run's own. Raises UserError as `open_mix`."""
    others = open_mix(config, prepared)
    own, heldout = load_blocks(config, prepared)
    sources = [own, *(_training_blocks(config, other) for other in others)]
    if others:
        bank = unite([prepared, *others], [blocks.corpus for blocks in sources], config)
        prepared = dataclasses.replace(prepared, bank=bank)
    return prepared, others, Mixture(sources, config.training.weights), heldout


def load_blocks(config: Config, prepared: Prepared) -> tuple[Blocks, Blocks]:
    """Return the training and the held-out blocks of one corpus; the former without duplicates, as dedup.policy says."""
    blocks = _training_blocks(config, prepared, read_tags(config, prepared))
    tag_canaries(blocks.corpus, prepared, config)
    return blocks, Blocks(Corpus(read_corpus(prepared.directory, "heldout")), stride=config.training.sequence_length)


def _training_blocks(config: Config, prepared: Prepared, tags: np.ndarray | None = None) -> Blocks:
    drop = {"drop_near": config.dedup.policy != "none", "drop_exact": config.dedup.policy == "near_exact"}
    stride = config.training.sequence_length - config.masking.margin
    records, edges = read_corpus(prepared.directory, "train"), None
    if config.training.packing == "best_fit":
        records = list(records)
        order, edges = best_fit(np.array([kept(record, **drop).sum() for record in records]), stride)
        if tags is not None:
            cuts = np.cumsum([len(record["tokens"]) for record in records])[:-1]
            parts = np.split(tags, cuts)
            tags = np.concatenate([parts[number] for number in order])
        records = [records[number] for number in order]
    return Blocks(Corpus(records, **drop, scope=config.masking.scope, tags=tags), stride=stride, edges=edges)


def describe_mix(run: Run) -> list[dict]:
    """Return of each corpus in training.mix: data, source (its name in results), weight, content_hash, blocks, tokens, and
    epochs (how often the run goes through it)."""
    examples = shares(run.config.training.weights, run.plan.steps * run.config.training.batch_size)
    rows = zip(run.config.training.mix, run.others, run.blocks.sources[1:], examples[1:], strict=True)
    return [
        {
            "data": part.data,
            "source": source_name(other.manifest),
            "weight": part.weight,
            "content_hash": other.manifest["content_hash"],
            "blocks": len(blocks),
            "tokens": len(blocks.corpus.tokens),
            "epochs": count / len(blocks),
        }
        for part, other, blocks, count in rows
    ]


def make_plan(config: Config, blocks: int) -> Plan:
    """Return how many steps the run takes and after which ones it is saved. blocks: of the run's own corpus."""
    training, count = config.training, config.checkpoint.count
    per_epoch = blocks / (training.batch_size * training.own_share)
    steps = training.steps or max(1, round(training.epochs * per_epoch))
    if count > steps:
        raise UserError(f"checkpoint.count {count} is more than the {steps} steps of the run: lower it or train longer")
    return Plan(steps, per_epoch, tuple(sorted({round(steps * (i + 1) / count) for i in range(count)})))


def _initial_params(config: Config, prepared: Prepared) -> dict:
    checkpoints, step = Checkpoints.open(as_path(config.training.init_from))
    key = jax.random.key(0)
    target = jax.eval_shape(lambda: init_params(config.model, prepared.tokenizer.vocab_size, key))
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = abstract(target, jax.tree.map(lambda _: host, target))
    return checkpoints.restore_params(step, target)


def describe(run: Run, state: dict) -> str:
    """Return what was decided, in lines for people."""
    config, prepared, plan, mesh, blocks = run.config, run.prepared, run.plan, run.mesh, run.blocks
    training = config.training
    flops = flops_per_token(config.model, prepared.tokenizer.vocab_size, training.sequence_length, config.lora)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    tokens = training.batch_size * training.sequence_length
    rank = prepared.manifest["train"]
    replaced, occurrences = masked_share(config, blocks.own)
    return (
        f"run {config.run_name}: {count_params(state['params']):,} parameters, {flops / 1e6:.1f} MFLOP/token, "
        f"{training.dtype}, attention {training.attention}, {training.optimizer}\n"
        f"  mesh {sizes} on {jax.device_count()} {jax.devices()[0].platform} device(s); "
        f"{training.batch_size} sequences x {training.sequence_length} = {tokens:,} tokens a step\n"
        f"  {plan.steps:,} steps, {plan.steps / plan.steps_per_epoch:.2f} epochs of {len(blocks.own):,} blocks "
        f"({len(blocks.own.corpus.tokens):,} of {rank['tokens']:,} tokens; dedup {config.dedup.policy})\n"
        f"  {run.memory}\n"
        f"  masking {config.masking.policy}: {replaced:,} ({100 * replaced / max(1, occurrences):.1f}%) of {occurrences:,} "
        f"PII occurrences are replaced"
        + _mix_lines(run)
        + (f"\n  {_lora_line(config, state)}" if config.lora.rank else "")
        + _privacy_line(run.accountant, plan)
        + _mfu_line(mesh)
    )


def _mix_lines(run: Run) -> str:
    lines = ""
    for mixed, blocks in zip(describe_mix(run), run.blocks.sources[1:], strict=True):
        replaced, occurrences = masked_share(run.config, blocks)
        lines += (
            f"\n  {100 * mixed['weight']:g}% of the sequences from {mixed['data']}: {mixed['epochs']:.2f} epochs of "
            f"{mixed['blocks']:,} blocks; {replaced:,} of {occurrences:,} PII occurrences are replaced"
        )
    return lines


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
