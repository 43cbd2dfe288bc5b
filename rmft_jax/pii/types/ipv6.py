"""IPv6 addresses, validated with `ipaddress`."""

from __future__ import annotations

import ipaddress
import random
import re

from rmft_jax.config import PiiConfig
from rmft_jax.pii.digits import draws, fill
from rmft_jax.pii.spans import PiiType

_GROUP = "[0-9A-Fa-f]{1,4}"
_DIGITS = {"x": "0123456789abcdef", "X": "0123456789ABCDEF"}


def make(config: PiiConfig) -> PiiType:
    """Return the type. Surrogates have groups of the same lengths, and `::` in the same place."""
    return PiiType(
        name="ipv6",
        form=_form,
        surrogates=lambda form: draws(form, lambda rng: _draw(rng, form)),
        normalise=lambda written: str(ipaddress.IPv6Address(written)),
        pattern=rf"\b{_GROUP}(?::{_GROUP}){{7}}|(?:\b{_GROUP}(?::{_GROUP}){{0,6}})?::(?:{_GROUP}(?::{_GROUP}){{0,6}})?",
        check=_check,
    )


def _check(line: str, start: int, end: int) -> tuple[int, int] | None:
    """Take the longest run of the address's characters; `a::b` in program text has no digit, ::1 names no machine."""
    while end < len(line) and line[end] in "0123456789abcdefABCDEF:":
        end += 1
    written = line[start:end]
    if written.endswith(":") and not written.endswith("::"):
        end, written = end - 1, written[:-1]
    alone = not re.match(r"\w|\.\d", line[end : end + 2]) and not re.match(r"[\w:.]", line[max(0, start - 1) : start])
    return (start, end) if alone and _is_address(written) else None


def _is_address(written: str) -> bool:
    try:
        address = ipaddress.IPv6Address(written)
    except ValueError:
        return False
    return any(map(str.isdigit, written)) and not (address.is_loopback or address.is_unspecified or address.is_multicast)


def _form(written: str) -> str:
    return re.sub("[0-9A-Fa-f]", "X" if re.search("[A-F]", written) else "x", written)


def _draw(rng: random.Random, form: str) -> str | None:
    place = "X" if "X" in form else "x"
    written = fill(form, "".join(rng.choices(_DIGITS[place], k=form.count(place))), place)
    return written if _form(written) == form and _is_address(written) else None
