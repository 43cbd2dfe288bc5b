"""Names of persons, found by `presidio-analyzer` with a spaCy model of the user's; needs the extra [presidio]."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from pathlib import Path

from rmft_jax.config import PiiConfig
from rmft_jax.errors import UserError
from rmft_jax.pii.spans import PiiType
from rmft_jax.pii.words import names


def make(config: PiiConfig) -> PiiType:
    """Return the type. Raises UserError when presidio-analyzer or the model `pii.person_model` is not installed."""
    engine = _engine(config.person_model)

    def scan(text: str) -> Iterator[tuple[int, int]]:
        for found in engine.analyze(text, language="en", entities=["PERSON"]):
            yield found.start, found.end

    return PiiType(
        name="person",
        split=_split,
        surrogates=lambda kind: string.ascii_uppercase if kind == "initial" else names(),
        recombines=("name",),
        normalise=lambda name: " ".join(name.lower().split()),
        scan=scan,
    )


def _split(name: str) -> Iterator[tuple[int, int, str]]:
    for run in re.finditer(r"[^\W\d_]+|[\W\d_]+", name):
        yield *run.span(), "" if not run[0][0].isalpha() else "initial" if len(run[0]) == 1 else "name"


def _engine(model: str):
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NlpEngineProvider
    except ImportError:
        raise UserError(
            "pii.types has person, but presidio-analyzer is not installed: pip install 'rmft-jax[presidio]', or leave it out"
        ) from None
    if not spacy.util.is_package(model) and not Path(model).exists():  # else presidio would download it
        raise UserError(
            f"pii.person_model {model} is not installed: run `python -m spacy download {model}`, or name another one"
        )
    models = [{"lang_code": "en", "model_name": model}]
    provider = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models})
    return AnalyzerEngine(nlp_engine=provider.create_engine(), supported_languages=["en"])
