"""What a study says of a published or expected figure."""

from __future__ import annotations


def claim(
    id: str, source: str, statement: str, expected: float, measured: float | None, interval: list | None, *,
    at_least: float | None = None, at_most: float | None = None, reached: bool = False,
) -> dict:  # fmt: skip
    """Return one claim, that the measured value is at least, or at most, a bound.

    It holds when the measured value keeps the bound; with `reached`, already when the interval does. It is settled when the
    whole interval lies on one side. Without an interval nothing holds.
    """
    bound, sign = (at_least, 1) if at_least is not None else (at_most, -1)
    holds = settled = False
    if measured is not None and interval is not None:
        worse, better = sorted(sign * end for end in interval)
        holds = (better if reached else sign * measured) >= sign * bound
        settled = worse >= sign * bound or better < sign * bound
    return {
        "id": id, "source": source, "statement": statement, "expected": expected, "measured": measured,
        "interval": interval, "holds": bool(holds), "settled": bool(settled),
    }  # fmt: skip
