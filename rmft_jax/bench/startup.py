"""`rmft bench startup`: how long a user waits before anything happens, each sample in a fresh process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.errors import UserError
from rmft_jax.progress import track

# What is timed -> arguments of Python, and the seconds it may take, None = for comparison only.
SAMPLES: dict[str, tuple[tuple[str, ...], float | None]] = {
    "rmft --help": (("-m", "rmft_jax", "--help"), 1.0),
    "import rmft_jax": (("-c", "import rmft_jax"), 2.0),
    "import rmft_jax.kernels": (("-c", "import rmft_jax.kernels"), None),
    "import rmft_jax, load a config": (("-c", "import rmft_jax; rmft_jax.load_config()"), 2.0),
    "import jax": (("-c", "import jax"), None),
    "python": (("-c", ""), None),
}


def run(config: Config, peer: str = "", *, runs: int = 7) -> dict:
    """Time each of SAMPLES in turn, `runs` times after a round that warms the disk's cache.

    Returns name, device, versions, unit, value (median seconds of `rmft --help`), peer and peer_value (`import jax`, what
    any program on JAX pays before it starts), ratio (median of peer / ours over the rounds), runs (pairs), samples (each
    median), limits, and within (whether all medians are within them).
    """
    if peer not in ("", "none"):
        raise UserError(f"bench startup knows no peer {peer!r}: leave --peer out")
    rounds = []
    for number in track(range(runs + 1), "bench startup", runs + 1):
        times = {name: _seconds(arguments) for name, (arguments, _) in SAMPLES.items()}
        if number:
            rounds.append(times)
    medians = {name: round(statistics.median(times[name] for times in rounds), 4) for name in SAMPLES}
    limits = {name: limit for name, (_, limit) in SAMPLES.items() if limit is not None}
    pairs = [(times["rmft --help"], times["import jax"]) for times in rounds]
    return {
        "name": "startup",
        **environment("typer", "rich"),
        "unit": "s",
        "value": medians["rmft --help"],
        "peer": "import jax",
        "peer_value": medians["import jax"],
        "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
        "runs": [[round(ours, 4), round(theirs, 4)] for ours, theirs in pairs],
        "samples": medians,
        "limits": limits,
        "within": all(medians[name] <= limit for name, limit in limits.items()),
    }


def _seconds(arguments: tuple[str, ...]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
    return time.perf_counter() - begin
