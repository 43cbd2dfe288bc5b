"""International bank account numbers (IBAN), in one piece or in groups of four, with their country's form and checksum."""

from __future__ import annotations

import random
import re

from rmft_jax.config import PiiConfig
from rmft_jax.pii.checksums import mod97
from rmft_jax.pii.digits import draws
from rmft_jax.pii.spans import PiiType

# What follows country and check digits: n = digits, a = capital letters, c = either. Source: the IBAN registry (ISO 13616).
_STRUCTURES = dict(
    entry.split(" ")
    for entry in (
        "AD 8n12c, AE 19n, AL 8n16c, AT 16n, AZ 4a20c, BA 16n, BE 12n, BG 4a6n8c, BH 4a14c, BI 23n, BR 23n1a1c, BY 4c4n16c, "
        "CH 5n12c, CR 18n, CY 8n16c, CZ 20n, DE 18n, DJ 23n, DK 14n, DO 4c20n, EE 16n, EG 25n, ES 20n, FI 14n, FK 2a12n, "
        "FO 14n, FR 10n11c2n, GB 4a14n, GE 2a16n, GI 4a15c, GL 14n, GR 7n16c, GT 24c, HN 4a20n, HR 17n, HU 24n, IE 4a14n, "
        "IL 19n, IQ 4a15n, IS 22n, IT 1a10n12c, JO 4a4n18c, KW 4a22c, KZ 3n13c, LB 4n20c, LC 4a24c, LI 5n12c, LT 16n, "
        "LU 3n13c, LV 4a13c, LY 21n, MC 10n11c2n, MD 20c, ME 18n, MK 3n10c2n, MN 16n, MR 23n, MT 4a5n18c, MU 4a19n3a, "
        "NI 4a20n, NL 4a10n, NO 11n, OM 3n16c, PK 4a16c, PL 24n, PS 4a21c, PT 21n, QA 4a21c, RO 4a16c, RS 18n, RU 14n15c, "
        "SA 2n18c, SC 4a20n3a, SD 14n, SE 20n, SI 15n, SK 20n, SM 1a10n12c, SO 19n, ST 21n, SV 4a20n, TL 19n, TN 20n, "
        "TR 6n16c, UA 6n19c, VA 18n, VG 4a16n, XK 16n, YE 4a4n18c"
    ).split(", ")
)
_ALPHABETS = {"n": "0123456789", "a": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "c": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_BODIES = {
    country: re.compile("".join(f"[{_ALPHABETS[form]}]{{{size}}}" for size, form in re.findall(r"(\d+)([nac])", structure)))
    for country, structure in _STRUCTURES.items()
}


def make(config: PiiConfig) -> PiiType:
    """Return the type. A value is replaced whole, by one of its country."""
    return PiiType(
        name="iban",
        form=lambda written: f"{written[:2]} {'grouped' if ' ' in written else 'compact'}",
        surrogates=lambda form: draws(form, lambda rng: _draw(rng, *form.split())),
        normalise=lambda written: written.replace(" ", "").lower(),
        pattern=r"\b[A-Z]{2}[0-9]{2}(?:(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?|[A-Z0-9]{11,30})\b",
        check=_check,
    )


def is_valid(written: str) -> bool:
    """Return whether a number without spaces has its country's form and the right check digits."""
    body = _BODIES.get(written[:2])
    return body is not None and body.fullmatch(written[4:]) is not None and mod97(written[4:] + written[:4]) == 1


def _check(line: str, start: int, end: int) -> tuple[int, int] | None:
    """Cut a match at its country's length: what follows an IBAN may look like one group more."""
    body = _STRUCTURES.get(line[start : start + 2])
    if body is None:
        return None
    size = 4 + sum(int(number) for number in re.findall(r"\d+", body))
    if line[start + 4 : start + 5] == " ":
        size += (size - 1) // 4
    written = line[start : start + size]
    alone = start + size <= end and not re.match(r"\w", line[start + size : start + size + 1])
    return (start, start + size) if alone and is_valid(written.replace(" ", "")) else None


def _draw(rng: random.Random, country: str, form: str) -> str:
    parts = re.findall(r"(\d+)([nac])", _STRUCTURES[country])
    # Digits where letters are not obligatory: most real numbers have them there, too.
    body = "".join("".join(rng.choices(_ALPHABETS[kind.replace("c", "n")], k=int(size))) for size, kind in parts)
    written = f"{country}{98 - mod97(f'{body}{country}00'):02d}{body}"
    return written if form == "compact" else " ".join(re.findall(".{1,4}", written))
