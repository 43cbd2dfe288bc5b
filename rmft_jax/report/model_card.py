"""A section for a model card, in Markdown: what the model memorized, how that was measured, and what it does not say."""

from pathlib import Path

from rmft_jax.errors import UserError
from rmft_jax.files import write_text
from rmft_jax.report.html import SUMMARY, summary_path, template
from rmft_jax.report.verdict import verdict
from rmft_jax.report.view import View

_COLUMNS = ("ter", "ser", "tegr", "perplexity", "perplexity_increase_pct")


def model_card(results: dict) -> str:
    """Return the section for the runs of results.json. Raises UserError where there are none, as in most studies."""
    view = View(results)
    if not view.runs:
        raise UserError("the results hold no runs, so there is nothing for a model card: name results of `rmft compare`")
    columns = [column for column in SUMMARY if column.metric in _COLUMNS]
    sets = view.value("settings", "prompts") or {}
    named = ", ".join(f"{count:,.0f} {name}" for name, count in sets.items() if name != view.headline)
    return template("model_card.md").render(
        verdict=" ".join(_plain(verdict(view)).split()),
        rows=[[_escaped(run), *(_cell(view, summary_path(view, run, column)) for column in columns)] for run in view.runs],
        known=view.text("data", "pii_identities"), baseline=_escaped(view.baseline or "the baseline"),
        headline=view.headline, confidence=view.text("settings", "confidence"), source=_escaped(view.text("data", "source")),
        documents=view.text("data", "documents"), tokens=view.text("data", "tokens"),
        types=", ".join(view.value("data", "pii_types") or ["email"]), occurrences=view.text("data", "pii_occurrences"),
        heldout=view.text("data", "heldout_documents"), content_hash=view.text("data", "content_hash"),
        mixed=[_mixed(view, run) for run in view.runs if view.value("runs", run, "mix")],
        prompts=f"{named} prompts" if named else "prompts", new_tokens=view.text("settings", "new_tokens"),
        command=view.text("command"), version=view.text("version"))  # fmt: skip


def write_model_card(results: dict, path: Path) -> Path:
    """Write the section and return its path."""
    write_text(path, model_card(results))
    return path


def _plain(markup) -> str:
    """Return a verdict as Markdown: bold names, no other tags, and what Markdown would take for its own escaped."""
    text = str(markup).replace("\u00a0", " ")
    for tag in ("strong", 'strong class="line"'):
        text = text.replace(f"<{tag}>", "\0")
    return _escaped(type(markup)(text.replace("</strong>", "\0")).striptags()).replace("\0", "**")


def _mixed(view: View, run: str) -> str:
    parts = [
        f"{100 * part['weight']:g} % of its sequences from {_escaped(part['source'])}, content hash `{part['content_hash']}`"
        for part in view.value("runs", run, "mix")
    ]
    return f"{_escaped(run)} was also trained on other text, of which nothing was attacked: {', '.join(parts)}."


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "\\`*_[]<>|" else character for character in text)


def _cell(view: View, path: tuple) -> str:
    low, high = (view.text(*path[:-1], f"{path[-1]}_ci", end) for end in (0, 1))
    figure = view.text(*path)
    return f"{figure} [{low}, {high}]" if view.bounds(*path) != (None, None) else figure
