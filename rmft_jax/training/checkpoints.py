"""Checkpoints: asynchronous, atomic, restored onto an explicit target (orbax).

One directory a step, in items: `params` and, under LoRA, `adapters` (all that audits and new runs need), `optimizer`,
`progress`, `guard` (of left-out steps), `average` in runs that keep an average of the weights, `elr` in those that keep
targets of tokens, and `tracker` in runs that follow memorization. Beside them `fingerprints`: of each array as it was when
saved, against which it is held when read; and `about`: the schema, and the versions of the software.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rmft_jax import __version__
from rmft_jax.config import load_config
from rmft_jax.devices import is_main
from rmft_jax.errors import UserError
from rmft_jax.files import disk_fault
from rmft_jax.kernels import fingerprint
from rmft_jax.models.gpt import column_order
from rmft_jax.models.lora import merge, with_adapters
from rmft_jax.paths import is_remote
from rmft_jax.processes import barrier
from rmft_jax.progress import say

# orbax reports on itself at length; what matters of it reaches the user as an exception
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

SCHEMA = 3
_ADDED = {"guard": {"recent": 2}}  # what items of earlier schemas lack, and the schema that has it: read as zeros
_ORDERED = 3  # the schema since which columns lie as `models.gpt.column_order` has them; before, each matrix after the other

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


class Newer(UserError):
    """A checkpoint is of a schema that this version does not know."""


class Damaged(UserError):
    """What a checkpoint holds is not what was saved."""

    def __init__(self, path: Path, why: str):
        super().__init__(f"checkpoint {path} is damaged ({why}): name another, or delete it and train from the one before")
        self.path, self.why = path, why


class Clock:
    """Say when a checkpoint is due by the clock. All processes get the answer of process 0, asked every so many steps."""

    def __init__(self, minutes: float, every: int):
        """minutes: from one checkpoint to the next, 0 = none is ever due. every: so many steps, of several processes."""
        self._seconds, self._every, self._asked, self._since = 60 * minutes, every, 0, time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether to save after this step. To be asked after each dispatch, by every process."""
        if not self._seconds:
            return False
        due = time.monotonic() - self._since >= self._seconds
        if jax.process_count() > 1:
            if step // self._every == self._asked:
                return False
            self._asked, due = step // self._every, bool(multihost_utils.broadcast_one_to_all(np.int32(due)))
        return due

    def saved(self) -> None:
        """Note that a checkpoint has been saved, whatever for."""
        self._since = time.monotonic()


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self, directory: Path, *, keep_steps: Sequence[int] = (), keep_last: int = 1, keep_hours: float = 0, read_only=False
    ):
        """keep_steps: kept for good. keep_last: how many of the newest others stay, to resume from. keep_hours: of the
        others one in so many hours stays too, 0 = none."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        rules = [policy.LatestN(keep_last), policy.CustomSteps(list(keep_steps) or [-1])]
        keep = policy.AnyPreservationPolicy(rules + ([policy.EveryNSeconds(3600 * keep_hours)] if keep_hours else []))
        self.directory = directory
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            directory if is_remote(directory) else directory.absolute(),
            item_handlers={item: ocp.StandardCheckpointHandler() for item in ITEMS}
            | {item: ocp.JsonCheckpointHandler() for item in ("fingerprints", "about")},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, create=not read_only, read_only=read_only, cleanup_tmp_directories=not read_only,
                atomicity_options=_atomicity(directory),
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
        args = {item: self._ocp.args.StandardSave(tree) for item, tree in items.items()}
        fingerprints = {path: sums for tree in items.values() for path, sums in _fingerprints(tree).items()}
        args["fingerprints"] = self._ocp.args.JsonSave(fingerprints)
        args["about"] = self._ocp.args.JsonSave({"schema": SCHEMA, "rmft_jax": __version__, "jax": jax.__version__})
        with self._writing():
            self._manager.save(step, args=self._ocp.args.Composite(**args))

    def restore(self, step: int, target: dict, items: Sequence[str] = ()) -> dict:
        """Restore a step onto `target`, a train state of arrays or ShapeDtypeStructs with shardings.

        items: which to read, all that the target has unless said; only those keys of the target are used. What checkpoints
        of earlier schemas lack is zeros, and columns that lay otherwise are put in order. Raises UserError when shapes
        differ, Newer when it is of a later schema, Damaged when something is missing, cannot be read or is not what was
        saved.
        """
        items = items or [item for item, names in ITEMS.items() if names[0] in target]
        schema = self._schema(step)
        trees, added = {item: {name: target[name] for name in ITEMS[item]} for item in items}, {}
        try:
            saved = self._manager.item_metadata(step)
            for item in trees.keys() & _ADDED.keys():
                has = saved[item].tree[item] if saved[item] else ()
                added[item] = [name for name, since in _ADDED[item].items() if schema < since and name not in has]
                trees[item] = {item: {name: x for name, x in trees[item][item].items() if name not in added[item]}}
            args = {item: self._ocp.args.StandardRestore(tree) for item, tree in trees.items()}
            for item, tree in trees.items():
                self._check_shapes(step, item, tree, saved[item])
            if (self.directory / str(step) / "fingerprints").exists():  # not in those of earlier versions
                args["fingerprints"] = self._ocp.args.JsonRestore()
            restored = self._manager.restore(step, args=self._ocp.args.Composite(**args))
        except UserError:
            raise
        except Exception as error:  # whatever storage and parsers make of broken files
            raise self._damaged(step, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from None
        state = {name: value for item in items for name, value in restored[item].items()}
        if "fingerprints" in args:
            then, now = restored["fingerprints"], _fingerprints(state)
            if changed := next((name for name in now if then.get(name) != now[name]), None):
                raise self._damaged(step, f"{changed} is not what was saved")
        for item in added:
            state[item] |= {name: _zeros(target[item][name]) for name in added[item]}
        return state if schema >= _ORDERED else self._in_order(step, state)

    def _in_order(self, step: int, state: dict) -> dict:
        """Return a state of a schema before _ORDERED with its columns in order, by the config beside it.

        Of the two averages that adafactor keeps of a matrix, one is of columns: known by its length, unless that is the
        other's too. Raises UserError then.
        """

        @functools.cache
        def config():
            return load_config(self.directory.parent / "config.yaml")

        def leaf(path, x):
            names = _path(path).split(".")
            module = tuple(names[-3:-1])
            if module not in (("attention", "qkv"), ("mlp", "gate_up")) or names[-1] == "lora_a":
                return x
            order = column_order(config().model)[module]
            if x.shape[-1:] != order.shape:
                return x
            if {"v_row", "v_col"} & set(names) and len(order) in (config().model.width, config().lora.rank):
                raise UserError(
                    f"checkpoint {self.directory / str(step)} is of an earlier schema, and {_path(path)} can be of rows or "
                    f"of columns, {len(order)} of both: start another run from its parameters (training.init_from)"
                )
            return jax.jit(lambda x: x[..., order], out_shardings=getattr(x, "sharding", None))(x)

        return jax.tree_util.tree_map_with_path(leaf, state)

    def _schema(self, step: int) -> int:
        """Return the schema of a checkpoint, 1 of those that do not say."""
        if not (self.directory / str(step) / "about").exists():
            return 1
        try:
            about = self._manager.restore(step, args=self._ocp.args.Composite(about=self._ocp.args.JsonRestore()))["about"]
            schema, version = int(about["schema"]), str(about["rmft_jax"])
        except Exception as error:  # whatever storage and parsers make of broken files
            raise self._damaged(step, f"about: {type(error).__name__}") from None
        if schema > SCHEMA:
            where = self.directory / str(step)
            raise Newer(f"checkpoint {where} was written by rmft_jax {version}, in schema {schema}; this is {__version__}, "
                        f"which reads up to {SCHEMA}: install that version or a later one")  # fmt: skip
        return schema

    def restore_newest(self, target: dict) -> tuple[int, dict] | None:
        """Restore the newest checkpoint that is whole onto `target`; return its step and the state, None without any.

        Damaged ones that are newer are named, and moved to `damaged` beside the checkpoints. Raises UserError when shapes
        differ.
        """
        refused, found = {}, None
        for step in reversed(self.steps()):
            try:
                found = step, self.restore(step, target)
                break
            except Newer:
                raise
            except UserError as error:
                refused[step] = error
        if not found and (others := [error for error in refused.values() if not isinstance(error, Damaged)]):
            raise others[0]  # none has the shapes that are asked for: it is the config that is another
        for step, error in refused.items():
            aside = self.directory.parent / "damaged" / str(step)
            why = getattr(error, "why", str(error))
            going_on = f"step {found[0]}" if found else "the start"
            where = self.directory / str(step)
            say(f"checkpoint {where} is damaged ({why}): set aside as {aside}, going on from {going_on}")
            if is_main():
                _set_aside(where, aside)
        if refused:
            barrier("damaged checkpoints are set aside")
            self._manager.reload()
        return found

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
        """Wait for saves under way and release the directory. Raises UserError when one of them failed."""
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in one line that a disk is full or read-only: the save under way, or one before it that fails only now."""
        try:
            yield
        except Exception as error:
            if (fault := disk_fault(error)) is None:
                raise
            raise UserError(f"a checkpoint cannot be written below {self.directory} ({fault}): make room, or choose another "
                            f"out=; those before it are whole, the same command goes on from there") from None  # fmt: skip

    def _damaged(self, step: int, why: str) -> Damaged:
        return Damaged(self.directory / str(step), why)

    def _check_shapes(self, step: int, item: str, tree: dict, metadata) -> None:
        if metadata is None:
            raise self._damaged(step, f"it has no {item}")
        saved = {_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name, wanted = _path(path), tuple(leaf.shape)
            if name not in saved or saved[name] != wanted:
                found = f"shape {list(saved[name])}" if name in saved else "no such array"
                raise UserError(
                    f"checkpoint {self.directory / str(step)}: {name} has {found}, the config needs {list(wanted)}: "
                    f"use the model.* and tokenizer.* it was trained with"
                )


def _atomicity(directory: Path):
    """Return how a checkpoint becomes whole: in a store by a file that says so, since a renamed folder is a copied one."""
    import orbax.checkpoint as ocp

    return ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE) if is_remote(directory) else None


def _set_aside(where: Path, aside: Path) -> None:
    if aside.exists():
        aside.rmtree() if is_remote(aside) else shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    where.rename(aside)


def abstract(state: dict, shardings: dict) -> dict:
    """Return the shapes, dtypes and shardings of a state: the target that `restore` fills."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, shardings)


def _path(path) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _zeros(target) -> jax.Array:
    """Return zeros of the shape, dtype and sharding of an array or ShapeDtypeStruct."""
    return jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=target.sharding)()


def _fingerprints(state: dict) -> dict[str, list[int]]:
    """Return the fingerprint of each array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_path(path): [int(part) for part in jax.device_get(_fingerprint_of(leaf))] for path, leaf in leaves}


def _fingerprint_of(leaf) -> jax.Array:
    """Compute it where the array is, so that nothing but the result moves."""
    where = getattr(leaf, "sharding", None)
    return _compiled(NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else None)(leaf)


@functools.cache
def _compiled(sharding: NamedSharding | None):
    return jax.jit(fingerprint, out_shardings=sharding)
