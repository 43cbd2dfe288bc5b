"""The report page and the terminal table show results.json: every figure, rounded, in its place, escaped."""

import base64
import copy
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from rmft_jax.errors import UserError
from rmft_jax.report.html import text_table, write_report
from rmft_jax.report.plots import line_chart, linear_ticks, log_ticks, nice_step, style_classes, tick_text
from rmft_jax.report.scaling import scaling_charts
from rmft_jax.report.view import View, lookup, path_text, show

EVIL = "<script>alert(1)</script>"
RUNS = ("baseline", "rmft.p0.5", EVIL)
SETS = {"heldout": 256, "discoverable": 128, "all": 384}
ADDRESSES = 700
VOID = {"meta", "link", "img", "br", "hr", "input", "col"}


def make_rates(true: int, leaked: int, seen: int) -> dict:
    """Return one prompt set's figures; the interval is only roughly right, which suffices here."""
    ter, ser = 100 * true / ADDRESSES, 100 * true / seen
    return {
        "leaked": leaked, "true_leaked": true, "tegr": 100 * true / leaked if leaked else None,
        "ter": ter, "ter_ci": [ter * 0.61, ter * 1.53 + 0.5],
        "ser": ser, "ser_ci": [ser * 0.59, ser * 1.57 + 0.5],
    }


def make_run(slot: int) -> dict:
    """Return one run of four checkpoints."""
    checkpoints = []
    for index in range(4):
        true = (index + 1) * (9 - 4 * slot)
        rates = {name: make_rates(max(0, true - cut), 2 * true + 1 - cut, 150 * (index + 1))
                 for cut, name in enumerate(SETS)}
        loss = 19.0371 / (index + 1) + 7.123456789 + slot / 7
        checkpoints.append({
            "step": 200 * (index + 1), "epoch": 2.05 * (index + 1), "perplexity": loss,
            "perplexity_pii": loss / 2.3, "perplexity_other": loss * 1.2, "mdp": slot * 0.0512345,
            "prompts": rates})
    return {"method": ("none", "rmft", "dedup")[slot], "description": f"method & <b>{slot}</b>",
            "parameters": 1200000 + slot, "steps": 800, "epochs": 8.2, "training_tokens": 819200,
            "checkpoints": checkpoints}


def make_comparison(slot: int) -> dict:
    """Return one run's comparison with the baseline; the interval of the last run's TER cut includes zero."""
    cut = (0.0, 44.4444444, 6.0606060)[slot]
    low, high = cut - slot * 9.87654, cut + slot * 8.7654321
    tau = [0.01 * index for index in range(11)]
    maxter = [None if index < 5 * slot else 5.1428571 / (slot + 1) for index in range(11)]
    return {
        "ter_reduction_pct": cut, "ter_reduction_pct_ci": [low, high],
        "ser_reduction_pct": -cut, "ser_reduction_pct_ci": [-high, -low],
        "perplexity_increase_pct": slot * 1.7532, "perplexity_increase_pct_ci": [slot * 1.1, slot * 2.2],
        "perplexity_other_increase_pct": slot * 0.7531, "perplexity_other_increase_pct_ci": [slot * 0.1, slot * 1.2],
        "mdp": slot * 0.0512345, "mdp_ci": [slot * 0.04, slot * 0.06],
        "aurc": 5.0 / (slot + 1), "aurc_ci": [4.0 / (slot + 1), 6.0 / (slot + 1)],
        "maxter": {"tau": tau, "maxter": maxter},
        "prompts": {name: {"ter_reduction_pct": cut, "ter_reduction_pct_ci": [low, high],
                           "ser_reduction_pct": None, "ser_reduction_pct_ci": None} for name in SETS},
    }


@pytest.fixture
def results() -> dict:
    """Return three runs of four checkpoints, with nulls where real results have them."""
    made = {
        "schema": 1, "command": "rmft compare --out 'a & b' <in>", "version": "0.1.0",
        "data": {"source": "synthetic", "documents": 600, "tokens": 190123, "pii_occurrences": 6001,
                 "pii_identities": ADDRESSES, "pii_repeating_pct": 71.2345, "heldout_documents": 66,
                 "content_hash": "sha256:0123abcd"},
        "settings": {"baseline": "baseline", "confidence": 0.95, "bootstrap": 1000, "headline_prompts": "all",
                     "aurc_grid": {"start": 0.0, "stop": 0.1, "count": 11}, "prompts": dict(SETS),
                     "new_tokens": 48},
        "runs": {name: make_run(slot) for slot, name in enumerate(RUNS)},
        "comparison": {name: make_comparison(slot) for slot, name in enumerate(RUNS)},
    }
    first = made["runs"]["baseline"]["checkpoints"][0]
    first["perplexity_pii"] = None
    first["prompts"]["all"].update(ter=None, ter_ci=None, tegr=None)
    made["runs"][EVIL]["checkpoints"][2]["perplexity"] = None
    made["comparison"][EVIL]["aurc_ci"] = None
    return made


class Page(HTMLParser):
    """Collects every element with its attributes, the ids of its ancestors and its text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {[item['tag'] for item in self.open]}"

    def handle_starttag(self, tag, attrs):
        inside = {item["attrs"].get("id") for item in self.open}
        item = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": inside}
        self.elements.append(item)
        if tag not in VOID:
            self.open.append(item)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open[-1]["tag"] == tag, f"{tag} closes {self.open[-1]['tag']}"
        self.open.pop()

    def handle_data(self, data):
        for item in self.open:
            item["text"] += data

    def having(self, attribute, inside=None):
        """Return the elements with the attribute, below the element with the id."""
        return [item for item in self.elements
                if attribute in item["attrs"] and (inside is None or inside in item["inside"])]

    def by_id(self, name):
        """Return the one element with the id."""
        (found,) = [item for item in self.elements if item["attrs"].get("id") == name]
        return found


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a report and parses it."""
    def written(results):
        path = write_report(results, tmp_path / "out" / "report.html")
        return Page(path.read_text(encoding="utf-8"))
    return written


def resolve(results, path: str):
    """Follow a data-path, independently of the package: dots separate, a backslash escapes."""
    here = results
    for part in re.findall(r"(?:\\.|[^.\\])+", path):
        part = re.sub(r"\\(.)", r"\1", part)
        here = here[int(part)] if isinstance(here, list) else here[part]
    return here


def assert_rounded(text: str, value, path: str):
    """Assert that the text is the value rounded to the decimals that the text has, and not too coarsely."""
    if value is None:
        assert text == "–", path
        return
    if path == "settings.confidence":
        value = 100 * value
    shown = text.replace(",", "").replace("−", "-")
    assert re.fullmatch(r"-?\d+(\.\d+)?", shown), (path, text)
    decimals = len(shown.partition(".")[2])
    assert abs(float(shown) - value) <= 0.5 * 10**-decimals + 1e-9, (path, text, value)
    assert decimals >= 1 or float(value).is_integer(), (path, text, value)
    assert value == 0 or float(shown) != 0, (path, text, value)


def leaves(value, path=()):
    """Yield every number and null below the value, with its path."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    elif not isinstance(value, str):
        yield path, value


def test_every_figure_is_the_one_in_the_results(results, write):
    page = write(results)
    marked = page.having("data-path")
    assert len(marked) > 500
    for item in marked:
        path, raw = item["attrs"]["data-path"], item["attrs"]["data-value"]
        assert raw == json.dumps(resolve(results, path)), path
        if item["tag"] == "span":
            assert_rounded(item["text"], resolve(results, path), path)


def test_every_number_of_the_results_is_on_the_page(results, write):
    shown = {item["attrs"]["data-path"] for item in write(results).having("data-path")}
    charted = {item["attrs"]["data-x-path"] for item in write(results).having("data-x-path")}
    missing = [path_text(path) for path, value in leaves(results)
               if path_text(path) not in shown | charted and not ("maxter" in path and value is None)
               and not ("maxter" in path and "tau" in path)]
    assert missing == []


def test_summary_row_holds_the_required_figures(results, write):
    shown = {item["attrs"]["data-path"] for item in write(results).having("data-path", inside="summary")}
    for run in RUNS:
        key, last = path_text((run,)), f"runs.{path_text((run,))}.checkpoints.3."
        for path in [f"{last}prompts.all.ter", f"{last}prompts.all.ter_ci.0", f"{last}prompts.all.ser_ci.1",
                     f"{last}prompts.all.ser", f"{last}prompts.all.tegr", f"{last}perplexity",
                     f"{last}perplexity_pii", f"comparison.{key}.perplexity_increase_pct",
                     f"comparison.{key}.ter_reduction_pct_ci.0", f"comparison.{key}.ser_reduction_pct",
                     f"comparison.{key}.mdp", f"comparison.{key}.aurc"]:
            assert path in shown


def test_summary_figures_stand_under_their_headings(results, write):
    page = write(results)
    scoped = page.having("scope", inside="summary")
    headings = [item["text"].replace("%", "") for item in scoped if item["attrs"]["scope"] == "col"]
    assert headings == ["Run", "TER", "SER", "TEGR", "TER cut", "SER cut", "Perplexity", "PII perplexity",
                        "Perplexity increase", "Increase outside PII", "MDP", "AURC"]
    paths = [item["attrs"]["data-path"] for item in page.having("data-path", inside="summary")]
    metrics = [path.rpartition(".")[2] for path in paths if "_ci" not in path]
    assert metrics == ["ter", "ser", "tegr", "ter_reduction_pct", "ser_reduction_pct", "perplexity", "perplexity_pii",
                       "perplexity_increase_pct", "perplexity_other_increase_pct", "mdp", "aurc"] * len(RUNS)


def test_verdict_says_what_leaked_and_what_is_not_settled(results, write):
    page = write(results)
    text = " ".join(page.by_id("verdict")["text"].replace("\u00a0", " ").split())
    assert "baseline (method & <b>0</b>) gave away 34 of the 700 addresses, 4.86 % (95 % interval" in text
    assert "leaked 44.4 % less than baseline (interval 34.6 to 53.2 %). The cost" in text
    assert "leaked 6.1 % less than baseline (interval −13.7 to 23.6 %); the interval includes zero, so the " \
        "difference is not settled." in text
    assert text.count("not settled") == 1
    assert "changed by +1.8 %" in text


def test_verdict_never_prints_a_denominator_that_the_rate_contradicts(results, write):
    results["data"]["pii_identities"] = 900
    text = write(results).by_id("verdict")["text"]
    assert "900" not in text and "gave away 34 addresses, 4.86" in text


def test_verdict_names_more_leakage_and_a_missing_comparison(results, write):
    results["comparison"]["rmft.p0.5"].update(ter_reduction_pct=-12.5, ter_reduction_pct_ci=[-20.0, -4.0])
    results["comparison"][EVIL]["ter_reduction_pct"] = None
    text = write(results).by_id("verdict")["text"].replace("\u00a0", " ")
    assert "its reduction against baseline was −12.5 % (interval −20.0 to −4.0 %), that is, it leaked" in text
    assert "no reduction against baseline can be stated" in text


def test_verdict_does_not_take_an_interval_without_width_for_certainty(results, write):
    results["comparison"]["rmft.p0.5"].update(ter_reduction_pct=100.0, ter_reduction_pct_ci=[100.0, 100.0])
    assert "an interval without width is no proof" in write(results).by_id("verdict")["text"]


def test_headline_reductions_are_taken_from_the_top_where_the_set_has_none(results, write):
    for run in RUNS:
        del results["comparison"][run]["prompts"]["all"]
    paths = {item["attrs"]["data-path"] for item in write(results).having("data-path", inside="sets")}
    for run in RUNS:
        key = path_text((run,))
        assert {f"comparison.{key}.ter_reduction_pct", f"comparison.{key}.ter_reduction_pct_ci.0",
                f"comparison.{key}.prompts.heldout.ter_reduction_pct"} <= paths
        assert f"comparison.{key}.ter_reduction_pct_ci.1" in paths


def test_one_script_of_ours_runs_and_nothing_is_loaded(results, write, tmp_path):
    page = write(results)
    source = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    tags = {item["tag"] for item in page.elements}
    assert tags.isdisjoint({"link", "img", "iframe", "object", "b"})
    (code,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    (policy,) = [item["attrs"]["content"] for item in page.elements if item["attrs"].get("http-equiv")]
    assert policy.startswith("default-src 'none';") and policy.endswith(f"script-src 'sha256-{digest}'")
    assert source.count("<script") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert not re.search(r"https?://|url\(|@import", source)
    for item in page.elements:
        assert not {name for name in item["attrs"] if name == "src" or name.startswith("on")}
    assert page.by_id("command")["text"] == results["command"]


def test_every_link_leads_somewhere_and_every_figure_to_its_definition(results, write):
    page = write(results)
    ids = {item["attrs"]["id"] for item in page.elements if "id" in item["attrs"]}
    links = [item["attrs"]["href"] for item in page.elements if item["tag"] == "a"]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    for item in page.elements:
        if item["tag"] == "figure":
            inside = [other["attrs"]["href"] for other in page.elements
                      if other["tag"] == "a" and item["attrs"]["id"] in other["inside"]]
            assert inside[0].startswith("#def-") and inside[1] == "#command"
    headings = [item for item in page.having("scope", inside="summary") if item["attrs"]["scope"] == "col"][1:]
    named = [item["text"] for item in page.elements if item["tag"] == "a" and "summary" in item["inside"]]
    assert [item["text"].replace("%", "") for item in headings] == named


@pytest.mark.parametrize("plot", ["ter", "ser", "tegr", "perplexity", "maxter"])
def test_plot_has_a_point_for_every_value(results, write, plot):
    page = write(results)
    wanted = set()
    for run in RUNS:
        at = ("comparison", run, "maxter", "maxter") if plot == "maxter" else ("runs", run, "checkpoints")
        inner = {"maxter": (), "perplexity": ("perplexity",)}.get(plot, ("prompts", "all", plot))
        for index in range(len(lookup(results, at))):
            if lookup(results, (*at, index, *inner)) is not None:
                wanted.add(path_text((*at, index, *inner)))
    points = [item for item in page.having("data-path", inside=f"plot-{plot}") if item["tag"] == "circle"]
    assert len(points) == len(wanted) and {item["attrs"]["data-path"] for item in points} == wanted
    (chart,) = [item for item in page.elements if item["tag"] == "svg" and item["attrs"].get("role") == "img"
                and f"plot-{plot}" in item["inside"]]
    assert all(run in chart["attrs"]["aria-label"] for run in RUNS)
    for item in points:
        shown = show(float(item["attrs"]["data-value"]), "perplexity" if plot == "perplexity" else plot)
        assert shown in item["text"]
        assert item["attrs"]["data-x-value"] == json.dumps(resolve(results, item["attrs"]["data-x-path"]))


@pytest.mark.parametrize("plot", ["ter", "perplexity", "maxter"])
def test_points_stand_where_their_values_belong(results, write, plot):
    points = [item["attrs"] for item in write(results).having("data-path", inside=f"plot-{plot}")
              if item["tag"] == "circle"]
    for pixel, value, rising in (("cx", "data-x-value", True), ("cy", "data-value", False)):
        pairs = sorted((float(point[value]), float(point[pixel])) for point in points)
        (low, start), (high, stop) = pairs[0], pairs[-1]
        assert (stop > start) is rising
        for number, place in pairs:
            assert place == pytest.approx(start + (number - low) / (high - low) * (stop - start), abs=0.02)


@pytest.fixture
def with_attacks(results):
    """Return the results with metrics at each last checkpoint (the middle run has fewer) and with claims."""
    for slot, run in enumerate(RUNS):
        results["runs"][run]["checkpoints"][-1]["metrics"] = {
            "similarity": {"prompts": 200 + slot, "mean": 0.41234 + slot / 10, "mean_ci": [0.4, 0.7]},
            "k_eidetic": {"buckets": [
                {"documents": name, "at_most": most, "values": 300, "extracted": 3, "rate_pct": 1.2345 * (index + 1 + slot),
                 "rate_pct_ci": [0.5, 9.5], "k_eidetic": index}
                for index, (name, most) in enumerate((("1", 1), ("2", 2), ("3+", None))[: 2 if slot == 1 else 3])]},
            "exposure": {"unit": "bits", "chance": 1.4426950, "references": 250, "repetitions": [
                {"repetitions": count, "canaries": 4, "by_rank": 1.98765 + slot + count / 7, "by_rank_ci": [1.1, 7.9],
                 "by_fit": None, "by_fit_ci": None} for count in (1, 16)]},
        }
    results["study"] = {"name": "rmft", "seeds": 2, "planned_seeds": 3}
    claim = {"id": "a", "source": "paper & co", "statement": "A <b>claim</b>", "expected": 80.81, "measured": 79.54321,
             "interval": [76.25, 85.75], "holds": True, "settled": False}
    results["claims"] = [claim, claim | {"measured": None, "interval": None, "holds": False, "settled": True}]
    return results


def test_further_attacks_and_claims_are_on_the_page(with_attacks, write):
    page = write(with_attacks)
    for item in page.having("data-value"):
        value = resolve(with_attacks, item["attrs"]["data-path"])
        assert json.loads(item["attrs"]["data-value"]) == value
        if item["tag"] == "span":
            assert_rounded(item["text"], value, item["attrs"]["data-path"])
    headings = " ".join(item["text"] for item in page.elements if item["tag"] == "th" and "attacks" in item["inside"])
    assert "Similarity" in headings and "Exposure, 1×" in headings and "Exposure, 16×" in headings and "AUC" not in headings
    shown = {item["attrs"]["data-path"] for item in page.having("data-path", inside="measurements")}
    for path, value in leaves(with_attacks["runs"]):
        named = path[-1] in ("repetitions", "at_most")  # the first is in the row's name, null in the second is "no end"
        if "metrics" in path and value is not None and not named:
            assert path_text(("runs", *path)) in shown
    table = page.by_id("claims")["text"]
    assert "A <b>claim</b>" in table and "paper & co" in table and "yes, not settled" in table and "no" in table
    assert "2 of 3 seeds" in " ".join(item["text"] for item in page.elements if item["tag"] == "p")


@pytest.mark.parametrize("plot, names, count", [("occurrences", ["1", "2", "3+"], 8), ("exposure", ["1", "16"], 6)])
def test_named_places_of_the_x_axis(with_attacks, write, plot, names, count):
    page = write(with_attacks)
    ticks = [item["text"] for item in page.elements if plot_tick(item, plot)]
    assert ticks == names
    points = [item["attrs"] for item in page.having("data-x-path", inside=f"plot-{plot}")]
    assert len(points) == count
    places = {}
    for point in points:
        name = resolve(with_attacks, point["data-x-path"])
        assert json.loads(point["data-x-value"]) == name
        places.setdefault(str(name), set()).add(point["cx"])
    assert all(len(at) == 1 for at in places.values()) and sorted(places, key=lambda n: min(map(float, places[n]))) == names


def plot_tick(item, plot):
    """Tell whether an element is the label of a tick of the x axis of a plot."""
    return item["tag"] == "text" and item["attrs"].get("class") == "xtick" and f"plot-{plot}" in item["inside"]


def test_verdict_of_many_runs_has_a_line_for_each(results, write):
    for number in range(3):
        for part in ("runs", "comparison"):
            results[part][f"more{number}"] = copy.deepcopy(results[part]["rmft.p0.5"])
    for run in results["runs"].values():
        run["mean"] = {"all": {"ter": 2.34567, "ter_ci": [1.0, 4.0]}}
    page = write(results)
    turns = [item["text"].replace("\u00a0", " ") for item in page.elements if item["attrs"].get("class") == "turn"]
    assert len(turns) == 6 and turns[0] == "baseline: on average 2.35 % of the addresses."
    assert turns[1] == ("rmft.p0.5: on average 2.35 % of the addresses, a reduction of 44.4 % (interval 34.6 to 53.2 %); "
                        "perplexity +1.8 % (interval 1.1 to 2.2 %).")
    marks = [item["attrs"] for item in page.elements if item["attrs"].get("class") == "mark"]
    heights = sorted(float(mark["y"]) for mark in marks if mark["x"] == marks[1]["x"])
    assert len(heights) >= 4 and all(b - a >= 12 for a, b in zip(heights, heights[1:], strict=False))


def test_null_breaks_the_line_and_the_band(results, write):
    page = write(results)
    lines = [item for item in page.elements if item["tag"] == "path" and "plot-perplexity" in item["inside"]
             and item["attrs"]["class"] == "line" and item["attrs"]["d"] != "M0 5H28"]
    assert len(lines) == 4
    bands = [item for item in page.elements if item["attrs"].get("class") == "band"]
    around = {name for band in bands for name in band["inside"]}
    assert {name for name in around if name} == {"plot-ter", "plot-ser"}


def test_absent_parts_do_not_stop_the_page(results, write):
    for run in RUNS:
        for checkpoint in results["runs"][run]["checkpoints"]:
            del checkpoint["prompts"]["heldout"]
    results["runs"]["rmft.p0.5"]["checkpoints"] = []
    del results["comparison"][EVIL]
    page = write(results)
    assert "heldout" not in page.by_id("sets")["text"] and "discoverable" in page.by_id("sets")["text"]
    for item in page.having("data-path"):
        resolve(results, item["attrs"]["data-path"])
    assert "no leak count is available" in page.by_id("verdict")["text"]
    write({"runs": {}})


def test_report_is_pure_and_replaces_the_old_file(results, tmp_path):
    before = copy.deepcopy(results)
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(results, path) == path
    first = path.read_bytes()
    write_report(results, path)
    assert path.read_bytes() == first and results == before
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_failed_report_leaves_the_old_file(results, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    results["runs"] = 7
    with pytest.raises(UserError, match="are not whole .TypeError.*run the command that wrote them again"):
        write_report(results, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def printed(results) -> list:
    """Return the terminal table as lines, as it is when piped."""
    console = Console(width=100, force_terminal=False, record=True, file=io.StringIO())
    console.print(text_table(results))
    return console.export_text().splitlines()


def test_terminal_table_shows_the_same_rounded_figures(results, write):
    table = text_table(results)
    assert table.row_count == len(RUNS)
    lines = printed(results)
    assert max(map(len, lines)) <= 100
    page = write(results)
    for run in RUNS:
        (start,) = [index for index, line in enumerate(lines) if line.startswith(run[:17])]
        cells = lines[start][18:].split()
        assert len(cells) == 11
        row = [item for item in page.having("data-path", inside="summary")
               if path_text((run,)) in item["attrs"]["data-path"]]
        shown = [item for item in row if "_ci" not in item["attrs"]["data-path"]]
        assert cells == [item["text"].replace("−", "-") for item in shown]
        assert lines[start + 1].startswith("  low") and lines[start + 2].startswith("  high")
        lows = [item for item in row if item["attrs"]["data-path"].endswith("_ci.0")]
        bounds = [item["text"].replace("−", "-") for item in lows]
        assert [cell for cell in lines[start + 1].split()[1:] if cell != "–"] == bounds


def test_null_is_a_dash_in_both(results, write):
    results["runs"]["baseline"]["checkpoints"][3]["prompts"]["all"]["tegr"] = None
    page = write(results)
    (item,) = [item for item in page.having("data-path", inside="summary")
               if item["attrs"]["data-path"] == "runs.baseline.checkpoints.3.prompts.all.tegr"]
    assert item["text"] == "–" and item["attrs"]["data-value"] == "null"
    (aurc,) = [item for item in page.having("data-path", inside="summary")
               if item["attrs"]["data-path"].endswith(".aurc_ci")]
    assert aurc["text"] == "–" and aurc["attrs"]["data-value"] == "null"
    assert aurc["attrs"]["data-path"] == f"comparison.{EVIL}.aurc_ci"
    (row,) = [line for line in printed(results) if line.startswith("baseline  ")]
    assert row.split()[3] == "–"


def test_rich_markup_in_a_run_name_is_text(results):
    results["runs"] = {"baseline": results["runs"]["baseline"], "[red]x[/red]": results["runs"][EVIL]}
    assert any(line.startswith("[red]x[/red]") for line in printed(results))


@pytest.mark.parametrize("value, name, text", [
    (None, "ter", "–"), (math.nan, "ter", "–"), (0.714285, "ter", "0.71"), (0.0, "ter", "0.00"),
    (0.004, "ter", "0.004"), (1e-9, "ter", "0.00"), (-1e-9, "mdp", "0.000"),
    (-12.34, "ter_reduction_pct", "−12.3"), (190123, "tokens", "190,123"),
    (0.95, "confidence", "95"), (0.999, "confidence", "99.9"),
    (3.2e9, "perplexity", "3.20e+09"), ("text", "", "text")])
def test_show(value, name, text):
    assert show(value, name) == text


@pytest.mark.parametrize("low, high", [(0, 0), (0, 0.0031), (0, 8), (7.1, 26.2), (0, 100), (5, 5), (0, 1e-7)])
def test_ticks_are_round_and_enclose(low, high):
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 12
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_log_ticks_enclose_and_nice_step():
    for low, high in ((7, 90), (1, 10), (3, 50000), (0.2, 5)):
        ticks = log_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 12
    assert nice_step(10) == 2 and nice_step(1) == pytest.approx(0.2)


def test_many_runs_look_different_and_an_empty_chart_says_so():
    assert len({style_classes(slot) for slot in range(28)}) == 28
    assert "no values" in line_chart([], "nothing", "epoch")


def test_wide_range_of_perplexity_is_drawn_on_a_log_axis(results, write, tmp_path):
    results["runs"]["baseline"]["checkpoints"][0]["perplexity"] = 4000.0
    write(results)
    source = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert source.count("log scale") == 1


def test_power_laws_are_drawn_through_the_points_they_fit():
    """T = scale N^slope exactly, for two values of tau: each thin line must pass through the points of its own."""
    sizes = {"small": 1e5, "middle": 1e6, "large": 4e6}
    laws = {"0.5": (3e4, -0.7), "0.9": (5e6, -1.0)}
    times = {name: {tau: {"between": {"mean": scale * n**slope, "mean_ci": None}} for tau, (scale, slope) in laws.items()}
             for name, n in sizes.items()}  # fmt: skip
    empty = {"x": [], "mean": [], "low": [], "high": []}
    curves = {key: empty for key in ("m", "unit_mean", "heldout_nll")}
    plain = {
        "sizes": {name: {"parameters": n, "times": times[name], "curves": curves} for name, n in sizes.items()},
        "power_laws": {tau: {"fit": {"scale": scale, "slope": slope}} for tau, (scale, slope) in laws.items()},
    }
    (chart,) = scaling_charts(View({"findings": {"memorization": {"plain": plain}}}))
    assert chart.key == "times" and chart.definition == "times"
    for slot in (0, 1):
        classes = style_classes(slot)
        (fit,) = re.findall(f'<path class="fit {classes}" d="M(.*?)"', chart.svg)
        drawn = [tuple(map(float, place.split())) for place in fit.split("L")]
        points = re.findall(f'<g class="run {classes}" data-slot="{slot}">.*?</g>', chart.svg, re.DOTALL)[0]
        for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', points):
            least = min(math.hypot(a - float(x), b - float(y)) for a, b in drawn)
            assert least < 8, "25 places along the line, which is straight on axes that are both logarithmic"
        (first, last) = drawn[0], drawn[-1]
        for a, b in drawn:  # on the straight line between its ends
            share = (a - first[0]) / (last[0] - first[0])
            assert b == pytest.approx(first[1] + share * (last[1] - first[1]), abs=0.05)


@pytest.mark.parametrize("tick, text", [(5e4, "50k"), (1e6, "1M"), (2.5e9, "2.5B"), (500, "500")])
def test_ticks_of_large_axes_are_short(tick, text):
    assert tick_text(tick, [500, 5e4, 1e6, 2.5e9]) == text
