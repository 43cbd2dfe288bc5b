"""Goodput: the share of a run's time, over all its starts, that went into steps which count in the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rmft_jax.devices import is_main
from rmft_jax.files import read_json, write_json

SCHEMA = 1
PHASES = ("start", "compile", "input", "step", "evaluation", "checkpoint")
_EVERY = 10  # seconds between two writings, at least


class Goodput:
    """A clock that charges the time of a run to one phase at a time, and keeps the accounts in goodput.json.

    Each start of the run has an account: when it began, from which step to which, and the seconds of each of PHASES. What
    the host sees counts: `step` is all that is charged to nothing else, most of it waiting for devices.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time):
        self._path, self._clock, self._written = path, clock, 0.0
        self._now, self._phases = clock(), ["start"]
        earlier = read_json(path, "goodput", "delete it")["starts"] if path.exists() else []
        self._account = {"at": self._now, "until": self._now, "from_step": 0, "to_step": 0}
        self._account["seconds"] = dict.fromkeys(PHASES, 0.0)
        self._starts = [*earlier, self._account]

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Charge what is done within to a phase."""
        self._charge()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._phases.pop()

    def begin(self, step: int) -> None:
        """Note that the steps begin, after `step`."""
        self._charge()
        self._phases = ["step"]
        self._account |= {"from_step": step, "to_step": step}

    def reach(self, step: int) -> None:
        """Note the newest step; now and then write the accounts."""
        self._charge()
        self._account["to_step"] = step
        if self._now - self._written >= _EVERY:
            self.write()

    def write(self) -> None:
        """Write the accounts and what they come to."""
        self._charge()
        self._written = self._now
        if is_main():
            write_json(self._path, {"schema": SCHEMA, **self.summary, "starts": self._starts})

    @property
    def summary(self) -> dict:
        """Return what the accounts come to until now, see `summarize`."""
        return summarize(self._starts)

    @property
    def pct(self) -> float:
        """Return the goodput until now, in percent."""
        return self.summary["goodput_pct"]

    def _charge(self) -> None:
        now = self._clock()
        self._account["seconds"][self._phases[-1]] += now - self._now
        self._account["until"] = self._now = now


def summarize(starts: list[dict]) -> dict:
    """Return what the accounts of all starts come to.

    Returns total_seconds (from the first start until now), seconds (of each of PHASES; `lost`, of steps that were taken
    again after a restart, which `step` leaves out; `down`, between one start's last sign and the next one), lost_steps,
    restarts and goodput_pct (100 step / total).
    """
    seconds = {phase: sum(start["seconds"][phase] for start in starts) for phase in PHASES}
    lost, lost_steps, kept_to = 0.0, 0, float("inf")
    for start in reversed(starts):
        steps = start["to_step"] - start["from_step"]
        again = steps - max(0, min(start["to_step"], kept_to) - start["from_step"])
        lost_steps += again
        lost += start["seconds"]["step"] * again / max(1, steps)
        kept_to = min(kept_to, start["from_step"])
    total = starts[-1]["until"] - starts[0]["at"]
    down = sum(max(0.0, later["at"] - start["until"]) for start, later in zip(starts, starts[1:], strict=False))
    seconds |= {"step": seconds["step"] - lost, "lost": lost, "down": down}
    return {
        "total_seconds": total,
        "seconds": seconds,
        "lost_steps": lost_steps,
        "restarts": len(starts) - 1,
        "goodput_pct": 100 * seconds["step"] / total if total > 0 else 0.0,
    }


def describe_goodput(summary: dict) -> str:
    """Return one line on what `summarize` has found, such as `train` prints in the end."""
    seconds, total = summary["seconds"], max(summary["total_seconds"], 1e-9)
    parts = [f"{name} {100 * value / total:.1f}%" for name, value in seconds.items() if value >= 0.0005 * total]
    restarts = f", {summary['restarts']} restarts, {summary['lost_steps']} steps lost" if summary["restarts"] else ""
    return f"goodput {summary['goodput_pct']:.1f}% of {total:,.0f} s ({', '.join(parts)}{restarts})"
