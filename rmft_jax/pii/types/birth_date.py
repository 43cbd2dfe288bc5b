"""Dates of birth: dates that stand after words such as "born", "DOB" or "date of birth"."""

from __future__ import annotations

import datetime
import random
import re

from rmft_jax.config import PiiConfig
from rmft_jax.pii.digits import draws
from rmft_jax.pii.spans import PiiType

_MONTHS = "January February March April May June July August September October November December".split()
_MONTH = "(?:" + "|".join(f"{name[:3]}(?:{name[3:]})?" if name != "May" else name for name in _MONTHS) + ")"
_DATE = (
    r"(?:[0-9]{4}(?:-[0-9]{1,2}-|/[0-9]{1,2}/|\.[0-9]{1,2}\.)[0-9]{1,2}"
    r"|[0-9]{1,2}(?:-[0-9]{1,2}-|/[0-9]{1,2}/|\.[0-9]{1,2}\.)(?:[0-9]{4}|[0-9]{2})"
    rf"|{_MONTH}\.? [0-9]{{1,2}}(?:st|nd|rd|th)?,? [0-9]{{4}}"
    rf"|[0-9]{{1,2}}(?:st|nd|rd|th)? {_MONTH}\.?,? [0-9]{{4}})"
)
_WORDS = r"\b(?:born|d\.?o\.?b|birth ?date|date of birth|birthday)\b\.?[ \t:,(-]{0,8}(?:(?:on|is|was|the) ){0,2}"


def make(config: PiiConfig) -> PiiType:
    """Return the type. A surrogate is a date of the same outline."""
    return PiiType(
        name="birth_date",
        form=_outline,
        surrogates=lambda outline: draws(outline, lambda rng: _draw(rng, outline)),
        normalise=_iso,
        pattern=rf"(?i:{_WORDS}{_DATE}\b)",
        check=_check,
    )


def _check(line: str, start: int, end: int) -> tuple[int, int] | None:
    begin = start + re.search(rf"(?i){_DATE}$", line[start:end]).start()
    written = line[begin:end]
    is_more = re.match(r"[-/.]\d", line[end : end + 2])
    return (begin, end) if not is_more and _iso(written) else None


def _iso(written: str) -> str:
    """Return yyyy-mm-dd, "" for what is no date. 5/4/1970 is taken for May 4; years of two digits lie in 1927 to 2026."""
    numbers = [int(number) for number in re.findall(r"\d+", written)]
    month = re.search(f"(?i){_MONTH}", written)
    if month:
        day, year = numbers
        month_number = next(i for i, name in enumerate(_MONTHS, 1) if name[:3].lower() == month[0][:3].lower())
    elif re.match(r"\d{4}", written):
        year, month_number, day = numbers
    else:
        month_number, day, year = numbers
        if month_number > 12:
            month_number, day = day, month_number
    if year < 100:
        year += 2000 if year <= 26 else 1900
    try:
        return datetime.date(year, month_number, day).isoformat()
    except ValueError:
        return ""


def _outline(written: str) -> str:
    """Return a date with 0 for each digit, MMMM or MMM for the month's name and th for any ending of the day."""
    text = re.sub(r"(?i)(?<=\d)(?:st|nd|rd|th)\b", "th", written)
    text = re.sub(rf"(?i)\b{_MONTH}\b", lambda match: "MMM" if len(match[0]) == 3 else "MMMM", text)
    return re.sub(r"\d", "0", text)


def _draw(rng: random.Random, outline: str) -> str:
    """Draw a date that is one whichever of two numbers is the day: both are at most 12 where no name says the month."""
    day = lambda pair: str(rng.randint(10, 12 if "M" not in outline else 28) if pair else rng.randint(1, 9))  # noqa: E731
    name = rng.choice([name for name in _MONTHS if name != "May"])
    text = outline.replace("MMMM", name).replace("MMM", name[:3])
    if re.search(r"\b0000\b", text):
        text = re.sub(r"\b0000\b", str(rng.randint(1930, 2009)), text)
    else:
        text = re.sub(r"00$", str(rng.randint(30, 99)), text)
    text = re.sub(r"(?<![0-9])00?(?![0-9])", lambda place: day(len(place[0]) == 2), text)
    return re.sub(r"(\d+)th", lambda match: match[1] + _ending(int(match[1])), text)


def _ending(day: int) -> str:
    return "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
