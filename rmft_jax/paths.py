"""Paths on disks and in object stores: gs:// and s3:// behave like the paths of pathlib, through etils and fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmft_jax.errors import UserError

_STORES = {"gs": "gcsfs", "s3": "s3fs"}
_LAST = "manifest.json"  # what makes a folder of prepared data one


def as_path(text: str | os.PathLike) -> Path:
    """Return a path of pathlib, or for gs://... and s3://... one of etils.epath, which has the same methods.

    Raises UserError for another scheme, or when the package for a store is not installed.
    """
    text = os.fspath(text)
    scheme, found, _ = text.partition("://")
    if not found:
        return Path(text)
    if scheme not in _STORES:
        raise UserError(f"{text} is in no store that is known ({', '.join(_STORES)}): copy it, or mount it")
    try:
        __import__(_STORES[scheme])
    except ImportError:
        extra = {"gs": "gcs", "s3": "s3"}[scheme]
        raise UserError(f"{text} needs the package {_STORES[scheme]}: pip install 'rmft-jax[{extra}]'") from None
    from etils import epath

    logging.getLogger(_STORES[scheme]).setLevel(logging.ERROR)  # it tells at length which kind of bucket it finds
    return epath.Path(text)


def is_remote(path: Path) -> bool:
    """Return whether a path is in an object store, where files appear whole, cannot grow and are not renamed."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Say in one line that a store cannot be reached or refuses: whatever its client raises.

    Raises UserError for it; FileNotFoundError and errors of ours pass, as on a disk.
    """
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} cannot be reached ({why}): check the name, your rights and the network") from None


def upload(folder: Path, path: Path) -> None:
    """Copy a local folder to a store; its manifest comes last, so that what has one is whole. Raises UserError."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name == _LAST)
    with reaching(path):
        for file in files:
            (path / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


def local_copy(path: Path) -> Path:
    """Return a folder on a local disk with what a folder of a store holds: a copy that is made once for each manifest.

    It is below the user's cache directory, for the user alone; a local path is returned as it is. Raises UserError when
    nothing is there or it cannot be reached.
    """
    if not is_remote(path):
        return path
    with reaching(path):
        if not (path / _LAST).exists():
            return path  # whoever reads it says what is missing
        digest = hashlib.sha256(os.fspath(path).encode() + (path / _LAST).read_bytes()).hexdigest()[:24]
        copy = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmft_jax" / "data" / digest
        if not copy.exists():
            partial = copy.with_name(f".{digest}.{secrets.token_hex(4)}")
            partial.mkdir(parents=True, mode=0o700)
            try:
                _download(path, partial)
                with contextlib.suppress(OSError):  # another process of this host was faster
                    partial.rename(copy)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return copy


def _download(path: Any, folder: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            (folder / entry.name).mkdir()
            _download(entry, folder / entry.name)
        else:
            (folder / entry.name).write_bytes(entry.read_bytes())
