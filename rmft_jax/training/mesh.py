"""Devices as a mesh, and where each array lives on it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import jax
from flax.core.spmd import logical_axis_rules
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rmft_jax.config import Config, MeshConfig, mesh_faults
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import LOGICAL_AXES

AXES = ("replica", "fsdp", "tensor", "context")
RULES = {
    "batch": ("replica", "fsdp"),
    "copies": "replica",
    "sequence": "context",
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
}


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Return the size of each axis on so many devices, in the order of AXES.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    sizes = {name: getattr(config, name) for name in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    free = [name for name, size in sizes.items() if size == -1]
    if free and devices % known == 0:
        sizes[free[0]] = devices // known
    elif free or known != devices:
        named = " ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"mesh {named} does not fit {devices} devices: make the product of the axes equal to it, or set one axis to -1"
        )
    return sizes


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Lay out the devices, all of them unless said; over several TPU slices, with the copies of mesh.replica across them.

    Raises UserError as `mesh_sizes` does, and when the slices do not divide mesh.replica.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(mesh_sizes(config, len(devices)).values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise UserError(f"mesh.replica {sizes[0]} is not divisible by the {slices} slices: make it a multiple")
        across, within = (slices, 1, 1, 1), (sizes[0] // slices, *sizes[1:])
        laid_out = mesh_utils.create_hybrid_device_mesh(within, across, devices)
        return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """Return the mesh of so many devices without having them. Raises UserError as `mesh_sizes` does."""
    sizes = tuple(mesh_sizes(config, devices).values())
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(config: Config, mesh: Mesh | AbstractMesh, vocab_size: int) -> None:
    """Raise UserError, naming the setting, unless batch, sequence and parameters split evenly over the mesh."""
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=vocab_size)
    for fault in mesh_faults(dataclasses.replace(config, tokenizer=tokenizer), dict(mesh.shape)):
        raise UserError(fault)


@contextlib.contextmanager
def placement(mesh: Mesh, *, batch: bool = True) -> Iterator[None]:
    """Have `models.gpt.place` split activations over the mesh, in programs that are traced within.

    batch: False leaves the axis of the rows to XLA, as where `vmap` takes it away.
    """
    rules = RULES if batch else RULES | {"batch": None}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), logical_axis_rules(tuple(rules.items())):
        yield


def batch_sharding(mesh: Mesh, *, stacked: bool = False) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch, or whose second one is, below an axis of steps."""
    return NamedSharding(mesh, P(None, RULES["batch"]) if stacked else P(RULES["batch"]))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def shardings_for(tree, mesh: Mesh | AbstractMesh):
    """Return a NamedSharding for each leaf: by LOGICAL_AXES where a path ends in a parameter's, else replicated.

    Optimizer states carry the parameters' paths within their own, so that their moments are placed the same way.
    """

    def sharding(path, leaf) -> NamedSharding:
        names = tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
        for suffix, axes in LOGICAL_AXES.items():
            if names[-len(suffix) :] == suffix and len(axes) == leaf.ndim:
                return NamedSharding(mesh, P(*(RULES.get(axis) if axis else None for axis in axes)))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)
