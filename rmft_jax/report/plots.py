"""Charts as inline SVG: lines with confidence bands, or one point with its intervals per run; a tooltip on every point."""

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup

from rmft_jax.report.view import View, is_number, path_text, show, things

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 448, 14, 234
COLOURS = 7


@dataclass(frozen=True)
class Point:
    """One place on a line; y is None where the value is null. x_name: what stands at `x_path`, if x is only its place."""

    x: float
    y: float | None
    low: float | None
    high: float | None
    path: tuple
    x_path: tuple
    title: str
    x_name: str | float | None = None


@dataclass(frozen=True)
class Line:
    """One run's line; `slot` chooses its colour and dash."""

    name: str
    slot: int
    points: list


@dataclass(frozen=True)
class Chart:
    """One figure of the page: its heading, its note, the drawing, slot and name of its lines, id of its definition."""

    key: str
    heading: str
    note: str
    svg: Markup
    names: tuple = ()
    definition: str = ""


@dataclass(frozen=True)
class Axis:
    """A mapping from values to pixels, linear or logarithmic."""

    start: float
    stop: float
    pixel_start: float
    pixel_stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        warp = math.log if self.log else float
        share = (warp(value) - warp(self.start)) / (warp(self.stop) - warp(self.start))
        return self.pixel_start + share * (self.pixel_stop - self.pixel_start)


def style_classes(slot: int) -> str:
    """Return the CSS classes of a run: colours repeat after COLOURS runs, each time with another dash."""
    return f"c{slot % COLOURS} d{(slot + 2 * (slot // COLOURS)) % 4}"


def nice_step(span: float, wanted: int = 5) -> float:
    """Return the 1-2-5 step that cuts the span into about the wanted number of parts."""
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def linear_ticks(low: float, high: float) -> list:
    """Return round tick values that enclose the range."""
    if high <= low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    step = nice_step(high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list:
    """Return ticks of the 1-2-5 kind that enclose a positive range, whole powers of ten if it is long."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) < 5 else (1,)
    every = [factor * 10.0**power for power in powers for factor in factors]
    first = max(index for index, tick in enumerate(every) if tick <= low)
    last = min((index for index, tick in enumerate(every) if tick >= high), default=len(every) - 1)
    return every[first:max(last, first + 1) + 1]


def tick_text(tick: float, ticks: list) -> str:
    """Return the tick's label with just the decimals that its neighbours need."""
    if max(map(abs, ticks)) >= 1e5:
        power, letter = next((p, letter) for p, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (0, "")) if abs(tick) >= p)
        return f"{tick / (power or 1):.3g}{letter}".replace("-", "−")
    gap = min(b - a for a, b in pairwise(ticks))
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return f"{tick:,.{decimals}f}".replace("-", "−")


def y_ticks(lines: list, from_zero: bool) -> tuple:
    """Return the y ticks and whether the axis is logarithmic."""
    values = [point.y for line in lines for point in line.points if point.y is not None]
    ends = [point.high for line in lines for point in line.points if None not in (point.y, point.high)]
    if not values:
        return linear_ticks(0, 1), False
    if not from_zero and min(values) > 0 and max(values) / min(values) > 8:
        return log_ticks(min(values), max(values)), True
    # The first checkpoints' wide intervals may leave the frame rather than flatten every line.
    top = max([*values, min(max(ends, default=0), 3 * max(values) or math.inf)])
    return linear_ticks(min(0, min(values)) if from_zero else min(values), top), False


def stretches(points: list, usable) -> list:
    """Return the runs of consecutive usable points, so that a null breaks a line."""
    found: list = []
    current: list = []
    for point in points:
        if usable(point):
            current.append(point)
        elif current:
            found, current = [*found, current], []
    return [*found, current] if current else found


def _line_path(points: list, x: Axis, y: Axis, step: bool) -> str:
    drawn = f"M{x(points[0].x):.2f} {y(points[0].y):.2f}"
    for point in points[1:]:
        place = f"H{x(point.x):.2f}V{y(point.y):.2f}" if step else f"L{x(point.x):.2f} {y(point.y):.2f}"
        drawn += place
    return drawn


def _band_path(points: list, x: Axis, y: Axis) -> str:
    upper = [(point.x, point.high) for point in points]
    lower = [(point.x, point.low) for point in reversed(points)]
    inside = [(place, min(max(value, y.start), y.stop)) for place, value in upper + lower]
    return "M" + "L".join(f"{x(place):.2f} {y(value):.2f}" for place, value in inside) + "Z"


def _draw_point(point: Point, x: Axis, y: Axis, kind: str) -> Markup:
    """Draw a point whose y is a number."""
    height = y(point.y if point.y is not None else y.start)
    return Markup(
        '<circle class="{}" cx="{:.2f}" cy="{:.2f}" r="3" data-path="{}" data-value="{}" data-x-path="{}" '
        'data-x-value="{}"><title>{}</title></circle>').format(
            kind, x(point.x), height, path_text(point.path), json.dumps(point.y),
            path_text(point.x_path), json.dumps(point.x if point.x_name is None else point.x_name), point.title)


def _begin_run(slot: int) -> Markup:
    return Markup('<g class="run {}" data-slot="{}">').format(style_classes(slot), slot)


def _draw_line(line: Line, x: Axis, y: Axis, step: bool) -> Markup:
    kind = "point dense" if len(line.points) > 40 else "point"
    parts = [_begin_run(line.slot)]
    if step:  # the area that AURC measures
        for stretch in stretches(line.points, lambda point: point.y is not None):
            area = f"{_line_path(stretch, x, y, step)}V{BOTTOM}H{x(stretch[0].x):.2f}Z"
            parts.append(Markup('<path class="area" d="{}"/>').format(area))
    for stretch in stretches(line.points, lambda point: None not in (point.y, point.low, point.high)):
        parts.append(Markup('<path class="band" d="{}"/>').format(_band_path(stretch, x, y)))
    for stretch in stretches(line.points, lambda point: point.y is not None):
        parts.append(Markup('<path class="line" d="{}"/>').format(_line_path(stretch, x, y, step)))
    parts += [_draw_point(point, x, y, kind) for point in line.points if point.y is not None]
    return Markup("\n").join(parts) + Markup("</g>")


def _draw_axes(x: Axis, x_at: list, y: Axis, y_at: list, x_label: str, names: list | None = None) -> Markup:
    rule = Markup('<line class="{}" x1="{:.2f}" x2="{:.2f}" y1="{:.2f}" y2="{:.2f}"/>')
    label = Markup('<text class="{}" x="{:.2f}" y="{:.2f}">{}</text>')
    parts = []
    for tick in y_at:
        parts.append(rule.format("grid", LEFT, RIGHT, y(tick), y(tick)))
        parts.append(label.format("ytick", LEFT - 8, y(tick) + 4, tick_text(tick, y_at)))
    for tick, name in zip(x_at, names or [tick_text(tick, x_at) for tick in x_at], strict=True):
        parts.append(rule.format("axis", x(tick), x(tick), BOTTOM, BOTTOM + 4))
        parts.append(label.format("xtick", x(tick), BOTTOM + 19, name))
    parts.append(rule.format("axis", LEFT, RIGHT, BOTTOM, BOTTOM))
    parts.append(label.format("xlabel", (LEFT + RIGHT) / 2, HEIGHT - 6, x_label))
    return Markup("\n").join(parts)


def line_chart(
        lines: list, label: str, x_label: str, from_zero: bool = True, stepped: bool = False,
        names: list | None = None, log_x: bool = False, fits: list | None = None) -> Markup:
    """Return the lines as an inline SVG chart.

    label: what a screen reader says. from_zero: the y axis starts at zero. stepped: steps over an x axis
    that starts where the values do, not at zero. names: of the places 0, 1, ... of the x axis, in place of numbers.
    log_x: the x axis, of positive values, is logarithmic. fits: (slot, scale, slope) of power laws y = scale x^slope, drawn
    thin beside the line of the slot, as far as its points reach.
    """
    x_values = [point.x for line in lines for point in line.points] or [0, 1]
    x_at = linear_ticks(min(x_values) if stepped else min(0, min(x_values)), max(x_values))
    if names:
        x_at = list(range(len(names)))
    if log_x:
        x_at = log_ticks(min(x_values), max(x_values))
    y_at, log = y_ticks(lines, from_zero)
    x, y = Axis(x_at[0], x_at[-1], LEFT, RIGHT, log_x), Axis(y_at[0], y_at[-1], BOTTOM, TOP, log)
    if log:
        x_label += " (y: log scale)"
    parts = [_draw_axes(x, x_at, y, y_at, x_label, names)]
    parts += [_draw_fit(line, tuple(law), x, y) for slot, *law in fits or [] for line in lines if line.slot == slot]
    parts += [_draw_line(line, x, y, stepped) for line in reversed(lines)]
    if all(point.y is None for line in lines for point in line.points):
        parts.append(Markup('<text class="xlabel" x="{}" y="{}">no values</text>').format(
            (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">\n{}\n</svg>').format(
        WIDTH, HEIGHT, label, Markup("\n").join(parts))


def _draw_fit(line: Line, law: tuple, x: Axis, y: Axis) -> Markup:
    """Draw the power law (scale, slope) along the points of a line."""
    scale, slope = law
    begin, end = min(point.x for point in line.points), max(point.x for point in line.points)
    places = [begin * (end / begin) ** (step / 24) for step in range(25)]
    inside = [(place, scale * place**slope) for place in places if y.start <= scale * place**slope <= y.stop]
    drawn = "L".join(f"{x(place):.2f} {y(value):.2f}" for place, value in inside)
    return Markup('<path class="fit {}" d="M{}"/>').format(style_classes(line.slot), drawn) if inside else Markup()


def _draw_mark(
        view: View, run: str, slot: int, x_path: tuple, y_path: tuple, x: Axis, y: Axis, taken: list) -> Markup:
    """Draw one run's point, the cross of its intervals, and its name, above the names already there.

    taken: left and right end and height of each name drawn so far; this one's is added.
    """
    at, up = x(view.value(*x_path)), y(view.value(*y_path))
    cross = Markup('<line class="cross" x1="{:.2f}" x2="{:.2f}" y1="{:.2f}" y2="{:.2f}"/>')
    parts = [_begin_run(slot)]
    clip = lambda value, axis: axis(min(max(value, axis.start), axis.stop))  # noqa: E731
    if view.bounds(*x_path) != (None, None):
        parts.append(cross.format(*(clip(end, x) for end in view.bounds(*x_path)), up, up))
    if view.bounds(*y_path) != (None, None):
        parts.append(cross.format(at, at, *(clip(end, y) for end in view.bounds(*y_path))))
    title = f"{_tooltip(view, y_path, run, ' %')}, {_tooltip(view, x_path, 'perplexity', ' %')}"
    point = Point(view.value(*x_path), view.value(*y_path), None, None, y_path, x_path, title)
    parts.append(_draw_point(point, x, y, "point"))
    anchor = "end" if at > (LEFT + RIGHT) / 2 else "start"
    start, width, height = at + (-7 if anchor == "end" else 7), 7 * len(run), up - 7
    left = start - width if anchor == "end" else start
    while any(left < end and begin < left + width and abs(height - other) < 13 for begin, end, other in taken):
        height -= 3
    taken.append((left, left + width, height))
    parts.append(Markup('<text class="mark" text-anchor="{}" x="{:.2f}" y="{:.2f}">{}</text>').format(
        anchor, start, height, run))
    return Markup("\n").join(parts) + Markup("</g>")


def pareto_chart(view: View, label: str) -> Markup:
    """Return leak over cost as an inline SVG chart: mean TER against the increase of perplexity, a point per run."""
    paths = {run: (("comparison", run, "perplexity_increase_pct"), ("runs", run, "mean", view.headline, "ter"))
             for run in view.runs}
    usable = [run for run in view.runs if all(is_number(view.value(*path)) for path in paths[run])]
    x_values = [view.value(*paths[run][0]) for run in usable] or [0, 1]
    y_values = [view.value(*paths[run][1]) for run in usable] or [0, 1]
    x_at, y_at = linear_ticks(min(0, *x_values), max(0, *x_values)), linear_ticks(0, max(y_values))
    x, y = Axis(x_at[0], x_at[-1], LEFT, RIGHT), Axis(y_at[0], y_at[-1], BOTTOM, TOP)
    parts = [_draw_axes(x, x_at, y, y_at, "increase of perplexity, %")]
    front = [run for run in usable if not any(_beats(view, paths[other], paths[run]) for other in usable)]
    corners = sorted((view.value(*paths[run][0]), view.value(*paths[run][1])) for run in front)
    if len(corners) > 1:
        drawn = f"M{x(corners[0][0]):.2f} {y(corners[0][1]):.2f}"
        drawn += "".join(f"H{x(place):.2f}V{y(value):.2f}" for place, value in corners[1:])
        parts.append(Markup('<path class="front" d="{}"/>').format(drawn))
    taken: list = []
    parts += [_draw_mark(view, run, view.runs.index(run), *paths[run], x, y, taken) for run in usable]
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">\n{}\n</svg>').format(
        WIDTH, HEIGHT, label, Markup("\n").join(parts))


def _beats(view: View, first: tuple, second: tuple) -> bool:
    """Tell whether the first run both costs and leaks no more than the second, and one of them less."""
    pairs = [(view.value(*a), view.value(*b)) for a, b in zip(first, second, strict=True)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _finite(value):
    return value if is_number(value) else None


def _tooltip(view: View, path: tuple, before: str, unit: str) -> str:
    low, high = view.bounds(*path)
    interval = "" if low is None else f" [{show(low, path[-1])}, {show(high, path[-1])}]"
    return f"{before}: {view.text(*path)}{interval}{unit}"


def _training_lines(view: View, *inner: str, unit: str = "") -> list:
    """Return one line per run over epochs, of the value at `inner` inside each checkpoint."""
    lines = []
    for slot, run in enumerate(view.runs):
        points = []
        for index in view.checkpoints(run):
            at = ("runs", run, "checkpoints", index)
            path, x_path = (*at, *inner), (*at, "epoch")
            if not is_number(view.value(*x_path)):
                continue
            title = _tooltip(view, path, f"{run}, epoch {view.text(*x_path)}", unit)
            x, y = view.value(*x_path), _finite(view.value(*path))
            low, high = view.bounds(*path)
            points.append(Point(x, y, low, high, path, x_path, title))
        lines.append(Line(run, slot, points))
    return lines


def _maxter_lines(view: View) -> list:
    lines = []
    for slot, run in enumerate(view.runs):
        points, at = [], ("comparison", run, "maxter")
        for index, tau in enumerate(view.value(*at, "tau") or []):
            path, x_path = (*at, "maxter", index), (*at, "tau", index)
            if is_number(tau):
                title = f"{run}, τ {view.text(*x_path)}: {view.text(*path)} %"
                points.append(Point(tau, _finite(view.value(*path)), None, None, path, x_path, title))
        lines.append(Line(run, slot, points))
    return lines


def _memorization_lines(view: View) -> list:
    """Return a line for each run that was followed while it was trained: M of all tokens over epochs."""
    lines = []
    for slot, run in enumerate(view.runs):
        points, at = [], ("runs", run, "memorization")
        for index, epoch in enumerate(view.value(*at, "epoch") or []):
            path, x_path = (*at, "m", "all", index), (*at, "epoch", index)
            title = f"{run}, epoch {show(epoch)}: {view.text(*path)}"
            points.append(Point(epoch, _finite(view.value(*path)), None, None, path, x_path, title))
        lines.append(Line(run, slot, points))
    return lines


def _category_lines(view: View, at: tuple, name: str, metric: str, unit: str) -> tuple[list, list]:
    """Return the names of the entries of the list at `at`, below the last metrics, and a line per run over them.

    name: the key of an entry that names it. metric: the key of the value. A list of one entry gives no lines.
    """
    lists = {run: view.value(*view.last(run, "metrics", *at)) or [] for run in view.runs}
    names = [entry[name] for entry in max(lists.values(), key=len, default=[])]
    lines = []
    for slot, run in enumerate(view.runs):
        points = []
        for index, entry in enumerate(lists[run]):
            path, x_path = (view.last(run, "metrics", *at, index, key) for key in (metric, name))
            title = _tooltip(view, path, f"{run}, {entry[name]}", unit)
            low, high = view.bounds(*path)
            points.append(Point(index, _finite(view.value(*path)), low, high, path, x_path, title, entry[name]))
        lines.append(Line(run, slot, points))
    return (names, lines) if len(names) > 1 else ([], [])


def _aria(view: View, subject: str) -> str:
    return f"Line chart of {subject}, one line per run: {', '.join(view.runs)}. The tables hold the values."


def charts(view: View) -> list:
    """Return the page's charts in order."""
    found, what = [], things(view)[1]
    for key, heading, note in (("ter", "TER, %", f"share of all training {what}"),
                               ("ser", "SER, %", f"share of the {what} shown so far"),
                               ("tegr", "TEGR, %", f"share of generated {what} that are real")):
        lines = _training_lines(view, "prompts", view.headline, key, unit=" %")
        said = _aria(view, f"{heading} over epochs")
        found.append(Chart(key, heading, note, line_chart(lines, said, "epoch")))
    lines, said = _training_lines(view, "perplexity"), _aria(view, "perplexity over epochs")
    found.append(Chart("perplexity", "Perplexity", "held-out text, lower is better",
                       line_chart(lines, said, "epoch", from_zero=False)))
    lines, said = _maxter_lines(view), _aria(view, "MaxTER over tau")
    found.append(Chart("maxter", "MaxTER(τ), %", "worst leak within a perplexity budget τ",
                       line_chart(lines, said, "τ, largest allowed MDP", stepped=True)))
    if any(is_number(view.value("runs", run, "mean", view.headline, "ter")) for run in view.runs):
        said = f"Mean TER against the increase of perplexity, one point per run: {', '.join(view.runs)}."
        found.append(Chart("pareto", "Leak against cost", "mean TER, %, lower left is better", pareto_chart(view, said)))
    names, lines = _category_lines(view, ("k_eidetic", "buckets"), "documents", "rate_pct", " %")
    if names:
        said = _aria(view, "extracted share over number of documents")
        found.append(Chart("occurrences", "Extracted, %", "of the values that stand in so many documents, last checkpoint",
                           line_chart(lines, said, "documents that hold the value", names=names)))
    names, lines = _category_lines(view, ("exposure", "repetitions"), "repetitions", "by_rank", " bits")
    if names:
        said, chance = _aria(view, "exposure over repetitions"), show(view.value(*view.last(view.runs[0], "metrics",
                                                                                          "exposure", "chance")))
        found.append(Chart("exposure", "Exposure, bits", f"of planted canaries, {chance} by chance, last checkpoint",
                           line_chart(lines, said, "repetitions of the canary", names=names)))
    lines = _memorization_lines(view)
    if any(line.points for line in lines):
        said = _aria(view, "memorized share of the training tokens over epochs")
        found.append(Chart("memorized", "Memorized, M", "share of the training tokens, counted while training",
                           line_chart(lines, said, "epoch")))
    return [replace(chart, names=tuple(enumerate(view.runs)), definition=chart.key) for chart in found]
