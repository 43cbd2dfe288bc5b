"""results.json as one self-contained HTML page, and its summary as a table for the terminal."""

import base64
import hashlib
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from rmft_jax.errors import UserError
from rmft_jax.files import write_text
from rmft_jax.report.plots import HEIGHT, LEFT, WIDTH, charts, style_classes
from rmft_jax.report.scaling import scaling_charts, scaling_table
from rmft_jax.report.study import TITLES, study_charts, study_table
from rmft_jax.report.verdict import verdict
from rmft_jax.report.view import MISSING, View, is_number, lookup, show


class Column(NamedTuple):
    """One summary column: where its figure stands and what it is called on the page and in the terminal."""

    place: str
    metric: str
    heading: str
    unit: str
    terminal: str
    definition: str


SUMMARY = (
    Column("prompts", "ter", "TER", "%", "TER\n%", "ter"),
    Column("prompts", "ser", "SER", "%", "SER\n%", "ser"),
    Column("prompts", "tegr", "TEGR", "%", "TEGR\n%", "tegr"),
    Column("comparison", "ter_reduction_pct", "TER cut", "%", "TER\ncut %", "reduction"),
    Column("comparison", "ser_reduction_pct", "SER cut", "%", "SER\ncut %", "reduction"),
    Column("last", "perplexity", "Perplexity", "", "PPL\n", "perplexity"),
    Column("last", "perplexity_pii", "PII perplexity", "", "PII\nPPL", "perplexity"),
    Column("comparison", "perplexity_increase_pct", "Perplexity increase", "%", "PPL\nup %", "perplexity"),
    Column("comparison", "perplexity_other_increase_pct", "Increase outside PII", "%", "not PII\nup %", "perplexity"),
    Column("comparison", "mdp", "MDP", "", "MDP\n", "mdp"),
    Column("comparison", "aurc", "AURC", "", "AURC\n", "aurc"),
)


class Attack(NamedTuple):
    """One column of further attacks: its heading, unit, path below a checkpoint's metrics, and the id of its definition."""

    heading: str
    unit: str
    path: tuple
    definition: str


ATTACKS = (
    Attack("Similarity", "", ("similarity", "mean"), "similarity"),
    Attack("Log-prob. gap", "nats", ("log_probability_gap", "mean"), "gap"),
    Attack("Discoverable 50/50", "%", ("discoverable_50", "rate_pct"), "discoverable"),
    Attack("Extraction strength", "", ("extraction_strength", "mean"), "strength"),
    Attack("AUC, loss", "", ("membership", "attacks", "loss", "auc"), "membership"),
    Attack("AUC, zlib", "", ("membership", "attacks", "zlib", "auc"), "membership"),
    Attack("AUC, min-k%", "", ("membership", "attacks", "min_k", "auc"), "membership"),
    Attack("AUC, min-k%++", "", ("membership", "attacks", "min_k_plus_plus", "auc"), "membership"),
    Attack("AUC, reference", "", ("membership", "attacks", "reference", "auc"), "membership"),
)


def attacks(view: View) -> list[Attack]:
    """Return the columns of the further attacks that some run has a figure for; exposure for each number of repetitions."""
    entries = max((view.value(*view.last(run, "metrics", "exposure", "repetitions")) or [] for run in view.runs),
                  key=len, default=[])
    columns = [*ATTACKS, *(
        Attack(f"Exposure, {entry['repetitions']}×", "bits", ("exposure", "repetitions", index, "by_rank"), "exposure")
        for index, entry in enumerate(entries))]
    has = lambda column, run: is_number(view.value(*view.last(run, "metrics", *column.path)))  # noqa: E731
    return [column for column in columns if any(has(column, run) for run in view.runs)]


def summary_path(view: View, run: str, column: Column) -> tuple:
    """Return the path of one cell of the summary."""
    if column.place == "prompts":
        return view.headline_path(run, column.metric)
    if column.place == "last":
        return view.last(run, column.metric)
    return ("comparison", run, column.metric)


@cache
def template(name: str) -> jinja2.Template:
    """Return one of the package's templates."""
    read = lambda name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8")  # noqa: E731
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read), autoescape=not name.endswith(".md"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name)


def study_of(results: dict) -> str:
    """Return the name of the study that results are of, if it has a page of its own, else ""."""
    name = (results.get("study") or {}).get("name", "")
    return name if name == "scaling" or name in TITLES else ""


def sections(view: View) -> list[tuple[str, str]]:
    """Return the id and the name of each section of the page, in order."""
    some = [("verdict-heading", "Verdict"), ("summary-heading", "Summary")]
    some += [("claims-heading", "Claims")] if view.value("claims") else []
    some += [("plots-heading", "Over training"), ("sets-heading", "By prompt set")]
    some += [("attacks-heading", "Further attacks")] if attacks(view) else []
    return [*some, ("definitions-heading", "What the figures mean"), ("checkpoints-heading", "Every checkpoint"),
            ("data-heading", "Data and settings"), ("command-heading", "Command")]


@cache
def script() -> tuple[Markup, str]:
    """Return the page's script, and the content security policy that lets it run and nothing else load."""
    text = resources.files(__package__).joinpath("script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return Markup(text), policy


def render(results: dict) -> str:
    """Return the report page."""
    view = View(results)
    name = study_of(results)
    code, policy = script()
    shared = {"view": view, "classes": style_classes, "script": code, "csp": policy}
    if name == "scaling":
        return template("scaling.html").render(charts=scaling_charts(view), **shared)
    if name:
        return template("study.html").render(title=TITLES[name], name=name, charts=study_charts(view), **shared)
    return template("template.html").render(
        num=view.num, interval=view.interval, summary=SUMMARY, verdict=verdict(view), sections=sections(view),
        charts=charts(view), attacks=attacks(view), path_of=partial(summary_path, view), **shared)


def write_report(results: dict, path: Path) -> Path:
    """Write the report page for the results to the path, whole or not at all, and return the path.

    Raises UserError for results that are not such as this version writes.
    """
    try:
        page = render(results)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, jinja2.TemplateError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(f"the results for {path} are not whole ({why}): run the command that wrote them again") from None
    write_text(Path(path), page)
    return Path(path)


def write_charts(results: dict, folder: Path) -> list[Path]:
    """Write each chart of the page as an SVG file of its own, with heading and legend, and return their paths."""
    view = View(results)
    paths = []
    make = {"": charts, "scaling": scaling_charts}.get(study_of(results), study_charts)
    for chart in make(view):
        entries: list = []
        x, row = LEFT, 0
        for slot, name in chart.names:
            width = 40 + 7 * len(name)
            if x + width > WIDTH and entries:
                x, row = LEFT, row + 1
            entries.append((style_classes(slot), x, 18 * row, name))
            x += width
        drawn = template("chart.svg").render(chart=chart, entries=entries, top=44 + 18 * row, width=WIDTH, height=HEIGHT)
        paths.append(Path(folder) / f"{chart.key}.svg")
        write_text(paths[-1], drawn)
    return paths


def _cell(view: View, path: tuple) -> str:
    lines = [view.text(*path)]
    interval = (*path[:-1], f"{path[-1]}_ci")
    if lookup(view.results, interval) is not MISSING:
        lines += [view.text(*interval, 0), view.text(*interval, 1)]
    return "\n".join(lines).replace("−", "-")


def text_table(results: dict) -> Table:
    """Return the summary, one row per run: each figure stands over the low and high end of its interval."""
    if name := study_of(results):
        return scaling_table(results) if name == "scaling" else study_table(results)
    view = View(results)
    caption = Text(
        f"Last checkpoint, prompt set {view.headline}; cuts are means over checkpoints against "
        f"{view.baseline}; low and high bound the {view.text('settings', 'confidence')} % interval.")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption=caption,
                  caption_justify="left", caption_style="")
    table.add_column("run\n", max_width=18, overflow="ellipsis", no_wrap=True)
    for column in SUMMARY:
        table.add_column(column.terminal, justify="right", no_wrap=True, min_width=5)
    for run in view.runs:
        cells = [_cell(view, summary_path(view, run, column)) for column in SUMMARY]
        table.add_row(Text(f"{run}\n  low\n  high"), *map(Text, cells))
    return table


def claims_table(results: dict) -> Table:
    """Return the claims of a study, one row each."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading, justify in (("claim", "left"), ("expected", "right"), ("measured", "right"), ("interval", "right"),
                             ("holds", "left")):
        table.add_column(heading, justify="left" if justify == "left" else "right")
    for claim in results["claims"]:
        low, high = claim["interval"] or (None, None)
        holds = ("yes" if claim["holds"] else "no") + ("" if claim["settled"] else ", not settled")
        interval = f"[{show(low)}, {show(high)}]" if claim["interval"] else "-"
        figures = [show(claim["expected"]), show(claim["measured"]), interval]
        table.add_row(Text(claim["statement"]), *(figure.replace("−", "-") for figure in figures), holds)
    return table
