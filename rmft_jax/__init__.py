"""Train language models on text full of personal data without memorizing it, and measure what they memorized.

What stands in `__all__` is the public interface, with `rmft_jax.kernels`; everything else may change without notice.
Importing this costs nothing: a name brings its module, and JAX with it, when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmft_jax.bench import run_bench
    from rmft_jax.config import Config, load_config, to_yaml, with_changes
    from rmft_jax.convert import convert_export, convert_import
    from rmft_jax.data.dedup_report import dedup
    from rmft_jax.data.prepare import load_prepared, prepare
    from rmft_jax.data.sources import read_documents
    from rmft_jax.errors import UserError
    from rmft_jax.memorization.compare import compare
    from rmft_jax.memorization.deja_vu import audit_vlm
    from rmft_jax.memorization.extraction import audit
    from rmft_jax.memorization.tracker import track
    from rmft_jax.pii.detector import detect
    from rmft_jax.report.html import write_report
    from rmft_jax.studies import run_study
    from rmft_jax.training.loop import train
    from rmft_jax.training.plan import plan

__version__ = "0.1.0"

_PLACES = {
    "Config": "config", "UserError": "errors", "audit": "memorization.extraction",
    "audit_vlm": "memorization.deja_vu", "compare": "memorization.compare", "convert_export": "convert",
    "convert_import": "convert", "dedup": "data.dedup_report", "detect": "pii.detector",
    "load_config": "config", "load_prepared": "data.prepare", "plan": "training.plan", "prepare": "data.prepare",
    "read_documents": "data.sources", "run_bench": "bench", "run_study": "studies", "to_yaml": "config",
    "track": "memorization.tracker", "train": "training.loop", "with_changes": "config", "write_report": "report.html",
}  # fmt: skip
__all__ = [
    "Config", "UserError", "audit", "audit_vlm", "compare", "convert_export", "convert_import", "dedup", "detect",
    "load_config", "load_prepared", "plan", "prepare", "read_documents", "run_bench", "run_study", "to_yaml", "track",
    "train", "with_changes", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
