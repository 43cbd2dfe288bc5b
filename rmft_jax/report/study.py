"""Studies whose results say themselves what to show: tables, charts of lines with bands, pictures, claims.

tables: a list of key, title, note, columns, and rows: a name, then a figure for each column, as mean and mean_ci.
charts: a list of key, heading, note, x_label, log_x, and lines: name -> x, mean, low, high, lists of equal length.
images: a list of title, note, and images: title and png (base64).
"""

from rich import box
from rich.table import Table
from rich.text import Text

from rmft_jax.report.plots import Chart, Line, Point, line_chart
from rmft_jax.report.view import View, show

TITLES = {
    "early-learning": "Early learning, and what keeps wrong labels from being memorized",
    "deja-vu": "What vision-language models remember beyond captions",
    "m-score": "What generative models memorize",
    "retroprompt": "Looking up in the place of learning by heart",
}


def study_charts(view: View) -> list[Chart]:
    """Return the page's charts in order."""
    return [_chart(chart, ("charts", number)) for number, chart in enumerate(view.value("charts"))]


def _chart(chart: dict, at: tuple) -> Chart:
    lines = []
    for slot, (name, line) in enumerate(chart["lines"].items()):
        here = (*at, "lines", name)
        values = enumerate(zip(line["x"], line["mean"], line["low"], line["high"], strict=True))
        points = [
            Point(x, y, low, high, (*here, "mean", n), (*here, "x", n), f"{name}, {show(x)}: {show(y)}")
            for n, (x, y, low, high) in values
        ]
        lines.append(Line(name, slot, points))
    said = f"Line chart of {chart['heading']}, one line each: {', '.join(chart['lines'])}."
    drawn = line_chart(lines, said, chart["x_label"], log_x=chart["log_x"])
    names = tuple((line.slot, line.name) for line in lines)
    return Chart(chart["key"], chart["heading"], chart["note"], drawn, names, "study")


def study_table(results: dict) -> Table:
    """Return all tables as one, for the terminal: a row for each figure, its interval beside it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading, justify in (("", "left"), ("figure", "left"), ("mean", "right"), ("interval", "right")):
        table.add_column(heading, justify="left" if justify == "left" else "right")
    for found in results["tables"]:
        table.add_row(Text(found["title"], style="bold"))
        for name, *figures in found["rows"]:
            for number, (column, figure) in enumerate(zip(found["columns"], figures, strict=True)):
                ends = figure["mean_ci"]
                interval = f"[{show(ends[0])}, {show(ends[1])}]" if ends else ""
                cells = ("" if number else name, column, show(figure["mean"]), interval)
                table.add_row(*(Text(cell.replace("−", "-")) for cell in cells))
    return table
