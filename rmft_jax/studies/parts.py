"""What studies that run in parts share: a part that is done is not done again; figures over seeds; their claims."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from scipy.stats import spearmanr

from rmft_jax.config import first_difference, plain
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_json
from rmft_jax.progress import say
from rmft_jax.studies.claims import claim

SCHEMA = 1


def part(path: Path, settings: dict, make: Callable[[], dict], title: str) -> dict:
    """Return what `make` returns, kept at `path`: read from there where it was made with the same settings before."""
    settings = plain(settings)
    found = read_json(path, "part of a study", "delete it") if path.exists() else {}
    if "settings" in found and not first_difference(found["settings"], settings, {}):
        return found["result"]
    say(title)
    begin = time.monotonic()
    result = make()
    result["seconds"] = round(time.monotonic() - begin, 1)
    write_json(path, {"settings": settings, "result": result})
    return result


def check_epochs(score_at: Sequence[int], where: str) -> None:
    """Raise UserError unless the epochs after which a part is scored rise from 1 or more."""
    if not score_at or list(score_at) != sorted(set(score_at)) or score_at[0] < 1:
        raise UserError(f"{where}.score_at is {list(score_at)}: give rising numbers of epochs")


def frame(name: str, command: str, seeds: int, done: int, planned: int) -> dict:
    """Return the keys that the results of every such study begin with."""
    return {
        "schema": SCHEMA,
        "command": command,
        "study": {"name": name, "parts": done, "planned_parts": planned, "seeds": seeds},
        "environment": {
            "device": f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)",
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in ("jax", "numpy")},
        },
    }


def over_seeds(values: Sequence[float]) -> dict:
    """Return mean, mean_ci (here the range of the seeds) and values."""
    values = [float(value) for value in values]
    return {"mean": float(np.mean(values)), "mean_ci": [min(values), max(values)], "values": values}


def curve(x: Sequence[float], values: np.ndarray) -> dict:
    """Return one line of a chart: the mean over the first axis of values [seeds, points], and their range."""
    fields = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    return {"x": [float(place) for place in x]} | {name: [float(v) for v in value] for name, value in fields.items()}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation of two [N], NaN where one of them is constant."""
    return float(spearmanr(a, b).statistic) if len(a) > 1 and np.ptp(a) and np.ptp(b) else math.nan


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, draws: int = 1000
) -> tuple[float | None, list | None]:
    """Return a statistic of `count` points and its 95% interval over points drawn anew; None where it is not defined.

    statistic: of the numbers of the points, int [count], a float or NaN.
    """
    rng = np.random.default_rng(0)
    value = statistic(np.arange(count))
    drawn = np.array([statistic(rng.integers(count, size=count)) for _ in range(draws)])
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(drawn):
        return None, None
    return float(value), [float(end) for end in np.percentile(drawn, [2.5, 97.5])]


def size_interval(value: float | None, ends: list | None) -> tuple[float | None, list | None]:
    """Return the absolute value, and the interval of it that follows from that of the value."""
    if value is None:
        return None, None
    sizes = sorted(map(abs, ends))
    return abs(value), [0.0 if ends[0] < 0 < ends[1] else sizes[0], sizes[1]]


def claim_over_seeds(
    id: str, source: str, statement: str, expected: float, values: Sequence[float], *,
    at_least: float | None = None, at_most: float | None = None,
) -> dict:  # fmt: skip
    """Return a claim that every seed must keep: measured is the worst of them, interval their range."""
    values = [float(value) for value in values]
    worst = min(values) if at_least is not None else max(values)
    return claim(id, source, statement, expected, worst, [min(values), max(values)], at_least=at_least, at_most=at_most)
