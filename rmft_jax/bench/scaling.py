"""`rmft bench scaling`: memory and traffic of the train step on meshes of fake devices, against the sharding rules."""

from __future__ import annotations

import dataclasses

from rmft_jax.bench import environment
from rmft_jax.config import Config, MeshConfig
from rmft_jax.devices import fake_devices
from rmft_jax.errors import UserError
from rmft_jax.progress import track
from rmft_jax.training.collectives import collectives
from rmft_jax.training.plan import assumed_inputs, compile_step
from rmft_jax.training.roofline import expected_bytes

MESHES = (
    {},
    {"replica": 2},
    {"fsdp": 2},
    {"tensor": 2},
    {"context": 2},
    {"fsdp": 4},
    {"fsdp": 2, "tensor": 2},
    {"replica": 8},
    {"fsdp": 8},
    {"replica": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"replica": 2, "fsdp": 2, "context": 2},
)


def run(config: Config, peer: str = "", *, meshes: tuple[dict, ...] = MESHES) -> dict:
    """Compile the train step for meshes of up to 8 fake CPU devices and count what a device holds and sends.

    Nothing is executed: arrays are shapes, so that any model can be looked at. What is counted is what XLA's partitioner
    plans for CPU; for GPU and TPU it turns sums whose result is split into reduce-scatters, of the same bytes here.

    Returns name, device, versions, unit, value (bytes of all collectives of a step, summed over the meshes), peer (the
    rules, see `training.roofline.expected_bytes`), peer_value, ratio (peer_value / value, 1 = nothing but what the rules
    ask for), and runs: for each mesh its sizes, argument_bytes and temp_bytes of a device, collectives (kind -> count,
    bytes; see `training.collectives`), bytes, expected (by purpose) and ratio, None where neither sends anything; or
    skipped, why.
    Raises UserError for a peer.
    """
    if peer not in ("", "rules"):
        raise UserError(f"unknown peer {peer!r} for the benchmark scaling: it compares with the sharding rules alone")
    count = 8
    devices, inputs, runs = fake_devices(count), assumed_inputs(config), []
    for axes in track(meshes, "bench scaling", len(meshes)):
        mesh = MeshConfig(**{"replica": 1} | axes)
        size = mesh.replica * mesh.fsdp * mesh.tensor * mesh.context
        try:
            changed = dataclasses.replace(config, mesh=mesh)
            compiled = compile_step(changed, inputs, devices[:size])
        except UserError as error:
            runs.append({"mesh": dataclasses.asdict(mesh), "skipped": str(error)})
            continue
        memory, sent = compiled.memory_analysis(), collectives(compiled.as_text())
        expected = expected_bytes(changed, size)
        total, wanted = sum(kind["bytes"] for kind in sent.values()), sum(expected.values())
        runs.append({
            "mesh": dataclasses.asdict(mesh),
            "devices": size,
            "argument_bytes": memory.argument_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "collectives": sent,
            "bytes": total,
            "expected": expected,
            "ratio": wanted / total if total else None,
        })  # fmt: skip
    measured = [item for item in runs if "bytes" in item]
    if not measured:
        raise UserError(f"no mesh divides this config: {runs[0]['skipped']}")
    value = sum(item["bytes"] for item in measured)
    wanted = sum(sum(item["expected"].values()) for item in measured)
    return {
        "name": "scaling",
        **environment(),
        "device": f"{count} fake CPU devices",
        "unit": "bytes a device",
        "value": value,
        "peer": "the sharding rules",
        "peer_value": wanted,
        "ratio": wanted / value if value else None,
        "runs": runs,
    }
