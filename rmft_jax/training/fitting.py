"""What to change so that a train step fits the memory of its devices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh, Mesh

from rmft_jax.config import Config, with_changes
from rmft_jax.errors import UserError
from rmft_jax.training.memory import Inputs, Memory, estimate, say_bytes
from rmft_jax.training.mesh import AXES, abstract_mesh, check_mesh

# Which settings make a term smaller, the one that costs least first.
_RELIEF = {
    "activations": ("training.remat", "training.accumulation"),
    "attention scores": ("training.remat", "training.accumulation"),
    "one block": ("training.accumulation",),
    "logits": ("training.loss_chunk", "training.accumulation"),
}
_ORDER = ("training.loss_chunk", "mesh.fsdp", "training.remat", "training.accumulation", "training.optimizer")
_MOST_DEVICES = 65_536

Changes = dict[str, object]


def check_fit(
    config: Config, inputs: Inputs, mesh: Mesh | AbstractMesh, memory: Memory, limit: int, *, certain: bool = False
) -> None:
    """Raise UserError where a step takes more than `limit` bytes of a device; it names the largest term and what to change.

    certain: only where it takes more whatever the compiler does.
    """
    needed = memory.certain if certain else memory.total
    if needed <= limit:
        return
    name, size = next(iter(memory.terms.items()))
    raise UserError(
        f"a step takes {'at least' if certain else 'about'} {say_bytes(needed)} of each device, which has "
        f"{say_bytes(limit)}; the largest part is {name}, {say_bytes(size)}: {_advice(config, inputs, mesh, name, limit)}"
    )


def changes_that_fit(config: Config, inputs: Inputs, devices: int, limit: int, largest: str = "") -> Changes | None:
    """Return settings, key -> value, with which a step fits into `limit` bytes; None if none of those known helps.

    Looked for is one setting alone, first among those that make the `largest` term smaller, then as few as will do; of each
    the value that changes least. All but training.optimizer leave the result of the training as it is.
    """
    sizes = dict(abstract_mesh(config.mesh, devices).shape)
    options = _options(config, sizes)
    first = [key for key in _RELIEF.get(largest, ("mesh.fsdp", "training.optimizer")) if key in options]
    order = [*first, *(key for key in _ORDER if key not in first)]

    def fits(changes: Changes) -> bool:
        changed = _apply(config, changes)
        if changed is None:
            return False
        mesh = abstract_mesh(changed.mesh, devices)
        try:
            check_mesh(changed, mesh, inputs.vocab_size)
        except UserError:
            return False
        return estimate(changed, inputs, mesh).total <= limit

    most = {key: options[key][-1] for key in order if options[key]}
    without = {key: change for key, change in most.items() if key != "training.accumulation"}  # which takes a sum of its own
    chosen = next((changes for changes in (most, without) if fits(_joined(changes))), None)
    if chosen is None:
        return None
    for key in chosen:
        if fits(chosen[key]):
            return next(change for change in options[key] if fits(change))
    for key in reversed(list(chosen)):  # as little of each as will do
        fewer = {other: change for other, change in chosen.items() if other != key}
        milder = [fewer, *(chosen | {key: change} for change in options[key])]
        chosen = next(changes for changes in milder if fits(_joined(changes)))
    return _joined(chosen)


def _advice(config: Config, inputs: Inputs, mesh: Mesh | AbstractMesh, largest: str, limit: int) -> str:
    devices = math.prod(mesh.shape.values())
    if changes := changes_that_fit(config, inputs, devices, limit, largest):
        return f"set {_say(changes)}"
    sharded = _apply(config, {"mesh.replica": 1, "mesh.fsdp": -1, **{f"mesh.{name}": mesh.shape[name] for name in AXES[2:]}})
    for count in itertools.takewhile(lambda n: n <= _MOST_DEVICES, (devices * 2**n for n in itertools.count(1))):
        if sharded and (changes := _with_devices(sharded, inputs, count, limit)) is not None:
            named = _say({"mesh.replica": 1, "mesh.fsdp": -1} | changes)
            return f"no setting makes it fit {devices} device(s), but {count} do with {named}"
    return "no setting makes it fit, nor do more devices with this batch: take a smaller model, or raise training.batch_size"


def _with_devices(config: Config, inputs: Inputs, devices: int, limit: int) -> Changes | None:
    """Return what to change besides, {} for nothing, or None where so many devices don't do."""
    mesh = abstract_mesh(config.mesh, devices)
    try:
        check_mesh(config, mesh, inputs.vocab_size)
    except UserError:
        return None
    return {} if estimate(config, inputs, mesh).total <= limit else changes_that_fit(config, inputs, devices, limit)


def _options(config: Config, sizes: dict[str, int]) -> dict[str, list[Changes]]:
    """Return for each setting the changes that save memory, the smallest first."""
    training, copies = config.training, sizes["replica"] * sizes["fsdp"]
    rows = max(1, training.batch_size // copies)
    tokens = rows // training.accumulation * training.sequence_length // sizes["context"]
    remat, optimizer = ("none", "dots", "full"), ("adamw", "muon", "lion", "adafactor")
    values = {
        "training.loss_chunk": [n for n in (4096, 2048, 1024, 512, 256) if n < (training.loss_chunk or tokens)],
        "training.remat": remat[remat.index(training.remat) + 1 :],
        "training.accumulation": [n for n in _divisors(rows) if n > training.accumulation],
        "training.optimizer": [name for name in optimizer[optimizer.index(training.optimizer) + 1 :] if name != "muon"],
    }
    options = {key: [{key: value} for value in known] for key, known in values.items()}
    wider = [n for n in _divisors(copies) if n > sizes["fsdp"]]
    return options | {"mesh.fsdp": [{"mesh.replica": copies // n, "mesh.fsdp": n} for n in wider]}


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)


def _apply(config: Config, changes: Changes) -> Config | None:
    """Return the config with the changes, None where its rules forbid them."""
    tree: dict = {}
    for key, value in changes.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    try:
        return with_changes(config, tree)
    except UserError:
        return None


def _joined(chosen: dict[str, Changes]) -> Changes:
    return {key: value for changes in chosen.values() for key, value in changes.items()}


def _say(changes: Changes) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())
