"""Hardware (MAC) addresses: six pairs of hexadecimal digits with : or -, or three groups of four with dots."""

from __future__ import annotations

import random
import re

from rmft_jax.config import PiiConfig
from rmft_jax.pii.digits import draws, fill
from rmft_jax.pii.spans import PiiType

_PAIR, _FOUR = "[0-9A-Fa-f]{2}", "[0-9A-Fa-f]{4}"
_DIGITS = {"x": "0123456789abcdef", "X": "0123456789ABCDEF"}


def make(config: PiiConfig) -> PiiType:
    """Return the type. Addresses of one repeated digit (nobody's, everybody's) are none."""
    return PiiType(
        name="mac",
        form=_form,
        surrogates=lambda form: draws(form, lambda rng: _draw(rng, form)),
        normalise=_bare,
        pattern=rf"\b(?:{_PAIR}(?::{_PAIR}){{5}}|{_PAIR}(?:-{_PAIR}){{5}}|{_FOUR}(?:\.{_FOUR}){{2}})\b",
        check=_check,
    )


def _check(line: str, start: int, end: int) -> tuple[int, int] | None:
    alone = not re.match(r"[:.-][0-9A-Fa-f]", line[end : end + 2])
    alone = alone and not re.search(r"[0-9A-Fa-f][:.-]$", line[max(0, start - 2) : start])
    return (start, end) if alone and len(set(_bare(line[start:end]))) > 1 else None


def _bare(written: str) -> str:
    return re.sub("[^0-9a-f]", "", written.lower())


def _form(written: str) -> str:
    return re.sub("[0-9A-Fa-f]", "X" if re.search("[A-F]", written) else "x", written)


def _draw(rng: random.Random, form: str) -> str | None:
    place = "X" if "X" in form else "x"
    written = fill(form, "".join(rng.choices(_DIGITS[place], k=12)), place)
    return written if _form(written) == form else None
