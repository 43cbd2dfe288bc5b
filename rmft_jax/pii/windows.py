"""Search a long text for many patterns at once: point out the few lines that can hold a match, which are then looked into.

A pattern costs its time on the whole text only where the engine is fast: google-re2 finds the lines for all types in one
pass. They are short, many are equal (signatures, header lines), and they are searched by `re` whichever engine has found
them. So both engines give the same result.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

try:
    import re2
except ImportError:
    re2 = None

ENGINES = ("re2", "re")


def default_engine() -> str:
    """Return re2 where google-re2 is installed, else re."""
    return "re" if re2 is None else "re2"


def gate_of(patterns: Sequence[str], engine: str) -> Callable[[bytes], np.ndarray]:
    """Return a function from bytes to places where any of the patterns matches, at least one a line, int64 [n]."""
    union = "|".join(f"(?:{pattern})" for pattern in patterns).encode()
    if engine == "re2":
        options = re2.Options()
        options.encoding = re2.Options.Encoding.LATIN1
        options.max_mem = 1 << 27  # room for the automaton of the union; without it the search falls back to a slow one
        compiled = re2.compile(union, options)
    else:
        compiled = re.compile(union)
    return lambda data: np.fromiter((match.start() for match in compiled.finditer(data)), np.int64)


def lines_at(data: bytes, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end of the lines that hold the places (int [n], in order), each once."""
    return _between(np.frombuffer(data, np.uint8) == ord("\n"), places)


def runs_with(data: bytes, alphabet: str, inside: str) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end of the longest runs of characters of an alphabet that hold one character."""
    places = np.flatnonzero(np.frombuffer(data, np.uint8) == ord(inside))
    return _between(np.frombuffer(data.translate(_outside(alphabet)), bool), places)


@functools.cache
def _outside(alphabet: str) -> bytes:
    return bytes(code not in alphabet.encode() for code in range(256))


def _between(is_border: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    borders = np.concatenate([[-1], np.flatnonzero(is_border), [len(is_border)]])
    numbers = np.searchsorted(borders, places)
    numbers = numbers[np.diff(numbers, prepend=-1) > 0]
    return borders[numbers - 1] + 1, borders[numbers]
