"""Many small models of one shape trained at once: the members of an ensemble, folds, seeds, methods.

What a member is trained on, and how, are arrays with a leading axis of members; the data are shared.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


class Members:
    """Where the members of an ensemble lie: split over as many devices as share them equally."""

    def __init__(self, count: int, *, together: bool = True, devices_each: int = 1):
        """together: the members of a device under `vmap`, in one batched program; else one after the other, which suits
        convolutions on CPU, where batched ones are slow. devices_each: over how many devices each member's batches are
        split, see `part`."""
        groups = max(n for n in range(1, jax.device_count() // devices_each + 1) if count % n == 0)
        devices = np.array(jax.devices()[: groups * devices_each]).reshape(groups, devices_each)
        self._mesh = Mesh(devices, ("member", "batch"))
        self._together, self._devices_each = together, devices_each
        self.batch_axis = "batch" if devices_each > 1 else None  # as it is called within a program

    def own(self, tree):
        """Place arrays with a leading axis of members, each device holding its members' part."""
        return jax.device_put(tree, jax.NamedSharding(self._mesh, P("member")))

    def shared(self, tree):
        """Place arrays that all members read, whole on every device."""
        return jax.device_put(tree, jax.NamedSharding(self._mesh, P()))

    def part(self, batch):
        """Return this device's part of a member's batch, [B / devices_each, ...] of [B, ...]; within a program."""
        if self.batch_axis is None:
            return batch
        size = len(batch) // self._devices_each
        return jax.lax.dynamic_slice_in_dim(batch, jax.lax.axis_index("batch") * size, size)

    def mean(self, tree):
        """Return the mean over the parts of a batch, such as of losses and gradients; within a program."""
        return tree if self.batch_axis is None else jax.lax.pmean(tree, "batch")

    def compile(self, function: Callable) -> Callable:
        """Return function(state, own, shared) compiled for all members at once.

        state, own and the result gain a leading axis of members; the memory of state is given back. shared: the same for
        all.
        """

        def of_device(state, own, shared):
            if self._together:
                return jax.vmap(function, in_axes=(0, 0, None))(state, own, shared)
            return jax.lax.map(lambda one: function(*one, shared), (state, own))

        specs = {"in_specs": (P("member"), P("member"), P()), "out_specs": P("member")}
        return jax.jit(jax.shard_map(of_device, mesh=self._mesh, check_vma=False, **specs), donate_argnums=0)


def epoch_orders(rows: np.ndarray, epoch: int, seeds: np.ndarray, batch_size: int) -> np.ndarray:
    """Return the rows that each member is shown in an epoch, int32 [members, steps, batch_size]: its own, shuffled.

    rows: int [members, N], the numbers of its rows. seeds: int [members]; members of one seed see the same places in
    the same order. The last, incomplete batch of an epoch is left out.
    """
    steps = rows.shape[1] // batch_size
    if not steps:
        raise ValueError(f"{rows.shape[1]} rows do not fill a batch of {batch_size}")
    order = np.stack([np.random.default_rng([int(seed), epoch]).permutation(rows.shape[1]) for seed in seeds])
    shown = np.take_along_axis(rows, order, axis=1)[:, : steps * batch_size]
    return shown.reshape(len(rows), steps, batch_size).astype(np.int32)
