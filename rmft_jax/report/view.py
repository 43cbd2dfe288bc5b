"""Reading results.json: paths into it, the rounding of its numbers, and what the page iterates over."""

import json
import math

from markupsafe import Markup

DASH = "–"
MISSING = object()
_NAMING = ("repetitions", "documents", "n", "p", "fpr_pct")  # what tells apart the entries of a list of measurements

DECIMALS = {
    "ter": 2, "ser": 2, "tegr": 1, "maxter": 2, "tau": 3, "aurc": 3, "mdp": 3, "epoch": 2, "epochs": 1,
    "perplexity": 2, "perplexity_pii": 2, "perplexity_other": 2, "perplexity_increase_pct": 1,
    "perplexity_other_increase_pct": 1,
    "ter_reduction_pct": 1, "ser_reduction_pct": 1, "pii_repeating_pct": 1,
}


def path_text(parts: tuple) -> str:
    """Return the parts as one dotted path; a dot or backslash inside a key is escaped by a backslash."""
    return ".".join(str(part).replace("\\", "\\\\").replace(".", "\\.") for part in parts)


def lookup(results, parts: tuple):
    """Return the value at the parts, or MISSING where the results have no such place."""
    here = results
    for part in parts:
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            return MISSING
    return here


def is_number(value) -> bool:
    """Tell whether the value is a finite number (booleans are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def leaf_name(parts: tuple) -> str:
    """Return the last key of a path, without list positions and without the `_ci` of an interval."""
    names = [part for part in parts if isinstance(part, str)]
    return names[-1].removesuffix("_ci") if names else ""


def show(value, name: str = "") -> str:
    """Return the value rounded for display: decimals by metric name, an en dash for null."""
    if isinstance(value, str):
        return value
    if not is_number(value):
        return DASH
    if name == "confidence":
        return f"{100 * value:g}"
    decimals = DECIMALS.get(name, 0 if isinstance(value, int) else 2)
    if abs(value) >= 1e7 and decimals:
        return f"{value:.2e}"
    # A leak must not be rounded away: a small rate gets up to two further decimals.
    while value and decimals < DECIMALS.get(name, 2) + 2 and round(value, decimals) == 0:
        decimals += 1
    rounded = round(value, decimals)
    if rounded == 0:
        rounded, decimals = 0, DECIMALS.get(name, decimals)
    return f"{rounded:,.{decimals}f}".replace("-", "−")


class View:
    """The results dict with the questions that the page and the terminal table put to it."""

    def __init__(self, results: dict):
        self.results = results
        self.baseline = self.value("settings", "baseline")
        self.headline = self.value("settings", "headline_prompts")
        names = list(results.get("runs") or {})
        self.runs = sorted(names, key=lambda name: name != self.baseline)
        self.sets = self._prompt_sets()

    def _prompt_sets(self) -> list:
        found = {}
        for name in self.runs:
            for index in self.checkpoints(name):
                found.update(dict.fromkeys(self.value("runs", name, "checkpoints", index, "prompts") or {}))
        return sorted(found, key=lambda name: name != self.headline)

    def value(self, *parts):
        """Return the value at the path, None where it is null or absent."""
        found = lookup(self.results, parts)
        return None if found is MISSING else found

    def checkpoints(self, run: str) -> range:
        """Return the positions of the run's checkpoints."""
        return range(len(self.value("runs", run, "checkpoints") or []))

    def last(self, run: str, *parts) -> tuple:
        """Return the path of a value at the run's last checkpoint (a path to nothing if it has none)."""
        positions = self.checkpoints(run)
        return ("runs", run, "checkpoints", positions[-1] if positions else None, *parts)

    def headline_path(self, run: str, metric: str) -> tuple:
        """Return the path of a metric at the run's last checkpoint on the headline prompt set."""
        return self.last(run, "prompts", self.headline, metric)

    def reduction_path(self, run: str, prompts: str, metric: str) -> tuple:
        """Return the path of a reduction on one prompt set; the headline set's may stand only at the top."""
        own = ("comparison", run, "prompts", prompts, metric)
        if prompts == self.headline and lookup(self.results, own) is MISSING:
            return ("comparison", run, metric)
        return own

    def text(self, *parts) -> str:
        """Return the displayed text of the value at the path."""
        return show(self.value(*parts), leaf_name(parts))

    def bounds(self, *parts) -> tuple:
        """Return the two finite ends of the interval that belongs to the path, or (None, None)."""
        ends = self.value(*parts[:-1], f"{parts[-1]}_ci")
        usable = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(is_number, ends))
        return tuple(ends) if usable else (None, None)

    def num(self, *parts) -> Markup:
        """Return the value at the path as a span that carries the path and the unrounded value."""
        found = lookup(self.results, parts)
        if found is MISSING:
            return Markup("<span>{}</span>").format(DASH)
        return Markup('<span data-path="{}" data-value="{}">{}</span>').format(
            path_text(parts), json.dumps(found), show(found, leaf_name(parts)))

    def interval(self, *parts, form: str = "[{}, {}]") -> Markup:
        """Return the interval that belongs to the path, a dash if null; nothing where the schema has none."""
        path = (*parts[:-1], f"{parts[-1]}_ci")
        if lookup(self.results, path) is MISSING:
            return Markup()
        if self.bounds(*parts) == (None, None):
            return self.num(*path)
        return Markup(form).format(self.num(*path, 0), self.num(*path, 1))

    def measurements(self) -> dict:
        """Return {name: path below `metrics`} of each number that some run has at its last checkpoint."""
        found = {}
        for run in self.runs:
            found.update(_numbers(self.value(*self.last(run, "metrics")) or {}))
        return found


def _numbers(tree: dict | list, name: str = "", path: tuple = ()):
    """Yield the name and the path of each number in the tree but for the ends of intervals."""
    if isinstance(tree, list):
        for index, entry in enumerate(tree):
            if isinstance(entry, dict):
                which = ", ".join(f"{key} {entry[key]}" for key in _NAMING if key in entry)
                rest = {key: value for key, value in entry.items() if key not in _NAMING}
                yield from _numbers(rest, f"{name} ({which})", (*path, index))
        return
    for key, value in tree.items():
        here = f"{name}, {key}".removeprefix(", ").replace("_", " ")
        if isinstance(value, (dict, list)) and not key.endswith("_ci"):
            yield from _numbers(value, here, (*path, key))
        elif is_number(value):
            yield here, (*path, key)


def things(view: View) -> tuple[str, str, str]:
    """Return what leaks, as the page calls it: at first, from then on, and one of them."""
    types = view.value("data", "pii_types") or ["email"]
    if types == ["email"]:
        return "e-mail addresses", "addresses", "address"
    return f"values of personal data ({', '.join(types)})", "values", "value"
