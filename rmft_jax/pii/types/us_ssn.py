"""US social security numbers (SSN) and individual taxpayer identification numbers (ITIN), written 123-45-6789."""

from __future__ import annotations

import random
import re

from rmft_jax.config import PiiConfig
from rmft_jax.pii.digits import digits_of, draws, fill, random_digits
from rmft_jax.pii.spans import PiiType
from rmft_jax.pii.values import outline

_ADVERTISED = {"078051120", "219099999"}  # printed in advertisements; never a person's


def make(config: PiiConfig) -> PiiType:
    """Return the type. Surrogates of an ITIN are ITINs."""
    return PiiType(
        name="us_ssn",
        form=lambda written: f"{_kind(digits_of(written))} {outline(written)}",
        surrogates=lambda form: draws(form, lambda rng: _draw(rng, *form.split(" ", 1)), tries=1000),
        normalise=digits_of,
        pattern=r"\b[0-9]{3}(?:-[0-9]{2}-| [0-9]{2} )[0-9]{4}\b",
        check=_check,
    )


def _check(line: str, start: int, end: int) -> tuple[int, int] | None:
    alone = not re.match(r"-\d", line[end : end + 2]) and not re.search(r"\d-$", line[max(0, start - 2) : start])
    return (start, end) if alone and _kind(digits_of(line[start:end])) else None


def _kind(digits: str) -> str:
    """Return ssn, itin, or "" for a number that is neither. Source: SSA, POMS RM 10201.035; IRS, Publication 1915."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    if area >= "900":
        is_itin = "50" <= group <= "65" or "70" <= group <= "88" or "90" <= group <= "92" or "94" <= group <= "99"
        return "itin" if is_itin else ""
    assignable = area not in ("000", "666") and group != "00" and serial != "0000"
    return "ssn" if assignable and digits not in _ADVERTISED else ""


def _draw(rng: random.Random, kind: str, written: str) -> str | None:
    digits = random_digits(rng, 9)
    return fill(written, digits) if _kind(digits) == kind else None
