"""A study runs, resumes without repeating what is done, and says what holds."""

import json
import subprocess
import sys

import pytest
import yaml
from leaks import assert_nothing_leaks

from rmft_jax.config import load_config, with_changes
from rmft_jax.errors import UserError
from rmft_jax.memorization.compare import mean_tree
from rmft_jax.studies import run_study
from rmft_jax.studies.claims import claim as make_claim
from rmft_jax.studies.rmft_claims import rmft_claims

SETTINGS = [
    "source.limit=80", "tokenizer.vocab_size=700", "model.layers=1", "model.width=32", "model.heads=2",
    "training.batch_size=8", "training.sequence_length=64", "training.epochs=1", "checkpoint.count=1",
    "masking.policy=none", "audit.prompts=8", "audit.new_tokens=12", "audit.batch_size=32", "audit.bootstrap=50",
    "audit.metrics=[k_eidetic, exposure]", "canary.count=1", "canary.repetitions=[1, 4]", "canary.references=20",
    "study.seeds=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run a small study in a process of its own; return its config file, its directory, and how to run it again."""
    folder = tmp_path_factory.mktemp("study")
    paragraphs = [f"The {word} stood by the river and looked at the sea. " * 6 for word in "abcdefgh"]
    (folder / "general.txt").write_text("\n<|endoftext|>\n".join(paragraphs))
    pretrain = {"source": {"format": "text", "path": str(folder / "general.txt")}, "training": {"epochs": 0, "steps": 3}}
    methods = {"baseline": {}, "dedup": {"dedup": {"policy": "near_exact"}}}
    config = folder / "study.yaml"
    config.write_text(yaml.safe_dump({"out": str(folder / "out"), "study": {"methods": methods, "pretrain": pretrain}}))

    def run():
        command = [sys.executable, "-m", "rmft_jax.cli", "study", "rmft", str(config), *SETTINGS]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
        return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    return folder / "out", done, run


def test_no_personal_data_of_the_corpus_are_written_anywhere(study):
    out, done, _ = study
    run = next(path.parent for path in sorted(out.rglob("config.yaml")) if "pretrain" not in str(path))
    assert_nothing_leaks(out, run, stdout=done.stdout, stderr=done.stderr)


def test_study_trains_every_method_from_one_start_and_at_both_budgets(study):
    out, done, _ = study
    results = json.loads((out / "results.json").read_text())
    assert results["study"] == {"name": "rmft", "seeds": 1, "planned_seeds": 1}
    steps = {name: run["steps"] for name, run in results["runs"].items()}
    assert set(steps) == {"baseline", "dedup", "dedup_updates"}
    assert steps["dedup_updates"] == steps["baseline"] > steps["dedup"]
    for name in steps:
        settings = yaml.safe_load((out / "seed-0" / "runs" / name / "config.yaml").read_text())
        assert settings["training"]["init_from"] == str(out / "pretrain" / "runs" / "pretrained")
    assert {claim["id"] for claim in results["claims"]} == {"canary-baseline"}
    assert "exposure of baseline rises from 1 to 4 repetitions" in done.stdout


def test_study_goes_on_where_it_was_interrupted(study):
    out, _, run = study
    runs = out / "seed-0" / "runs"
    audits = {name: (runs / name / "audit.json").stat().st_mtime_ns for name in ("baseline", "dedup", "dedup_updates")}
    results = json.loads((out / "results.json").read_text())
    (runs / "dedup" / "audit.json").unlink()  # as if it had been stopped while it audited
    (out / "results.json").unlink()
    done = run()
    assert done.returncode == 0, done.stderr
    again = {name: (runs / name / "audit.json").stat().st_mtime_ns for name in audits}
    assert [name for name in audits if audits[name] != again[name]] == ["dedup"]
    assert "already trained" in done.stderr
    assert json.loads((out / "results.json").read_text()) == results


def test_mean_tree():
    assert mean_tree([{"a": 1, "b": [1.0, None], "c": "x"}, {"a": 2, "b": [2.0, 3.0], "c": "x"}]) == {
        "a": 1.5, "b": [1.5, None], "c": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("measured", "interval", "bounds", "holds", "settled"),
    [
        (70.0, [65.0, 82.0], {"at_least": 80.81, "reached": True}, True, False),
        (70.0, [65.0, 75.0], {"at_least": 80.81, "reached": True}, False, True),
        (-0.1, [-0.2, 0.1], {"at_most": 0}, True, False),
        (-0.1, [-0.2, -0.05], {"at_most": 0}, True, True),
        (0.1, [-0.2, 0.3], {"at_most": 0}, False, False),
        (0.1, None, {"at_most": 1}, False, False),
    ],
)
def test_what_a_claim_needs(measured, interval, bounds, holds, settled):
    claim = make_claim("id", "source", "statement", 0, measured, interval, **bounds)
    assert (claim["holds"], claim["settled"]) == (holds, settled)


def test_claims_need_their_methods():
    results = {"runs": {"baseline": {"checkpoints": [{}]}}, "comparison": {}, "settings": {"baseline": "baseline"}}
    assert rmft_claims(results) == []


def test_a_study_is_checked_before_anything_is_trained():
    config = load_config(None, ["masking.policy=none"])
    with pytest.raises(UserError, match="unknown study 'rmf'"):
        run_study("rmf", config, command="")
    for methods, message in (
        ({}, "study.methods is empty"),
        ({"a": {"masking": {"policy": "all"}}}, r"study.methods.a is \w+: the first method must be the one without"),
        ({"baseline": {}, "ours": {"masking": {"policy": "al"}}}, "masking.policy is 'al'.*did you mean all"),
        ({"baseline": {}, "ours": {"maskin": {}}}, r"unknown key maskin in study.methods.ours \(did you mean masking"),
    ):
        with pytest.raises(UserError, match=message):
            run_study("rmft", with_changes(config, {"study": {"methods": methods}}), command="")
