"""Payment card numbers: 12 to 19 digits, in groups or not, with an issuer's prefix and length and a Luhn checksum."""

from __future__ import annotations

import random
import re

from rmft_jax.config import PiiConfig
from rmft_jax.pii.checksums import luhn_sum
from rmft_jax.pii.digits import digits_of, draws, fill, random_digits
from rmft_jax.pii.spans import PiiType
from rmft_jax.pii.values import outline

# First four digits, and the lengths that go with them (ISO/IEC 7812; the issuers' published ranges).
_ISSUERS = {
    "visa": (r"4...", (13, 16, 19)),
    "mastercard": (r"5[1-5]..|222[1-9]|22[3-9].|2[3-6]..|27[01].|2720", (16,)),
    "amex": (r"3[47]..", (15,)),
    "diners": (r"30[0-5].|3[689]..", (14, 16, 19)),
    "discover": (r"6011|64[4-9].|65..", (16, 19)),
    "jcb": (r"35(?:2[89]|[3-8].)", (16, 19)),
    "unionpay": (r"62..", (16, 17, 18, 19)),
    "maestro": (r"50..|5[6-9]..|6304|67..", (12, 13, 14, 15, 16, 17, 18, 19)),
}


def make(config: PiiConfig) -> PiiType:
    """Return the type. Surrogates are of the same issuer."""
    return PiiType(
        name="credit_card",
        form=lambda written: f"{_issuer(digits_of(written))} {outline(written)}",
        surrogates=lambda form: draws(form, lambda rng: _draw(rng, *form.split(" ", 1)), tries=1000),
        normalise=digits_of,
        pattern=r"\b[2-6][0-9]{3}(?:[ -]?[0-9]){8,15}\b",
        check=_check,
    )


def _check(line: str, start: int, end: int) -> tuple[int, int] | None:
    digits = digits_of(line[start:end])
    alone = not re.match(r"[-.]\d", line[end : end + 2]) and not re.search(r"\d[-.]$", line[max(0, start - 2) : start])
    return (start, end) if alone and _issuer(digits) and not luhn_sum(digits) else None


def _issuer(digits: str) -> str:
    fitting = (name for name, (prefix, sizes) in _ISSUERS.items() if len(digits) in sizes and re.match(prefix, digits))
    return next(fitting, "")


def _draw(rng: random.Random, issuer: str, written: str) -> str | None:
    # The first digits are drawn among all: the issuer's are a good part of those that begin with its first one.
    first = rng.choice(re.findall(r"(?:^|\|)(\d)", _ISSUERS[issuer][0]))
    body = first + random_digits(rng, written.count("0") - 2)
    number = body + str(-luhn_sum(body + "0") % 10)
    return fill(written, number) if _issuer(number) == issuer else None
