"""`rmft dedup`: the training text without its duplicates, and which documents are near-duplicates of which."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.duplicates import find_nearest
from rmft_jax.data.prepare import Prepared, check_flagged
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.files import write_chunks, write_json

SCHEMA = 1


def dedup(config: Config, prepared: Prepared) -> dict:
    """Write what is left of the prepared training text under dedup.policy near_exact, and a report of what went.

    documents.jsonl.gz, readable by its owner only: id (the document's number), text, of each document of which anything is
    left, without its repeated substrings. dedup.json holds no text: schema, documents, tokens, near_duplicates (documents),
    repeated_tokens, kept_documents, kept_tokens, and clusters: lists of numbers of documents that are near-duplicates of the
    first one, the largest cluster first. Both lie in config.out/dedup. Returns the report.
    """
    check_flagged(prepared.manifest, "near_exact")
    records, folder = list(read_corpus(prepared.directory, "train")), Path(config.out) / "dedup"
    decode = prepared.tokenizer.decode
    near = np.array([bool(len(record["duplicate"])) and bool((record["duplicate"] == 1).all()) for record in records])
    nearest = find_nearest([decode(record["tokens"]) for record in records], near, config)
    clusters: dict[int, list[int]] = {}
    for number in np.flatnonzero(nearest >= 0):
        clusters.setdefault(int(nearest[number]), [int(nearest[number])]).append(int(number))
    kept = [record["tokens"][record["duplicate"] == 0] for record in records]
    report = {
        "schema": SCHEMA,
        "documents": len(records),
        "tokens": sum(len(record["tokens"]) for record in records),
        "near_duplicates": int(near.sum()),
        "repeated_tokens": int(sum((record["duplicate"] == 2).sum() for record in records)),
        "kept_documents": sum(len(tokens) > 0 for tokens in kept),
        "kept_tokens": sum(map(len, kept)),
        "clusters": sorted(clusters.values(), key=lambda cluster: (-len(cluster), cluster)),
    }

    def lines() -> Iterator[bytes]:
        for number, tokens in enumerate(kept):
            if len(tokens):
                line = json.dumps({"id": number, "text": decode(tokens)}, ensure_ascii=False) + "\n"
                yield gzip.compress(line.encode("utf-8", "replace"), mtime=0)

    write_chunks(folder / "documents.jsonl.gz", lines(), private=True)
    write_json(folder / "dedup.json", report)
    return report
