"""`rmft bench prepare`: tagged tokens a second, from text to records, against SentencePiece encoding the same text."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.cores import cores
from rmft_jax.data.pool import peak_memory, run_in_order, run_shards
from rmft_jax.data.prepare import begin, number_shards, prepare, tag_and_rank
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.data.shards import SPLITS, Shard, texts_of
from rmft_jax.data.tagged_corpus import write_records
from rmft_jax.data.tagged_shards import Job, tokenizer_of
from rmft_jax.errors import UserError
from rmft_jax.progress import track


def run(config: Config, peer: str = "", *, rounds: int = 5) -> dict:
    """Time the work on the shards of the source's text: reading them, finding PII, tokenising, ranking, writing records.

    The peer encodes the same texts, read from the same shards, with the same SentencePiece model by the library alone, in as
    many processes; both start their processes anew each time. In turn, after one round that is not counted.

    Returns name, device, versions, unit, value and peer_value (medians, tokens/s of all cores), ratio (median over rounds),
    runs; cores; whole_seconds, of one `prepare` from the source to the bank, whose fixed part does not grow with the corpus;
    rss_mib: the peaks of the main process, of the largest worker, and of all together at most.

    Raises UserError for an unknown peer, or a tokenizer that is no SentencePiece model.
    """
    if peer not in ("", "sentencepiece"):
        raise UserError(f"bench prepare knows no peer {peer!r}: leave it out, or name sentencepiece")
    workers, pairs = cores(), []
    with tempfile.TemporaryDirectory(prefix="rmft-bench-") as name:
        config = dataclasses.replace(config, out=name, data="", dedup=dataclasses.replace(config.dedup, most_tokens=0))
        source = Job(Path(name) / "source", config)
        read, shards = begin(source)
        if not isinstance(tokenizer_of(source.tokenizer), SentencePieceTokenizer):
            raise UserError("bench prepare needs a SentencePiece model: leave tokenizer.path out, or name one")
        for number in track(range(rounds + 1), "bench prepare", rounds + 1):
            job = Job(Path(name) / f"round-{number}", config)
            job.folder.mkdir()
            for path in (source.texts, source.tokenizer, source.key_file):
                (job.folder / path.name).symlink_to(path)
            ours, _ = _timed(lambda job=job: _work(job, shards, workers))
            theirs, counts = _timed(lambda: list(run_in_order(_encode, source, shards, workers)))
            pairs.append((ours, theirs))
        tokens = sum(counts)
        seconds, _ = _timed(lambda: prepare(config, workers=workers))
    runs = [(tokens / ours, tokens / theirs) for ours, theirs in pairs[1:]]
    main, worker = peak_memory()
    return {
        "name": "prepare",
        **environment("sentencepiece", "duckdb", "array-record"),
        "unit": "tokens/s",
        "shape": {"documents": sum(read["documents"]), "characters": read["characters"], "tokens": tokens},
        "cores": workers,
        "value": statistics.median(ours for ours, _ in runs),
        "peer": "SentencePiece alone, as many processes",
        "peer_value": statistics.median(theirs for _, theirs in runs),
        "ratio": statistics.median(ours / theirs for ours, theirs in runs),
        "runs": runs,
        "whole_seconds": seconds,
        "rss_mib": {"main": main, "worker": worker, "all": main + workers * worker},
    }


def _work(job: Job, shards: list[Shard], workers: int) -> None:
    tag_and_rank(job, shards, workers)
    number_shards(job, shards)
    run_shards(write_records, job, shards, job.records, "prepare: writing", workers)


def _encode(job: Job, shard: Shard) -> int:
    """Encode the documents of a shard; return how many tokens they are."""
    encode = tokenizer_of(job.tokenizer).encode
    return sum(len(ids) for split in SPLITS for ids in encode(texts_of(job.texts, shard, split, job.config)))


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that work took, and what came of it."""
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found
