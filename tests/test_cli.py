"""The commands as a user meets them: the whole job, its files, its faults, and what never gets out."""

import json
import subprocess
import sys
from importlib import resources

import jsonschema
import pytest
import yaml
from leaks import assert_nothing_leaks, personal_data

from rmft_jax import cli

SETTINGS = [
    "source.limit=150", "tokenizer.vocab_size=800", "model.layers=2", "model.width=48", "model.heads=2",
    "training.batch_size=16", "training.sequence_length=64", "training.epochs=5", "training.learning_rate=0.005",
    "training.warmup_steps=10", "checkpoint.count=3", "audit.prompts=64", "audit.new_tokens=40", "audit.batch_size=64",
    "audit.bootstrap=200",
]  # fmt: skip


def rmft(*arguments, capsys=None):
    """Run a command in this process; return its exit code, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", ["rmft", *map(str, arguments)])
        cli.main()
    out, err = capsys.readouterr() if capsys else ("", "")
    return exit.value.code or 0, out, err


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run the whole job once, small, in a process of its own, and keep what it printed."""
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "rmft_jax.cli", "demo", "--out", str(out), *SETTINGS],
        capture_output=True, text=True, timeout=280, env={"PATH": "/usr/bin:/bin", "HOME": str(out)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done


def test_demo_writes_results_of_the_agreed_form(demo):
    out, done = demo
    results = json.loads((out / "results.json").read_text())
    schema = resources.files("rmft_jax.report").joinpath("results.schema.json").read_text()
    jsonschema.validate(results, json.loads(schema))
    assert results["schema"] == 1 and set(results["runs"]) == {"baseline", "dedup", "rmft"}
    assert results["settings"]["baseline"] == "baseline"
    for run in results["runs"].values():
        assert {"method", "checkpoints"} <= set(run) and len(run["checkpoints"]) == 3
        for checkpoint in run["checkpoints"]:
            names = {"step", "epoch", "perplexity", "perplexity_pii", "perplexity_other", "mdp", "prompts"}
            assert names <= set(checkpoint)
            assert {"heldout", "web", "discoverable"} <= set(checkpoint["prompts"])
            for rates in checkpoint["prompts"].values():
                assert {"leaked", "true_leaked", "ter", "ter_ci", "ser", "ser_ci", "tegr"} <= set(rates)
                assert rates["true_leaked"] <= rates["leaked"] and rates["ter_ci"][0] <= rates["ter"] <= rates["ter_ci"][1]
    keys = ("ter_reduction_pct", "ser_reduction_pct", "perplexity_increase_pct", "mdp", "aurc")
    for comparison in results["comparison"].values():
        assert all(key in comparison and f"{key}_ci" in comparison for key in keys)
    for comparison in results["comparison"].values():
        low, high = comparison["aurc_ci"]
        assert low - 1e-9 <= comparison["aurc"] <= high + 1e-9
    assert results["comparison"]["rmft"]["mdp"] == results["runs"]["rmft"]["checkpoints"][-1]["mdp"]
    assert [c["mdp"] for c in results["runs"]["baseline"]["checkpoints"]] == [0, 0, 0]
    last = {name: run["checkpoints"][-1] for name, run in results["runs"].items()}
    assert last["baseline"]["perplexity"] < 20  # it did learn
    for word in ("baseline", "dedup", "rmft", "report:", "TER"):
        assert word in done.stdout
    assert "[1/5]" in done.stderr and "[5/5]" in done.stderr
    assert (out / "report.html").stat().st_size > 10_000


def test_audit_agrees_with_a_recount_of_its_own_leaks(demo):
    out, _ = demo
    audit = json.loads((out / "runs/baseline/audit.json").read_text())
    for checkpoint in audit["checkpoints"]:
        pooled = set()
        for name, records in checkpoint["leaks"].items():
            true = {record["identity"] for record in records} - {None}
            pooled |= true
            assert checkpoint["prompts"][name]["true_leaked"] == len(true)
            assert checkpoint["prompts"][name]["leaked"] == len({record["hash"] for record in records})
        low, high = checkpoint["perplexity_ci"]
        assert low < checkpoint["perplexity"] < high and checkpoint["mdp"] == 0 and checkpoint["mdp_ci"] == [0, 0]
        assert checkpoint["prompts"]["all"]["ter"] == pytest.approx(100 * len(pooled) / audit["identities"])
    assert any(checkpoint["prompts"]["all"]["leaked"] for checkpoint in audit["checkpoints"])


def test_a_second_demo_repeats_nothing_and_every_command_agrees(demo, capsys):
    out, _ = demo
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    results = json.loads((out / "results.json").read_text())
    runs = [out / "runs" / name for name in ("baseline", "dedup", "rmft")]
    code, _, _ = rmft("compare", *runs, "--out", out / "again", "audit.bootstrap=200", capsys=capsys)
    assert code == 0
    again = json.loads((out / "again" / "results.json").read_text())
    assert again["comparison"] == results["comparison"] and again["runs"] == results["runs"]
    code, printed, _ = rmft("report", out / "again", capsys=capsys)
    assert code == 0 and (out / "again" / "report.html").exists() and "report.html" in printed
    config = yaml.safe_load((out / "runs/rmft/config.yaml").read_text())
    assert config["masking"]["policy"] == "keep_first" and config["out"] == str(out)
    code, _, err = rmft("train", out / "runs/rmft/config.yaml", capsys=capsys)
    assert code == 0 and "already trained" in err
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}


def test_no_personal_data_of_the_corpus_are_written_anywhere(demo):
    out, done = demo
    assert_nothing_leaks(out, out / "runs/rmft", stdout=done.stdout, stderr=done.stderr)


def test_reveal_writes_the_addresses(demo, capsys, tmp_path):
    out, _ = demo
    run = out / "runs/baseline"
    kept = (run / "audit.json").read_bytes()
    try:
        code, _, _ = rmft("audit", run, "audit.sets=[discoverable]", "--reveal", capsys=capsys)
        revealed = json.loads((run / "audit.json").read_text())
    finally:
        (run / "audit.json").write_bytes(kept)
    assert code == 0 and revealed["revealed"] is True
    leaks = [record for checkpoint in revealed["checkpoints"] for record in checkpoint["leaks"]["discoverable"]]
    values = personal_data(out / "runs/rmft")
    assert leaks and all("@" in record["value"] for record in leaks)
    assert all(record["value"].encode() in values for record in leaks if record["identity"] is not None)


def test_moved_data_are_found(demo, tmp_path, capsys):
    out, _ = demo
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    text = (moved / "runs/rmft/config.yaml").read_text().replace(str(out), str(tmp_path / "gone"))
    (moved / "runs/rmft/config.yaml").write_text(text)
    from rmft_jax.training.setup import load_run_config

    assert load_run_config(moved / "runs/rmft").data_dir == moved / "data"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "missing.yaml"], "config missing.yaml cannot be read"),
        (["prepare", "{config}", "source.format=jsonl", "source.path=none.jsonl"], "none.jsonl cannot be read"),
        (["prepare", "{config}", "sources.limit=3"], "did you mean source?"),
        (["prepare", "{config}", "source.limit=few"], "source.limit in {config} is 'few': it must be a whole number"),
        (["train", "{config}", "training.batch_size=9", "mesh.replica=2"], "not divisible by the 2 devices"),
        (["prepare", "{config}", "source.format=jsonl", "source.path={bad}"], "line 2 is not valid JSON"),
        (["prepare", "{config}", "source.format=jsonl", "source.path={field}"], "set source.text_field"),
        (["prepare", "{config}", "source.format=jsonl", "source.path={empty}"], "has no training documents"),
        (["prepare", "{config}", "source.format=jsonl", "source.path={torn}"], "{torn} cannot be read"),
        (["prepare", "{config}", "source.format=grain", "source.path=json"], "name a grain source as package.module:object"),
        (["prepare", "{config}", "source.format=grain", "source.path=json:mails"], "cannot be loaded (AttributeError"),
        (["prepare", "{config}", "tokenizer.vocab_size=90000"], "tokenizer.vocab_size 90000 is more than"),
        (["train", "{config}", "training.init_from={dir}"], "{dir} is not a checkpoint"),
        (["train", "{config}", "training.init_from={run}", "model.width=64"], "the config needs"),
        (["train", "{config}", "training.init_from={run}/checkpoints/999"], "is not a checkpoint"),
        (["train", "{config}", "out={dir}/void"], "run `rmft prepare` with this config first"),
        (["train", "{config}", "checkpoint.count=99999"], "checkpoint.count 99999 is more than the"),
        (["audit", "{dir}"], "{dir} is not a run"),
        (["audit", "{run}", "training.steps=3"], "only audit.* can"),
        (["audit", "{run}", "audit.web_path=none.txt"], "none.txt cannot be read"),
        (["compare", "{dir}"], "is not a run"),
        (["compare", "{rmft}"], "0 of the runs have no defence"),
        (["report", "{dir}"], "run `rmft compare` first"),
        (["bench", "speed"], "unknown benchmark 'speed'"),
        (["train", "{config}", "--fast"], "--fast"),
        (["audit"], "Missing argument"),
        (["tarin"], "tarin"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(demo, tmp_path, capsys, arguments, says):
    out, _ = demo
    names = {"run": out / "runs/baseline", "rmft": out / "runs/rmft", "dir": tmp_path / "dir", "config": tmp_path / "c.yaml"}
    names["dir"].mkdir()
    names["config"].write_text((out / "runs/rmft/config.yaml").read_text() + "\n")
    fresh = yaml.safe_load(names["config"].read_text())
    fresh["name"] = "fresh"
    if arguments[0] == "prepare":
        fresh["out"] = str(tmp_path / "fresh")
    names["config"].write_text(yaml.safe_dump(fresh))
    for name, content in {
        "bad": b'{"text": "a"}\n{"text": \n',
        "field": b'{"body": "a"}\n',
        "empty": b"",
        "torn": b"\x1f\x8b\x08\x00torn",
    }.items():
        names[name] = tmp_path / f"{name}.jsonl{'.gz' if name == 'torn' else ''}"
        names[name].write_bytes(content)
    before = {p for p in (*out.rglob("*"), *tmp_path.rglob("*"))}
    code, printed, err = rmft(*(a.format(**names) for a in arguments), capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err and not printed
    assert says.format(**names) in lines[0]
    assert {p for p in (*out.rglob("*"), *tmp_path.rglob("*"))} == before  # nothing half-written


def test_corrupt_lines_can_be_skipped_and_are_counted(tmp_path, capsys):
    path = tmp_path / "mail.jsonl"
    good = [json.dumps({"text": f"write to a{n}@x.com about the report number {n}, please"}) for n in range(200)]
    path.write_text("\n".join([*good[:50], "{broken", *good[50:], '{"other": 1}']))
    settings = ["source.format=jsonl", f"source.path={path}", "tokenizer.vocab_size=300", f"out={tmp_path}/o"]
    (tmp_path / "c.yaml").write_text("source: {limit: 0}")
    code, _, err = rmft("prepare", tmp_path / "c.yaml", *settings, capsys=capsys)
    assert code == 2 and "source.on_error=skip" in err and not (tmp_path / "o").exists()
    code, out, err = rmft("prepare", tmp_path / "c.yaml", *settings, "source.on_error=skip", "--json", capsys=capsys)
    assert code == 0, err
    manifest = json.loads(out)
    assert manifest["skipped_documents"] == 2
    assert manifest["train"]["documents"] + manifest["heldout"]["documents"] == 200


def test_bench_masking_prints_one_json_object(tmp_path, capsys):
    settings = [s for s in SETTINGS if not s.startswith(("audit", "training.epochs", "checkpoint"))]
    code, out, _ = rmft("bench", "masking", "--json", f"out={tmp_path}", *settings, capsys=capsys)
    result = json.loads(out)
    keys = {"name", "device", "versions", "unit", "value", "peer", "peer_value", "ratio", "runs", "overhead_pct"}
    assert code == 0 and keys <= set(result) and result["name"] == "masking" and result["runs"]


def test_help_teaches_the_order(capsys):
    code, out, _ = rmft("--help", capsys=capsys)
    assert code == 0 and all(name in out for name in ("prepare", "train", "audit", "compare", "report", "demo", "bench"))
