"""`rmft bench detect`: how fast personal data is found, cut and numbered, against presidio-analyzer."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from rmft_jax.bench import environment
from rmft_jax.config import PII_TYPES, Config, PiiConfig
from rmft_jax.data.sources import read_documents
from rmft_jax.data.tagging import Identities
from rmft_jax.errors import UserError
from rmft_jax.pii.detector import Detector
from rmft_jax.pii.windows import default_engine
from rmft_jax.progress import track

_SAMPLE = 60_000  # bytes that the peer reads in each round


def run(config: Config, peer: str = "", *, rounds: int = 5) -> dict:
    """Time detection and tagging on the training documents of the source: all built-in types but person, one core.

    Tagging is what `prepare` does with spans before it tokenises: their components, kinds, identities and ranks. Each round
    reads all documents with a new Detector, which remembers nothing; then ours and presidio-analyzer, with its default
    recognisers, read the same sample of documents, another one each round. The model of presidio's own default, spaCy's
    en_core_web_lg, cannot be had from package registries: where it is not installed, an untrained pipeline of the layers of
    the smaller en_core_web_sm stands for it, which computes as much as a trained one. Patterns without any pipeline
    are timed, too. Times are CPU seconds of the process.

    Returns name, device, versions, engine, unit, value (median over rounds, the whole corpus), peer_value (median), ratio
    (median over rounds of ours / peer on the same sample), patterns_value and patterns_ratio (the peer without a pipeline),
    and runs: (ours on the corpus, ours, the peer and its patterns on the sample) in MB/s.

    Raises UserError for an unknown peer, or when presidio-analyzer is not installed.
    """
    if peer not in ("", "presidio"):
        raise UserError(f"bench detect knows no peer {peer!r}: leave it out, or name presidio")
    model, rivals = _presidio()
    texts = read_documents(config.source).train
    pii = dataclasses.replace(config.pii, types=tuple(name for name in PII_TYPES if name != "person"))
    runs, place, spans = [], 0, 0
    for _ in track(range(rounds), "bench detect", rounds):
        begin, size = place, 0
        while size < _SAMPLE:
            size += len(texts[place % len(texts)].encode("utf-8", "surrogatepass"))
            place += 1
        sample = [texts[number % len(texts)] for number in range(begin, place)]
        whole, spans = _speed(pii, texts)
        theirs = [_megabytes(sample) / _seconds(lambda rival=rival, sample=sample: rival(sample)) for rival in rivals]
        runs.append([whole, _speed(pii, sample)[0], *theirs])
    whole, _, theirs, patterns = (statistics.median(column) for column in zip(*runs, strict=True))
    return {
        "name": "detect",
        **environment("presidio-analyzer", "phonenumbers"),
        "engine": default_engine(),
        "unit": "MB/s",
        "shape": {"documents": len(texts), "megabytes": _megabytes(texts), "spans": spans, "types": len(pii.names)},
        "value": whole,
        "peer": f"presidio-analyzer, default recognisers, {model}, samples of the same documents",
        "peer_value": theirs,
        "ratio": statistics.median(run[1] / run[2] for run in runs),
        "patterns_value": patterns,
        "patterns_ratio": statistics.median(run[1] / run[3] for run in runs),
        "runs": runs,
    }


def _speed(pii: PiiConfig, texts: Sequence[str]) -> tuple[float, int]:
    """Return MB/s and the number of spans."""
    detector = Detector(pii)
    detector.detect("")
    identities = Identities.empty()

    def work() -> None:
        for text, spans in zip(texts, detector.detect_many(texts), strict=True):
            identities.add(spans)
            for span in spans:
                detector.components(text, span)

    return _megabytes(texts) / _seconds(work), identities.occurrences


def _presidio() -> tuple[str, list[Callable[[Sequence[str]], None]]]:
    """Return which model presidio-analyzer works with, and it as a function of texts, with the model and without."""
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError:
        raise UserError("bench detect needs presidio-analyzer: pip install 'rmft-jax[presidio]'") from None

    def rival(nlp) -> Callable[[Sequence[str]], None]:
        wrapped = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "bench"}])
        wrapped.nlp = {"en": nlp}
        engine = AnalyzerEngine(nlp_engine=wrapped, supported_languages=["en"])
        engine.analyze("warm up", language="en")

        def analyze(texts: Sequence[str]) -> None:
            for text in texts:
                engine.analyze(text, language="en")

        return analyze

    default = "en_core_web_lg"
    if spacy.util.is_package(default):
        return default, [rival(spacy.load(default)), rival(spacy.blank("en"))]
    return "an untrained pipeline of en_core_web_sm's layers", [rival(_untrained(spacy)), rival(spacy.blank("en"))]


def _untrained(spacy):
    """Return a spaCy pipeline that computes what en_core_web_sm does: 4 layers under a tagger, a parser and NER."""
    nlp = spacy.blank("en")
    attributes = {"NORM": 5000, "PREFIX": 1000, "SUFFIX": 2500, "SHAPE": 2500, "SPACY": 50, "IS_SPACE": 50}
    embed = {
        "@architectures": "spacy.MultiHashEmbed.v2", "width": 96,
        "attrs": list(attributes), "rows": list(attributes.values()), "include_static_vectors": False,
    }  # fmt: skip
    encode = {
        "@architectures": "spacy.MaxoutWindowEncoder.v2", "width": 96, "depth": 4, "window_size": 1, "maxout_pieces": 3,
    }  # fmt: skip
    nlp.add_pipe("tok2vec", config={"model": {"@architectures": "spacy.Tok2Vec.v2", "embed": embed, "encode": encode}})
    shared = {"tok2vec": {"@architectures": "spacy.Tok2VecListener.v1", "width": 96, "upstream": "tok2vec"}}
    parser = {
        "@architectures": "spacy.TransitionBasedParser.v2", "state_type": "parser", "extra_state_tokens": False,
        "hidden_width": 64, "maxout_pieces": 2, "use_upper": True,
    }  # fmt: skip
    models = {"tagger": {"@architectures": "spacy.Tagger.v2"} | shared, "parser": parser | shared, "ner": None}
    for (name, model), labels in zip(models.items(), (50, 45, 18), strict=True):
        pipe = nlp.add_pipe(name, config={"model": model} if model else {})
        for label in range(labels):
            pipe.add_label(f"L{label}")
    nlp.initialize()
    return nlp


def _seconds(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
