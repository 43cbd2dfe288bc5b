"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmft_jax.errors import UserError
from rmft_jax.paths import is_remote, reaching, upload

if TYPE_CHECKING:  # every command starts here, and most have no arrays to read
    import numpy as np

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
_DISK = {number: os.strerror(number) for number in _NUMBERS}


def disk_fault(error: BaseException) -> str | None:
    """Return what the system says of the disk in an error of writing, whoever raised it; None where it is another error."""
    known = error.errno if isinstance(error, OSError) else 0
    return next((said for number, said in _DISK.items() if number == known or said in str(error)), None)


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file atomically. private: readable by its owner only."""
    write_chunks(path, [data], private=private)


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview | np.ndarray], *, private: bool = False) -> None:
    """Write a file atomically, one piece of its bytes after the other. private: readable by its owner only, on a disk."""
    if is_remote(path):
        with reaching(path):
            path.write_bytes(b"".join(bytes(chunk) for chunk in chunks))
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another out=") from None
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)  # type: ignore[arg-type]  # arrays are buffers, which their stubs do not say
        if not private:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a path to make a folder at, which becomes `path` when all went well and is gone when it did not.

    In a store it is made on a local disk and copied. Raises UserError when `path` exists.
    """
    if path.exists():
        raise UserError(f"{path} exists already: name another folder, or delete it")
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="rmft_") as folder:
            yield Path(folder) / "whole"
            upload(Path(folder) / "whole", path)
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: indented, with strict numbers (NaN is a bug, not a value)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, what: str, mend: str) -> Any:
    """Read JSON, or raise UserError naming `what` the file is and how to `mend` its absence."""
    try:
        with reaching(path):
            return json.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror or 'no such file'}): {mend}") from None
    except ValueError:
        raise UserError(f"{what} {path} is not valid JSON: {mend}") from None


def read_lines(path: Path) -> list[Any]:
    """Read the JSON values of a file that grows line by line; none where there is no file.

    A last line that was cut off, by a process that died while it wrote, is left out.
    """
    lines = path.read_bytes().decode(errors="replace").split("\n") if path.exists() else [""]
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except ValueError:
            break
    return values


class LineFile:
    """A file of JSON values that grows line by line. In a store, where files do not grow, it is written whole at times."""

    _EVERY = 30  # seconds between two writings in a store

    def __init__(self, path: Path, values: Iterable[Any] = ()):
        """values: what it begins with, in the place of what is there."""
        self._path, self._remote, self._written = path, is_remote(path), time.monotonic()
        self._lines = [json.dumps(value) + "\n" for value in values]
        write_text(path, "".join(self._lines))

    def add(self, *values: Any) -> None:
        """Add lines at the end."""
        lines = [json.dumps(value) + "\n" for value in values]
        if not self._remote:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            return
        self._lines += lines
        if time.monotonic() - self._written >= self._EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what a store does not have yet."""
        if self._remote:
            self._written = time.monotonic()
            write_text(self._path, "".join(self._lines))


def write_arrays(path: Path, arrays: dict[str, np.ndarray], *, private: bool = False, compress: bool = True) -> None:
    """Write named arrays atomically as .npz (no pickle)."""
    import io

    import numpy as np

    buffer = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(buffer, **arrays)  # type: ignore[arg-type]  # it takes arrays by any name
    write_chunks(path, [buffer.getbuffer()], private=private)


def read_arrays(path: Path, what: str, mend: str) -> dict[str, np.ndarray]:
    """Read named arrays written by `write_arrays`."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not an .npz file"
        raise UserError(f"{what} {path} cannot be read ({reason}): {mend}") from None
