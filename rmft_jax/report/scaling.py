"""The results of `rmft study scaling`: charts for the page, and the summary for the terminal."""

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from rmft_jax.report.plots import Chart, Line, Point, line_chart
from rmft_jax.report.view import View, is_number, show

# What the key of a chart begins with -> the id of its definition on the page.
_DEFINITIONS = {
    "times": "times", "unit_mean": "unit", "heldout_nll": "heldout", "overfitting": "overfitting", "special": "forgetting",
    "baseline": "forgetting", "training_spans_whole": "pii", "training_m_pii": "pii", "": "m",
}  # fmt: skip


def _curve(view: View, name: str, slot: int, at: tuple) -> Line:
    """Return the line of one curve of the findings; its band is the range of the seeds."""
    points = []
    for index, x in enumerate(view.value(*at, "x") or []):
        y, low, high = (view.value(*at, key, index) for key in ("mean", "low", "high"))
        title = f"{name}, {show(x)}: {show(y)}"
        points.append(Point(x, y if is_number(y) else None, low, high, (*at, "mean", index), (*at, "x", index), title))
    return Line(name, slot, points)


def _over_sizes(view: View, name: str, slot: int, arm: tuple, inner: tuple) -> Line:
    """Return the line of a figure over parameters, a point for each size that has it."""
    points = []
    for size in view.value(*arm, "sizes") or {}:
        path, x_path = (*arm, "sizes", size, *inner, "mean"), (*arm, "sizes", size, "parameters")
        if is_number(view.value(*path)):
            x, y = view.value(*x_path), view.value(*path)
            low, high = view.bounds(*path)
            points.append(Point(x, y, low, high, path, x_path, f"{name}, {size}: {show(y)}"))
    return Line(name, slot, points)


def _chart(key: str, heading: str, note: str, lines: list, x_label: str, **more) -> Chart:
    lines = [line for line in lines if line.points]
    if not lines:
        return Chart(key, heading, note, Markup())
    said = f"Line chart of {heading}, one line each: {', '.join(line.name for line in lines)}."
    names = tuple((line.slot, line.name) for line in lines)
    definition = next(name for start, name in _DEFINITIONS.items() if key.startswith(start))
    return Chart(key, heading, note, line_chart(lines, said, x_label, **more), names, definition)


def scaling_charts(view: View) -> list[Chart]:
    """Return the page's charts in order; those without lines are left out."""
    found = []
    main = ("findings", "memorization", "plain")
    if view.value(*main):
        sizes = list(view.value(*main, "sizes"))
        taus = list(view.value(*main, "sizes", sizes[0], "times"))
        lines = [_over_sizes(view, f"τ = {tau}", n, main, ("times", tau, "between")) for n, tau in enumerate(taus)]
        laws = [[view.value(*main, "power_laws", tau, "fit", key) for key in ("scale", "slope")] for tau in taus]
        fits = [(n, scale, slope) for n, (scale, slope) in enumerate(laws) if is_number(scale) and is_number(slope)]
        found.append(_chart("times", "T(N, τ)", "times each token is seen until M ≥ τ; thin: power laws", lines,
                            "parameters N (log scale)", from_zero=False, log_x=True, fits=fits))
        for key, heading, note in (("m", "M", "share of the training tokens memorized"),
                                   ("unit_mean", "Memory unit", "mean run of memorized tokens"),
                                   ("heldout_nll", "Held-out loss", "nats a token")):
            lines = [_curve(view, size, n, (*main, "sizes", size, "curves", key)) for n, size in enumerate(sizes)]
            found.append(_chart(key, heading, note, lines, "epoch", from_zero=key == "m"))
        line = _over_sizes(view, "M", 0, main, ("before_overfitting",))
        found.append(_chart("overfitting", "M before overfitting", "in the first epoch whose held-out loss rises", [line],
                            "parameters N (log scale)", log_x=True))
        largest = (*main, "sizes", sizes[-1], "curves")
        slices = [key for key in view.value(*largest) if key.startswith("m_")]
        lines = [_curve(view, key.removeprefix("m_").replace("_", " "), n, (*largest, key)) for n, key in enumerate(slices)]
        found.append(_chart("slices", f"M by kind of token, {sizes[-1]}", "", lines, "epoch"))
    forgetting = view.value("findings", "forgetting") or {}
    if forgetting:
        sizes = list(view.value("findings", "forgetting", next(iter(forgetting)), "sizes"))
        for size in sizes:
            lines = [_curve(view, arm, n, ("findings", "forgetting", arm, "sizes", size, "curves", "special_m"))
                     for n, arm in enumerate(forgetting)]
            found.append(_chart(f"special-{size}", f"M of the special batch, {size}", "shown as often as the line says",
                                lines, "round: an epoch, or a pass of the special batch"))
        lines = [_over_sizes(view, arm, n, ("findings", "forgetting", arm), ("forgetting", "baseline"))
                 for n, arm in enumerate(forgetting)]
        found.append(_chart("baseline", "Forgetting baseline", "lowest M of the special batch after it was shown", lines,
                            "parameters N (log scale)", log_x=True, from_zero=False))
    pii = view.value("findings", "pii") or {}
    sizes = list(dict.fromkeys(size for arm in pii for size in view.value("findings", "pii", arm, "sizes")))
    for key, heading in (("training_spans_whole", "PII values memorized whole"), ("training_m_pii", "M of PII tokens")):
        for size in sizes:
            lines = [_curve(view, arm, n, ("findings", "pii", arm, "sizes", size, "curves", key))
                     for n, arm in enumerate(pii)]
            found.append(_chart(f"{key}-{size}", f"{heading}, {size}", "of the training text as it stands", lines, "epoch"))
    for name in view.value("findings") or {}:
        if name in ("memorization", "forgetting", "pii"):
            continue
        own = view.value("findings", name)
        for size in dict.fromkeys(size for arm in own for size in view.value("findings", name, arm, "sizes")):
            plain = [("plain", main)] if view.value(*main, "sizes", size) else []
            named = plain + [(arm, ("findings", name, arm)) for arm in own]
            lines = [_curve(view, arm, n, (*at, "sizes", size, "curves", "m")) for n, (arm, at) in enumerate(named)]
            longest = max(len(view.value("findings", name, arm, "sizes", size, "curves", "m", "x")) for arm in own)
            lines = [Line(line.name, line.slot, line.points[:longest]) for line in lines]
            found.append(_chart(f"{name}-{size}", f"M, {name.replace('_', ' ')}, {size}", "", lines, "epoch"))
    return [chart for chart in found if chart.names]


def scaling_table(results: dict) -> Table:
    """Return T(N, tau) and what goes with it, one row for each size of the experiment `memorization`."""
    view, main = View(results), ("findings", "memorization", "plain", "sizes")
    caption = Text(f"Means over {view.text('study', 'seeds')} seeds, with 95 % intervals; "
                   f"{view.text('study', 'parts')} of {view.text('study', 'planned_parts')} parts are done.")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption=caption,
                  caption_justify="left", caption_style="")
    columns: list[tuple[str, tuple]] = [(f"T({tau:g})", ("times", f"{tau:g}", "between")) for tau in results["taus"]]
    columns += [("M before\noverfitting", ("before_overfitting",)), ("best held-\nout loss", ("heldout_nll_best",))]
    for heading, justify in (("size", "left"), ("parameters", "right"), *((name, "right") for name, _ in columns)):
        table.add_column(heading, justify="left" if justify == "left" else "right", no_wrap=True)
    for size in view.value(*main) or {}:
        cells = []
        for _, inner in columns:
            path = (*main, size, *inner, "mean")
            low, high = view.bounds(*path)
            cells.append(view.text(*path) + (f"\n{show(low)}\n{show(high)}" if low is not None else ""))
        table.add_row(f"{size}\n  low\n  high", view.text(*main, size, "parameters"), *(c.replace("−", "-") for c in cells))
    return table
