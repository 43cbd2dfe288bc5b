"""Flags of duplicates in the tagged training text."""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.dedup import datasketch_index, datasketch_nearest, near_duplicates, nearest_kept, repeated_substrings
from rmft_jax.data.shards import Shard, texts_of
from rmft_jax.data.tagged_shards import Job, read_tagged
from rmft_jax.files import read_json, write_chunks, write_json
from rmft_jax.progress import say

_DOCUMENT = 60  # tokens whose search for repeated runs, 50 bytes each, takes as much memory as a document among others


def check_library(config: Config) -> None:
    """Raise UserError where near-duplicates cannot be searched for as the config wants it."""
    if config.dedup.minhash == "datasketch":
        datasketch_index(config.dedup.near_threshold, config.dedup.permutations)


def find_near(texts: Iterable[str], config: Config) -> np.ndarray:
    """Return bool [n], the texts that are near-duplicates of an earlier one, as dedup.minhash finds them."""
    settings = {"threshold": config.dedup.near_threshold, "num_perm": config.dedup.permutations}
    if config.dedup.minhash == "datasketch":
        return datasketch_nearest(texts, **settings) >= 0
    return near_duplicates(texts, **settings, seed=config.source.seed)


def find_nearest(texts: Sequence[str], near: np.ndarray, config: Config) -> np.ndarray:
    """Return int64 [n], the kept text that each of those that `find_near` flagged is nearest to; -1 for the others."""
    settings = {"threshold": config.dedup.near_threshold, "num_perm": config.dedup.permutations}
    if config.dedup.minhash == "datasketch":
        return datasketch_nearest(texts, **settings)
    return nearest_kept(texts, near, **settings, seed=config.source.seed)


def flag_duplicates(job: Job, shards: Sequence[Shard], corpus: dict[str, np.ndarray]) -> dict:
    """Write `duplicates.npy`, uint8 [training tokens]: 1 = in a near-duplicate document, 2 = in a repeated run of others.

    Of a corpus of more than dedup.most_tokens, near-duplicates alone; of one with more than a document for each 60 of them,
    neither, and nothing is written.
    Returns: minhash (the library and its version), near_documents, removed_tokens, substring_tokens; None = not known.
    """
    config, said = job.config, job.folder / "duplicates.json"
    if said.exists():
        return read_json(said, "duplicates", "")
    total, most = int(corpus["token_begin"][-1]), config.dedup.most_tokens
    # the 100 bytes of the paper's rule of exact substrings, in tokens of this corpus
    length = config.dedup.substring_tokens or max(2, math.ceil(100 * total / max(1, int(corpus["text_bytes"]))))
    library = f"{config.dedup.minhash} {importlib.metadata.version(config.dedup.minhash)}"
    found = {"minhash": library, "near_documents": None, "substring_tokens": length, "removed_tokens": None}
    few = _DOCUMENT * sum(len(shard.train) for shard in shards) <= most
    if total > most:
        what = "repeated substrings" if few else "duplicates"
        say(f"prepare: {total:,} tokens are not searched for {what} (dedup.most_tokens is {most:,})")
    if total <= most or few:
        say("prepare: looking for duplicates")
        near = find_near((text for shard in shards for text in texts_of(job.texts, shard, "train", config)), config)
        parts = _near_parts(job, shards, near)
        if total <= most:
            parts = [_with_repeated(job, shards, np.concatenate(list(parts)), length)]
            found["removed_tokens"] = int(np.count_nonzero(parts[0]))
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (total,)})
        write_chunks(job.folder / "duplicates.npy", itertools.chain([header.getvalue()], parts), private=True)
        found["near_documents"] = int(near.sum())
    write_json(said, found)
    return found


def _near_parts(job: Job, shards: Sequence[Shard], near: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each shard uint8 [training tokens], 1 in its near-duplicate documents."""
    for shard in shards:
        sizes = read_tagged(job, shard)["train_document_tokens"]
        begin = shard.train_begin
        yield np.repeat(near[begin : begin + len(sizes)], sizes).astype(np.uint8)


def _with_repeated(job: Job, shards: Sequence[Shard], flags: np.ndarray, length: int) -> np.ndarray:
    """Return the flags of near-duplicates with those of repeated runs in the other documents."""
    found = [read_tagged(job, shard) for shard in shards]
    tokens = np.concatenate([arrays["train_tokens"] for arrays in found])
    sizes = np.concatenate([arrays["train_document_tokens"] for arrays in found])
    kept = flags == 0
    documents = np.repeat(np.arange(len(sizes)), sizes)[kept]
    flags[kept] = np.where(repeated_substrings(tokens[kept], documents, min_tokens=length), 2, 0)
    return flags
