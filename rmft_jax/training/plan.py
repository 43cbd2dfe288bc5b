"""`rmft plan`: what a run takes and whether it fits, before there is any device."""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from rmft_jax.config import Config, with_changes
from rmft_jax.data.prepare import load_prepared
from rmft_jax.devices import fake_devices, tpu_devices
from rmft_jax.errors import UserError
from rmft_jax.kernels import SurrogateBank
from rmft_jax.models.gpt import count_params, flops_per_token
from rmft_jax.training.collectives import collectives
from rmft_jax.training.fitting import check_fit
from rmft_jax.training.memory import Inputs, Memory, abstract_batch, abstract_state, estimate, inputs_of, say_bytes
from rmft_jax.training.mesh import abstract_mesh, check_mesh, make_mesh, mesh_sizes
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.roofline import CHIPS, Chip, expected_bytes, expected_kinds, step_time
from rmft_jax.training.setup import load_mixture, make_plan
from rmft_jax.training.step import compile_train_step

SCHEMA = 1
# Where no data say: slots of a row, values of the corpus, tables of the bank, how many of them are full, tokens of an entry.
_COMPONENTS, _SPANS, _IDENTITIES, _TABLES, _FULL, _PIECES = 64, 16, 4096, 12, 4, 3


def plan(
    config: Config, *, devices: int = 1, limit: int | None = None, compile: bool = False, chip: str = "", topology: str = ""
) -> dict:
    """Return what a run of `config` takes on so many devices of `limit` bytes each; no device is touched.

    compile: also compile the step for that many fake CPU devices, for XLA's own figures (takes seconds to minutes).
    chip: one of roofline.CHIPS, for the time of a step; its memory is the limit unless another is said.
    topology: of a slice of that chip, such as 16x16: compile by the TPU's own compiler, which needs libtpu but no TPU.

    Returns schema, devices, mesh, data (where vocabulary and length of the data come from), parameters, tokens_per_step,
    flops_per_token, flops_per_step, steps, epochs (None where neither data nor training.steps say), memory (bytes of a
    device: arguments and phases by name, peak, temp, total, certain), limit, fits (None without a limit), error (the line
    that says what to change, None if it fits), with `chip` roofline (see `roofline.step_time`), and with `compile` or
    `topology` compiled (bytes of a device by XLA: arguments, temp, total, and ratio, our figure / XLA's, of each; compiler;
    seconds; collectives, kind -> count and bytes, None of the TPU's compiler, whose programs do not tell how often a loop
    runs; expected, bytes by purpose by the sharding rules).
    Raises UserError when the mesh does not fit the devices or something does not divide it.
    """
    inputs, run, data = _data(config)
    mesh = abstract_mesh(config.mesh, devices)
    check_mesh(config, mesh, inputs.vocab_size)
    shapes, _ = abstract_state(config, inputs, mesh)
    memory, training = estimate(config, inputs, mesh), config.training
    tokens = training.batch_size * training.sequence_length
    flops = flops_per_token(config.model, inputs.vocab_size, training.sequence_length, config.lora)
    error = None
    if chip and limit is None:
        limit = int(_chip(chip).memory)
    if limit is not None:
        try:
            check_fit(config, inputs, mesh, memory, limit)
        except UserError as refusal:
            error = str(refusal)
    return {
        "schema": SCHEMA,
        "devices": devices,
        "mesh": dict(mesh.shape),
        "data": data,
        "parameters": count_params(shapes["params"]),
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        "flops_per_step": flops * tokens,
        **run,
        "memory": {
            "arguments": memory.arguments,
            "phases": memory.phases,
            "peak": memory.peak,
            "temp": memory.temp,
            "total": memory.total,
            "certain": memory.certain,
        },
        "limit": limit,
        "fits": None if limit is None else error is None,
        "error": error,
        **({"roofline": step_time(config, inputs.vocab_size, memory, devices, _chip(chip))} if chip else {}),
        **({"compiled": _compiled(config, inputs, devices, memory, chip, topology)} if compile or topology else {}),
    }


def scaling_table(config: Config, chip: str, *, most: int, weak: bool = False) -> list[dict]:
    """Return what the roofline says of a config on twice as many chips again and again, up to `most`.

    It begins with the devices that the config's mesh has, -1 as 1, and stops where something does not divide; the axis
    that is -1 grows, else mesh.fsdp. weak: the batch grows with the chips, otherwise it stays (strong).

    Returns a row for each: devices, batch_size, step_seconds, tokens_per_second, mfu, bound, total (bytes of a device),
    fits, and efficiency (tokens a second and chip, in relation to the first row).
    """
    axes = dataclasses.asdict(config.mesh)
    free = next((name for name, size in axes.items() if size == -1), "fsdp")
    first = math.prod(size for size in axes.values() if size > 0)
    rows, devices = [], first
    while devices <= most:
        grown = devices // first
        changes = {"mesh": axes | {free: max(axes[free], 1) * grown}}
        changes["training"] = {"batch_size": config.training.batch_size * (grown if weak else 1)}
        try:
            found = plan(with_changes(config, changes), devices=devices, chip=chip)
        except UserError:
            break
        roofline = found["roofline"]
        row = {"devices": devices, "batch_size": changes["training"]["batch_size"], "total": found["memory"]["total"]}
        row |= {name: roofline[name] for name in ("step_seconds", "tokens_per_second", "mfu", "bound")}
        row["fits"] = found["fits"]
        rows.append(row | {"efficiency": 1.0})
        each = [rows[place]["tokens_per_second"] / rows[place]["devices"] for place in (-1, 0)]
        rows[-1]["efficiency"] = each[0] / each[1]
        devices *= 2
    if not rows:
        raise UserError(f"the config does not fit {first} devices: see rmft plan --devices {first}")
    return rows


def _chip(name: str) -> Chip:
    if name not in CHIPS:
        raise UserError(f"unknown chip {name!r}: the roofline knows {', '.join(CHIPS)}")
    return CHIPS[name]


def compile_step(config: Config, inputs: Inputs, devices: list[jax.Device]) -> jax.stages.Compiled:
    """Return the train step compiled for devices, from shapes alone: nothing is put on them."""
    if config.privacy.epsilon:  # the noise that it takes changes no shape
        config = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, epsilon=0.0, noise_multiplier=1.0))
    mesh, steps = make_mesh(config.mesh, devices), config.training.steps_per_dispatch
    check_mesh(config, mesh, inputs.vocab_size)
    shapes, _ = abstract_state(config, inputs, mesh)
    batch = abstract_batch(config, inputs)
    if steps > 1:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype), batch)
    optimizer = make_optimizer(config.training, 1000)
    return compile_train_step(config, optimizer, mesh, shapes, steps=steps).lower(shapes, batch, inputs.bank).compile()


def assumed_inputs(config: Config) -> Inputs:
    """Return shapes as prepared data have them, where there are none: the vocabulary is the config's."""
    entries, types = _FULL * config.masking.surrogates, len(config.pii.names)
    lengths = {"tokens": _PIECES * entries, "begins": entries, "lengths": entries, "values": entries, "real": _IDENTITIES}
    lengths |= {"anchors": types, "placeholder": types}
    fields = {name: jax.ShapeDtypeStruct((lengths.get(name, _TABLES),), jnp.int32) for name in SurrogateBank._fields}
    fields |= {"empty": jax.ShapeDtypeStruct((), jnp.int32), "real": jax.ShapeDtypeStruct((_IDENTITIES,), jnp.uint32)}
    return Inputs(config.tokenizer.vocab_size, _IDENTITIES, _COMPONENTS, _SPANS, SurrogateBank(**fields))


def describe(result: dict) -> str:
    """Return what `plan` has found as lines to read."""
    memory, sizes = result["memory"], " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    steps = "not known without data" if result["steps"] is None else f"{result['steps']:,}"
    epochs = "" if result["epochs"] is None else f", {result['epochs']:.2f} epochs"
    lines = [
        f"{result['parameters']:,} parameters on {result['devices']} device(s), mesh {sizes}; {result['data']}",
        f"{result['tokens_per_step']:,} tokens and {result['flops_per_step']:.3g} FLOP a step "
        f"({result['flops_per_token'] / 1e6:.1f} MFLOP a token); steps {steps}{epochs}",
        f"memory of a device, about {say_bytes(memory['total'])}, at its most in the {memory['peak']} phase:",
    ]
    for name, size in (memory["arguments"] | memory["phases"][memory["peak"]]).items():
        if size:
            lines.append(f"  {name:24}{say_bytes(size):>10}{100 * size / memory['total']:6.1f}%")
    if found := result.get("roofline"):
        parts = ", ".join(f"{name} {1000 * value:,.1f}" for name, value in found["seconds"].items() if value)
        lines.append(
            f"a step takes at least {1000 * found['step_seconds']:,.1f} ms: {found['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {100 * found['mfu']:.0f}%; ms by part: {parts}"
        )
    if found := result.get("compiled"):
        ours = memory | {"arguments": memory["total"] - memory["temp"]}
        for name, ratio in found["ratio"].items():
            by = f"{say_bytes(found[name])} by XLA for {found['compiler']}"
            lines.append(f"  {name}: {by}, {say_bytes(ours[name])} here, {ratio:.3f}")
        if found["compiler"] == "CPU":
            lines.append("  (XLA lays buffers out otherwise for other devices; for CPU it computes bfloat16 in float32)")
        for kind, sent in (found["collectives"] or {}).items():
            lines.append(f"  {kind}: {sent['count']:,} of {say_bytes(sent['bytes'])} in all")
        kinds = ", ".join(f"{kind} {say_bytes(size)}" for kind, size in expected_kinds(found["expected"]).items())
        wanted = say_bytes(sum(found["expected"].values()))
        lines.append(f"  sent by the sharding rules: {wanted} ({kinds or 'nothing'}); compiled in {found['seconds']:.0f} s")
    if result["fits"]:
        lines.append(f"fits: {say_bytes(memory['total'])} of {say_bytes(result['limit'])}")
    return "\n".join(lines)


def describe_scaling(rows: list[dict]) -> str:
    """Return what `scaling_table` has found as a table in Markdown."""
    lines = ["| chips | sequences | ms a step | tokens/s | MFU | efficiency | longest part | memory |", "|---" * 8 + "|"]
    for row in rows:
        memory = say_bytes(row["total"]) + ("" if row["fits"] else ", too much")
        lines.append(
            f"| {row['devices']:,} | {row['batch_size']:,} | {1000 * row['step_seconds']:,.0f} "
            f"| {row['tokens_per_second']:,.0f} | {row['mfu']:.2f} | {row['efficiency']:.2f} | {row['bound']} | {memory} |"
        )
    return "\n".join(lines)


def _data(config: Config) -> tuple[Inputs, dict, str]:
    """Return the shapes of the inputs, steps and epochs, and where they come from."""
    steps = {"steps": config.training.steps or None, "epochs": None}
    if not (config.data_dir / "manifest.json").exists():
        return assumed_inputs(config), steps, f"no data prepared in {config.data_dir}, shapes assumed"
    try:
        prepared = load_prepared(config)
    except UserError as error:
        return assumed_inputs(config), steps, f"data in {config.data_dir} are of another config, shapes assumed ({error})"
    prepared, _, blocks, _ = load_mixture(config, prepared)
    run = make_plan(config, len(blocks.own))
    known = {"steps": run.steps, "epochs": run.steps / run.steps_per_epoch}
    parts = [f"{len(blocks.own):,} blocks in {config.data_dir}"]
    for part, source in zip(config.training.mix, blocks.sources[1:], strict=True):
        parts.append(f"{100 * part.weight:g}% of the sequences from {len(source):,} in {part.data}")
    return inputs_of(prepared, blocks), known, ", ".join(parts)


def _compiled(config: Config, inputs: Inputs, devices: int, memory: Memory, chip: str, topology: str) -> dict:
    """Return XLA's own bytes of a device, and the plan's in relation to them.

    Arguments are with those arrays that the step does not read: XLA leaves them out, but `train` keeps them on the device.
    """
    there = tpu_devices(chip, topology) if topology else fake_devices(devices)
    if len(there) != devices:
        raise UserError(f"topology {topology} of {chip} has {len(there)} devices, not {devices}: set --devices {len(there)}")
    begin = time.monotonic()
    compiled = compile_step(config, inputs, there)
    seconds = time.monotonic() - begin
    found, (_, batch, bank) = compiled.memory_analysis(), compiled.input_shardings[0]
    sizes = mesh_sizes(config.mesh, devices)
    share = sizes["replica"] * sizes["fsdp"] / config.training.steps_per_dispatch
    rows = zip(abstract_batch(config, inputs), batch, strict=True)
    unread = sum(round(x.size * x.dtype.itemsize / share) for x, used in rows if not used)
    unread += sum(x.size * x.dtype.itemsize for x, used in zip(inputs.bank, bank, strict=True) if not used)
    arguments = found.argument_size_in_bytes + unread
    temp = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    theirs = {"arguments": arguments, "temp": temp, "total": arguments + temp}
    ours = {"arguments": memory.total - memory.temp, "temp": memory.temp, "total": memory.total}
    return theirs | {
        "ratio": {name: ours[name] / theirs[name] for name in theirs},
        "compiler": f"TPU {chip} {topology}" if topology else "CPU",
        "seconds": seconds,
        "collectives": None if topology else collectives(compiled.as_text()),
        "expected": expected_bytes(config, devices),
    }
