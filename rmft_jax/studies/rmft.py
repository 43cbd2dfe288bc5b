"""`rmft study rmft`: randomized masked fine-tuning against its rivals, from one initialisation, over several seeds.

Source: RMFT, Joshi & Smith, arXiv 2512.03310. What it claims, and what of that was found here, is in `rmft_claims`.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rmft_jax.config import Config, to_dict, with_changes
from rmft_jax.data.prepare import prepare
from rmft_jax.data.tokenizer import tokenizer_path
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_json
from rmft_jax.memorization.compare import comparison
from rmft_jax.memorization.extraction import audit
from rmft_jax.progress import say
from rmft_jax.studies.rmft_claims import rmft_claims
from rmft_jax.study_config import StudyConfig
from rmft_jax.training.loop import train


def run(config: Config, *, command: str = "rmft study rmft") -> dict:
    """Train and audit every method of `config.study` under every seed; write `out`/results.json and return its content.

    The same call goes on where an earlier one was interrupted: finished parts are not repeated. results.json appears after
    the first seed and is renewed after each further one.
    Raises UserError, before anything is trained, when a method's config breaks a rule or the first is not a baseline.
    """
    study = config.study
    plain = _method_configs(config)  # fails early
    out = Path(config.out)
    begin, todo = time.monotonic(), study.seeds * len(plain)
    say(f"study rmft: {len(plain)} methods ({', '.join(plain)}) x {study.seeds} seeds")
    prepare(config)
    start = _pretrain(config)
    seeds: list[list[Path]] = []
    for number in range(study.seeds):
        seed = config.seed + number
        where = {"out": str(out / f"seed-{seed}"), "data": str(config.data_dir), "seed": seed}
        runs: list[Path] = []
        steps: list[int] = []
        for name, method in plain.items():
            done = number * len(plain) + len(steps)
            passed = time.monotonic() - begin
            left = f", about {passed / done * (todo - done) / 60:.0f} min left" if done else ""
            say(f"study rmft: seed {number + 1} of {study.seeds}, {name} ({passed / 60:.0f} min so far{left})")
            settings = with_changes(method, {**where, "name": name, "training": {"init_from": start}})
            runs.append(_train_and_audit(settings))
            steps.append(read_json(runs[-1] / "run.json", "run description", "delete the run")["steps"])
            if "updates" in study.budgets and steps[-1] != steps[0]:
                say(f"study rmft: {name} again, for as many updates as {next(iter(plain))}")
                changes = {"name": f"{name}_updates", "training": {"steps": steps[0]}}
                runs.append(_train_and_audit(with_changes(settings, changes)))
        seeds.append(runs)
        results = comparison(seeds, command=command)
        results["study"] = {"name": "rmft", "seeds": number + 1, "planned_seeds": study.seeds}
        results["claims"] = rmft_claims(results)
        write_json(out / "results.json", results)
    return results


def _method_configs(config: Config) -> dict[str, Config]:
    """Return the config of each method, all checked."""
    if not config.study.methods:
        raise UserError("study.methods is empty: name the methods and what each changes, the baseline first")
    base = dataclasses.replace(config, study=StudyConfig())
    plain = {
        name: with_changes(base, changes, f"study.methods.{name}") for name, changes in config.study.methods.items()
    }
    first, method = next((name, settings.method) for name, settings in plain.items())
    if method != "none":
        raise UserError(f"study.methods.{first} is {method}: the first method must be the one without a defence")
    return plain


def _pretrain(config: Config) -> str:
    """Train the run that all others start from, if there is to be one; return its directory, "" without."""
    if not config.study.pretrain:
        return config.training.init_from
    out = Path(config.out) / "pretrain"
    settings = with_changes(
        dataclasses.replace(config, study=StudyConfig()),
        {
            "out": str(out),
            "data": "",
            "name": "pretrained",
            "tokenizer": {"path": str(tokenizer_path(config.data_dir))},
            "masking": {"policy": "none"},
            "canary": {"count": 0},
        },
    )
    settings = with_changes(settings, config.study.pretrain, "study.pretrain")
    say("study rmft: the run that all start from")
    prepare(settings)
    return str(train(settings))


def _train_and_audit(config: Config) -> Path:
    """Train and audit one run, unless that was done before with the same settings."""
    run = train(config)
    path = run / "audit.json"
    if not path.exists() or read_json(path, "audit", "delete it").get("settings") != to_dict(config)["audit"]:
        audit([run])
    return run
