"""Checkpoints: asynchronous, atomic, restored onto an explicit target (orbax).

One directory a step, in items: `params` and, under LoRA, `adapters` (all that audits and new runs need), `optimizer`,
`progress`, `guard` (of left-out steps), `average` in runs that keep an average of the weights, `elr` in those that keep
targets of tokens, and `tracker` in runs that follow memorization.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rmft_jax.errors import UserError
from rmft_jax.models.lora import merge, with_adapters

# orbax reports on itself at length; what matters of it reaches the user as an exception
logging.getLogger("absl").setLevel(logging.ERROR)

ITEMS = {
    "params": ("params",),
    "adapters": ("adapters", "adapter_scale"),
    "optimizer": ("optimizer",),
    "progress": ("seen", "step"),
    "guard": ("guard",),
    "average": ("average",),
    "elr": ("elr",),
    "tracker": ("tracker",),
}


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, *, keep_steps: Sequence[int] = (), keep_last: int = 1, read_only: bool = False):
        """keep_steps: kept for good. keep_last: how many of the newest others stay, to resume from."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        keep = policy.AnyPreservationPolicy([policy.LatestN(keep_last), policy.CustomSteps(list(keep_steps) or [-1])])
        self.directory = directory
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_handlers={item: ocp.StandardCheckpointHandler() for item in ITEMS},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, create=not read_only, read_only=read_only, cleanup_tmp_directories=not read_only
            ),
        )

    @classmethod
    def open(cls, path: Path) -> tuple[Checkpoints, int]:
        """Open what a user names: a run's directory (its newest checkpoint) or one step below its `checkpoints`.

        Returns the checkpoints, for reading, and the step. Raises UserError when there is none.
        """
        directory, step = (path.parent, int(path.name)) if path.name.isdigit() else (path / "checkpoints", None)
        if not directory.is_dir():
            raise UserError(f"{path} is not a checkpoint: name a run's directory, or RUN/checkpoints/STEP")
        checkpoints = cls(directory, read_only=True)
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            has = f"has steps {', '.join(map(str, steps))}" if steps else "is empty"
            raise UserError(f"{path} is not a checkpoint ({directory} {has}): name a run with finished checkpoints")
        return checkpoints, steps[-1] if step is None else step

    def steps(self) -> list[int]:
        """Return the steps that are saved, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: dict) -> None:
        """Save a train state in the background; the copy to host memory is done when this returns."""
        step = int(state["step"])
        items = {item: {name: state[name] for name in names} for item, names in ITEMS.items() if names[0] in state}
        save = self._ocp.args.StandardSave
        self._manager.save(step, args=self._ocp.args.Composite(**{item: save(tree) for item, tree in items.items()}))

    def restore(self, step: int, target: dict, items: Sequence[str] = ()) -> dict:
        """Restore a step onto `target`, a train state of arrays or ShapeDtypeStructs with shardings.

        items: which to read, all that the target has unless said; only those keys of the target are used. Raises UserError
        when shapes differ.
        """
        items = items or [item for item, names in ITEMS.items() if names[0] in target]
        trees = {item: {name: target[name] for name in ITEMS[item]} for item in items}
        for item, tree in trees.items():
            self._check_shapes(step, item, tree)
        restore = self._ocp.args.StandardRestore
        args = self._ocp.args.Composite(**{item: restore(tree) for item, tree in trees.items()})
        restored = self._manager.restore(step, args=args)
        return {name: value for item in items for name, value in restored[item].items()}

    def restore_params(self, step: int, target: dict) -> dict:
        """Restore the parameters of a step onto `target`, the parameters alone, adapters merged into them.

        target: arrays or ShapeDtypeStructs with shardings. Raises UserError as `restore` does.
        """
        params = self.restore(step, {"params": target}, items=("params",))["params"]
        saved = self._manager.item_metadata(step).get("adapters")
        if saved is None:
            return params
        place = jax.tree.leaves(target)[0].sharding
        whole = NamedSharding(place.mesh, P()) if isinstance(place, NamedSharding) else place
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)  # noqa: E731
        more = self.restore(step, jax.tree.map(shape, dict(saved.tree)), items=("adapters",))
        merged = jax.jit(merge, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))
        return merged(with_adapters(params, more["adapters"], more["adapter_scale"]))

    def close(self) -> None:
        """Wait for saves under way and release the directory."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check_shapes(self, step: int, item: str, tree: dict) -> None:
        metadata = self._manager.item_metadata(step)[item]
        if metadata is None:
            raise UserError(f"{self.directory / str(step)} has no {item}: it is not a whole checkpoint, name another")
        saved = {_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name, wanted = _path(path), tuple(leaf.shape)
            if name not in saved or saved[name] != wanted:
                found = f"shape {list(saved[name])}" if name in saved else "no such array"
                raise UserError(
                    f"checkpoint {self.directory / str(step)}: {name} has {found}, the config needs {list(wanted)}: "
                    f"use the model.* and tokenizer.* it was trained with"
                )


def abstract(state: dict, shardings: dict) -> dict:
    """Return the shapes, dtypes and shardings of a state: the target that `restore` fills."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, shardings)


def _path(path) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


