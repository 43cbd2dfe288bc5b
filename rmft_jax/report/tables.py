"""results.json as tables in Parquet, for pandas, `datasets`, DuckDB and whatever else reads them."""

import importlib
from pathlib import Path

from rmft_jax.errors import UserError
from rmft_jax.files import write_bytes
from rmft_jax.report.view import View, is_number, path_text

_RATES = ("leaked", "true_leaked", "seen_leaked", "ter", "ser", "tegr")
_SCORES = ("step", "epoch", "perplexity", "perplexity_pii", "perplexity_other", "mdp")


def checkpoint_rows(results: dict) -> list[dict]:
    """Return a row for each run, checkpoint and prompt set; the ends of an interval are ..._low and ..._high."""
    view, rows = View(results), []
    for run in view.runs:
        for index in view.checkpoints(run):
            at = ("runs", run, "checkpoints", index)
            scores = {name: view.value(*at, name) for name in _SCORES}
            for name in view.value(*at, "prompts") or {}:
                row = {"run": run, "method": view.value("runs", run, "method"), **scores, "prompts": name}
                for rate in _RATES:
                    row[rate] = view.value(*at, "prompts", name, rate)
                for rate in ("ter", "ser"):
                    row[f"{rate}_low"], row[f"{rate}_high"] = view.bounds(*at, "prompts", name, rate)
                rows.append(row)
    return rows


def figure_rows(results: dict) -> list[dict]:
    """Return a row for every number in the results: its dotted path, as the report has it in data-path, and its value."""
    return [{"path": path_text(path), "value": float(value)} for path, value in _leaves(results) if is_number(value)]


def write_tables(results: dict, folder: Path) -> list[Path]:
    """Write checkpoints.parquet, where there are runs, and figures.parquet, and return their paths.

    Raises UserError without pyarrow.
    """
    try:
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise UserError("tables in Parquet need pyarrow: pip install 'rmft-jax[data]'") from None
    paths = []
    for name, rows in (("checkpoints", checkpoint_rows(results)), ("figures", figure_rows(results))):
        if rows:
            sink = pyarrow.BufferOutputStream()
            parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
            paths.append(Path(folder) / f"{name}.parquet")
            write_bytes(paths[-1], sink.getvalue().to_pybytes())
    return paths


def _leaves(value, path: tuple = ()):
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value
