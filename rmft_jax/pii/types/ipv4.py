"""IPv4 addresses in dotted form, validated with `ipaddress`."""

from __future__ import annotations

import ipaddress
import random
import re

from rmft_jax.config import PiiConfig
from rmft_jax.pii.digits import draws
from rmft_jax.pii.spans import PiiType


def make(config: PiiConfig) -> PiiType:
    """Return the type. Addresses that name no machine (0.0.0.0, loopback, multicast, broadcast) are none.

    A surrogate of a private address is private.
    """
    return PiiType(
        name="ipv4",
        form=_form,
        surrogates=lambda form: draws(form, lambda rng: _draw(rng, form), tries=1000),
        normalise=lambda written: str(ipaddress.IPv4Address(written)),
        pattern=r"\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b",
        check=_check,
    )


def _check(line: str, start: int, end: int) -> tuple[int, int] | None:
    """Leave out numbers of more than four parts, such as versions and object identifiers."""
    alone = not re.match(r"\.\d", line[end : end + 2]) and not re.search(r"\d\.$", line[max(0, start - 2) : start])
    return (start, end) if alone and _form(line[start:end]) else None


def _form(written: str) -> str:
    """Return private, public, or "" for what is no machine's address."""
    try:
        address = ipaddress.IPv4Address(written)
    except ValueError:
        return ""
    if address.is_loopback or address.is_multicast or address.is_reserved or address.packed[0] == 0:
        return ""
    return "private" if address.is_private else "public"


def _draw(rng: random.Random, form: str) -> str | None:
    head = rng.choice(("10", "192.168", f"172.{rng.randint(16, 31)}")) if form == "private" else str(rng.randint(1, 223))
    parts = [head, *(str(rng.randint(0, 255)) for _ in range(3 - head.count(".")))]
    written = ".".join(parts)
    return written if _form(written) == form else None
