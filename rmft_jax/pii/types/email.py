"""E-mail addresses: local part words, domain (first label) and TLD (the rest), as RMFT divides them."""

from __future__ import annotations

import string
from collections.abc import Iterable

from rmft_jax.config import PiiConfig
from rmft_jax.pii.spans import PiiType
from rmft_jax.pii.words import words

LOCAL, DOMAIN, TLD = "local", "domain", "tld"
FIRST, LAST = "first", "last"  # of a local part of several words; LOCAL is a single one

# The local part is bounded (64 characters, RFC 5321), so that a long run without an '@' costs linear time.
_PATTERN = (
    r"[A-Za-z0-9_](?:[A-Za-z0-9._%+'&=-]{0,62}[A-Za-z0-9_+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}"
)
_TLDS = (
    "com net org edu gov mil int info biz name co.uk org.uk ac.uk ca com.au net.au de fr nl be es it ch at se no dk fi "
    "ie pt pl cz gr ru jp co.jp cn com.cn in co.in kr sg com.sg hk com.hk tw nz co.nz za co.za br com.br mx com.mx ar "
    "cl il us eu tv cc me io aero coop museum travel"
).split()


def split(address: str) -> list[tuple[int, int, str]]:
    """Return the parts of an address: each dot-separated word of the local part, '@', the domain, '.', the TLD."""
    at = address.rindex("@")
    dot = address.index(".", at)
    words = address[:at].split(".")
    kind = LOCAL if sum(map(bool, words)) == 1 else FIRST
    out, place = [], 0
    for word in words:
        if word:
            out.append((place, place + len(word), kind))
            kind = LAST
        place += len(word) + 1
        out.append((place - 1, place, ""))  # a dot, or in the end the '@'
    return [*out, (at + 1, dot, DOMAIN), (dot, dot + 1, ""), (dot + 1, len(address), TLD)]


def surrogates(kind: str) -> Iterable[str]:
    """Return replacement strings of a kind: common English words for names and domains, public suffixes for TLDs."""
    return _TLDS if kind == TLD else words()


def make(config: PiiConfig) -> PiiType:
    """Return the type."""
    return PiiType(
        name="email",
        surrogates=surrogates,
        split=split,
        anchor_classes={LOCAL: 0, FIRST: 0, LAST: 0, DOMAIN: 1, TLD: 2},
        recombines=(LOCAL, FIRST, LAST),
        pattern=_PATTERN,
        alphabet=string.ascii_letters + string.digits + "._%+'&=-@",
        inside="@",
    )
