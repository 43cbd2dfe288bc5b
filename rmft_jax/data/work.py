"""The folder in which `prepare` works: it outlives a call that is cut off, and serves one call at a time."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_json


@contextlib.contextmanager
def work_folder(directory: Path, settings: Any, inputs: Any) -> Iterator[Path]:
    """Give the folder of the work on `directory`, beside it, readable by its owner only.

    What an earlier call has left there is kept when its settings and inputs, values of JSON, are equal. The folder is gone
    when all went well, and after a UserError, and stays after everything else. Raises UserError when another call has it.
    """
    folder = directory.with_name(f".{directory.name}.partial")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"{directory.parent} cannot be written ({error.strerror}): choose another out=") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{directory} is being prepared by another call: wait for it, or choose another out=") from None
        try:
            _keep_if(folder, {"settings": settings, "inputs": inputs})
            yield folder
            shutil.rmtree(folder)
        except UserError:
            shutil.rmtree(folder)
            for parent in made:
                with contextlib.suppress(OSError):  # others may have put something there
                    parent.rmdir()
            raise


def _keep_if(folder: Path, stamp: dict) -> None:
    path = folder / "stamp.json"
    if path.exists() and read_json(path, "stamp", "delete it") == stamp:
        return
    for left in folder.iterdir():
        if left.name != "lock":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_json(path, stamp)
