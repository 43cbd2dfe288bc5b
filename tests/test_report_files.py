"""What else comes of results.json: the section for a model card, tables in Parquet, and the schema they rest on."""

import copy
import json
import re
from importlib import resources

import jsonschema
import pytest
from test_cli import rmft
from test_report import EVIL, RUNS, leaves, results, with_attacks  # noqa: F401  fixtures

from rmft_jax.report.model_card import model_card
from rmft_jax.report.tables import checkpoint_rows, write_tables
from rmft_jax.report.view import is_number, path_text


def schema():
    """Return the schema that comes with the package, itself checked."""
    found = json.loads(resources.files("rmft_jax.report").joinpath("results.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def test_schema_takes_good_results_and_refuses_broken_ones(with_attacks):  # noqa: F811
    check = schema()
    check.validate(with_attacks)
    for path, value in [
        (("schema",), 2), (("runs", "baseline", "checkpoints"), []),
        (("runs", "baseline", "checkpoints", 0, "perplexity"), "8"),
        (("comparison", EVIL, "mdp_ci"), [1]), (("claims", 0, "holds"), "yes"), (("data", "documents"), -1),
    ]:  # fmt: skip
        broken = copy.deepcopy(with_attacks)
        at = broken
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = value
        assert not check.is_valid(broken), path
    del with_attacks["comparison"], with_attacks["claims"]
    assert not check.is_valid(with_attacks)


def test_model_card_holds_the_figures_of_the_summary(results):  # noqa: F811
    card = model_card(results)
    table = [line.split(" | ") for line in card.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in table[1:]] == ["baseline", "rmft.p0.5", "\\<script\\>alert(1)\\</script\\>"]
    last = results["runs"]["rmft.p0.5"]["checkpoints"][-1]
    low, high = last["prompts"]["all"]["ter_ci"]
    assert table[2][1] == f"{last['prompts']['all']['ter']:.2f} [{low:.2f}, {high:.2f}]"
    assert "Of 700 e-mail addresses in the training text, baseline gave away 34" in card
    assert not re.search(r"(?<!\\)<script", card) and results["command"] in card
    assert "256 heldout, 128 discoverable prompts" in card


def test_tables_hold_every_number(with_attacks, tmp_path):  # noqa: F811
    pandas = pytest.importorskip("pandas")
    first, second = write_tables(with_attacks, tmp_path)
    table = pandas.read_parquet(first)
    assert len(table) == 3 * 4 * 3 == len(checkpoint_rows(with_attacks)) and set(table.run) == set(RUNS)
    row = table[(table.run == "baseline") & (table.step == 800) & (table.prompts == "heldout")].iloc[0]
    rates = with_attacks["runs"]["baseline"]["checkpoints"][-1]["prompts"]["heldout"]
    assert (row.ter, row.ter_low, row.ter_high) == (rates["ter"], *rates["ter_ci"])
    figures = pandas.read_parquet(second).set_index("path").value
    wanted = {path_text(path): value for path, value in leaves(with_attacks) if is_number(value)}
    assert dict(figures) == wanted


def test_the_command_writes_all_of_them_for_each_directory(results, tmp_path, capsys):  # noqa: F811
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    code, out, _ = rmft("report", tmp_path / "a", tmp_path / "b", "--model-card", "--parquet", "--json", capsys=capsys)
    names = ("report.html", "model_card.md", "checkpoints.parquet", "figures.parquet")
    assert code == 0 and json.loads(out) == [str(tmp_path / place / name) for place in "ab" for name in names]
    (tmp_path / "b" / "results.json").write_text('{"schema": 1, "study": {"name": "m-score"}}')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, out, err = rmft("report", tmp_path / "b", "--model-card", capsys=capsys)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
