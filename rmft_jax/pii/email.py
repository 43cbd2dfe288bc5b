"""E-mail addresses: local part words, domain (first label) and TLD (the rest), as RMFT divides them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rmft_jax.pii.spans import PiiType

LOCAL, DOMAIN, TLD = "email_local", "email_domain", "email_tld"
FIRST, LAST = "email_first", "email_last"  # of a local part of several words; LOCAL is a single one

# The local part is bounded (64 characters, RFC 5321), so that a long run without an '@' costs linear time. Within the
# RE2 subset: no look-around, no back-references.
_PATTERN = re.compile(
    r"[A-Za-z0-9_](?:[A-Za-z0-9._%+'&=-]{0,62}[A-Za-z0-9_+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}"
)
_TLDS = (
    "com net org edu gov mil int info biz name co.uk org.uk ac.uk ca com.au net.au de fr nl be es it ch at se no dk fi "
    "ie pt pl cz gr ru jp co.jp cn com.cn in co.in kr sg com.sg hk com.hk tw nz co.nz za co.za br com.br mx com.mx ar "
    "cl il us eu tv cc me io aero coop museum travel"
).split()


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each address in the text."""
    if "@" in text:
        for match in _PATTERN.finditer(text):
            yield match.span()


def split(address: str) -> Iterator[tuple[int, int, str]]:
    """Yield the parts of an address: each dot-separated word of the local part, '@', the domain, '.', the TLD."""
    at = address.rindex("@")
    dot = address.index(".", at)
    pieces = list(re.finditer(r"[^.]+|\.+", address[:at]))
    words = [piece for piece in pieces if not piece[0].startswith(".")]
    for piece in pieces:
        kind = "" if piece[0].startswith(".") else LOCAL if len(words) == 1 else FIRST if piece is words[0] else LAST
        yield *piece.span(), kind
    yield at, at + 1, ""
    yield at + 1, dot, DOMAIN
    yield dot, dot + 1, ""
    yield dot + 1, len(address), TLD


def surrogates(kind: str) -> list[str]:
    """Return replacement strings of a kind: common English words for names and domains, public suffixes for TLDs."""
    if kind == TLD:
        return list(_TLDS)
    from mimesis import Text
    from mimesis.locales import Locale

    drawn = Text(Locale.EN, seed=0).words(quantity=100_000)  # enough to meet nearly every word of its 6,000
    return sorted({word.lower() for word in drawn if re.fullmatch(r"[A-Za-z]{3,10}", word)})


EMAIL = PiiType(
    name="email",
    kinds=(LOCAL, DOMAIN, TLD, FIRST, LAST),
    find=find,
    normalise=str.lower,
    split=split,
    surrogates=surrogates,
    anchor_classes=(0, 1, 2, 0, 0),  # local part, domain, TLD
    recombines=(LOCAL, FIRST, LAST),
)
