"""Strings of digits and letters in a given outline."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

ROWS = 2000
"""Surrogates that a type draws for each form of its values."""


def fill(outline: str, digits: str, place: str = "0") -> str:
    """Return an outline with the digits (or letters) in their places, left to right; both count the same."""
    left = iter(digits)
    return "".join(next(left) if character == place else character for character in outline)


def digits_of(written: str) -> str:
    """Return the digits of a value alone."""
    return re.sub(r"[^0-9]", "", written)


def draws(form: str, draw: Callable[[random.Random], str | None], rows: int = ROWS, tries: int = 20) -> list[str]:
    """Return up to `rows` different strings from `draw`, which may return None; at most `tries` calls for each.

    The draws depend on `form` alone.
    """
    rng = random.Random(form)
    found = dict.fromkeys(text for _ in range(rows) for text in _first(draw, rng, tries))
    return list(found)


def random_digits(rng: random.Random, count: int) -> str:
    """Draw a string of digits uniformly."""
    return "".join(rng.choices("0123456789", k=count))


def _first(draw: Callable[[random.Random], str | None], rng: random.Random, tries: int) -> Iterator[str]:
    for _ in range(tries):
        if (text := draw(rng)) is not None:
            yield text
            return
