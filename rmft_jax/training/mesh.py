"""Devices as a mesh, and where each array lives on it."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rmft_jax.config import MeshConfig
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import LOGICAL_AXES

AXES = ("replica", "fsdp", "tensor")
RULES = {"batch": ("replica", "fsdp"), "vocab": "tensor", "embed": "fsdp", "heads": "tensor", "mlp": "tensor"}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Lay out the devices. Raises UserError when the axes' sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.replica, config.fsdp, config.tensor]
    known = 1
    for size in sizes:
        known *= size if size > 0 else 1
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    elif known != len(devices):
        raise UserError(
            f"mesh replica={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]} does not fit {len(devices)} devices: "
            f"make the product of the axes equal to it, or set one axis to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raise UserError unless the batch splits evenly over the mesh."""
    parts = mesh.shape["replica"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise UserError(
            f"training.batch_size {batch_size} is not divisible by the {parts} devices of mesh replica x fsdp: "
            f"use a multiple of {parts}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def shardings_for(tree, mesh: Mesh):
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
