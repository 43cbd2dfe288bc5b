"""`rmft demo`: the whole main job in one call, on the bundled corpus or any other config."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rmft_jax.config import Config
from rmft_jax.data.prepare import prepare
from rmft_jax.memorization.compare import compare
from rmft_jax.memorization.extraction import audit
from rmft_jax.progress import say
from rmft_jax.report.html import write_report
from rmft_jax.training.loop import train

METHODS = {
    "baseline": ("none", "none"),
    "dedup": ("none", "near_exact"),
    "rmft": ("keep_first", "none"),
}


def demo(config: Config) -> tuple[dict, Path]:
    """Prepare, train baseline, dedup and RMFT from one initialisation, audit, compare, report.

    Everything lands in `config.out`; what is already there from an earlier call is not repeated. Returns the results and
    the path of report.html.
    """
    begin = time.monotonic()
    out = Path(config.out)

    def stage(number: int, what: str) -> None:
        say(f"[{number}/5] {what} ({time.monotonic() - begin:.0f} s so far)")

    stage(1, "prepare: mail with addresses -> tagged tokens")
    prepare(config)
    runs = []
    for name, (policy, dedup) in METHODS.items():
        stage(2, f"train {name}")
        runs.append(train(method_config(config, name, policy, dedup)))
    stage(3, "audit: attack every checkpoint")
    audit(runs)
    stage(4, "compare")
    results = compare(runs, out, command=f"rmft demo --out {config.out}")
    stage(5, "report")
    path = write_report(results, out / "report.html")
    say(f"done in {time.monotonic() - begin:.0f} s")
    return results, path


def method_config(config: Config, name: str, policy: str, dedup: str) -> Config:
    """Return the config of one method: the same in all but its switch."""
    return dataclasses.replace(
        config,
        name=name,
        masking=dataclasses.replace(config.masking, policy=policy),
        dedup=dataclasses.replace(config.dedup, policy=dedup),
    )


