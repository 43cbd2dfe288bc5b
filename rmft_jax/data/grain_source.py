"""Records of Python objects: grain's data sources and data sets, and whatever else has a length and items."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from rmft_jax.errors import UserError

_SHOWN = reprlib.Repr()
_SHOWN.maxother = 100_000


def load_source(path: str) -> Any:
    """Return the source that `package.module:object` names, or what it returns if it is a class or a function.

    A source has `__len__` and `__getitem__`, as grain's RandomAccessDataSource and MapDataset do, or `__iter__`, as its
    IterDataset does. Modules are also looked for in the current folder.
    Raises UserError where there is no such module or object, where either fails, and for what is no source.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there hides what is installed
    try:
        found = attrgetter(name)(importlib.import_module(module))
        if isinstance(found, type) or (callable(found) and not _is_source(found)):
            found = found()
    except Exception as error:  # noqa: BLE001  the user's code may raise anything
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise UserError(
            f"source {path} cannot be loaded ({type(error).__name__}: {reason[:200]}): check source.path, module:object"
        ) from None
    if not _is_source(found):
        raise UserError(
            f"source {path} is of type {type(found).__name__}, which is none: give it __len__ and __getitem__, or __iter__"
        )
    return found


def read_records(source: Any, path: str) -> Iterator[tuple[int, Any, str]]:
    """Yield (number, record, '') of each record of a source in order, (number, None, what is wrong) where it cannot be read.

    None among the records is what grain's filters leave, and no record. Raises UserError when a source without
    `__getitem__` fails, as there is no going on after that.
    """
    by_number = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    records = map(source.__getitem__, range(len(source))) if by_number else iter(source)
    number = 0
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001  its message may hold what the record does
            problem = f"record {number} cannot be read ({type(error).__name__}): mend or delete it"
            if not by_number:
                raise UserError(f"source {path} {problem}") from None
            yield number, None, problem
        else:
            if record is not None:
                yield number, record, ""
        number += 1


def identity(path: str) -> list:
    """Return what tells whether a source is another one now, values of JSON.

    They are: path, size and time of the module's file, type, length, and a hash of its `repr` (without addresses in memory).
    """
    source = load_source(path)
    file = getattr(sys.modules[path.partition(":")[0]], "__file__", None)
    code = [Path(file).stat().st_size, Path(file).stat().st_mtime_ns] if file else []
    length = len(source) if hasattr(source, "__len__") else None
    shown = re.sub(r" at 0x[0-9a-f]+", "", _SHOWN.repr(source))
    return [path, code, type(source).__qualname__, length, hashlib.sha256(shown.encode("utf-8", "replace")).hexdigest()]


def _is_source(found: Any) -> bool:
    if isinstance(found, str | bytes | Mapping):
        return False
    return hasattr(found, "__iter__") or (hasattr(found, "__len__") and hasattr(found, "__getitem__"))
