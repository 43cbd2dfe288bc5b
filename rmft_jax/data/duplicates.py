"""Flags of duplicates in the tagged training text."""

from __future__ import annotations

import importlib.metadata
import io
import math
from collections.abc import Sequence

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.dedup import datasketch_index, datasketch_nearest, near_duplicates, nearest_kept, repeated_substrings
from rmft_jax.data.shards import Shard, texts_of
from rmft_jax.data.tagged_shards import Job, read_tagged
from rmft_jax.files import read_json, write_chunks, write_json
from rmft_jax.progress import say


def check_library(config: Config) -> None:
    """Raise UserError where near-duplicates cannot be searched for as the config wants it."""
    if config.dedup.minhash == "datasketch":
        datasketch_index(config.dedup.near_threshold, config.dedup.permutations)


def find_near(texts: Sequence[str], config: Config) -> np.ndarray:
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

    Of a corpus of more than dedup.most_tokens it is not written.
    Returns: minhash (the library and its version), near_documents, removed_tokens (None there), substring_tokens.
    """
    config, said = job.config, job.folder / "duplicates.json"
    if said.exists():
        return read_json(said, "duplicates", "")
    total = int(corpus["token_begin"][-1])
    # the 100 bytes of the paper's rule of exact substrings, in tokens of this corpus
    length = config.dedup.substring_tokens or max(2, math.ceil(100 * total / max(1, int(corpus["text_bytes"]))))
    library = f"{config.dedup.minhash} {importlib.metadata.version(config.dedup.minhash)}"
    found = {"minhash": library, "near_documents": None, "substring_tokens": length, "removed_tokens": None}
    if total > config.dedup.most_tokens:
        say(f"prepare: {total:,} tokens are not searched for duplicates (dedup.most_tokens is {config.dedup.most_tokens:,})")
    else:
        say("prepare: looking for duplicates")
        flags, near = _flags(job, shards, length)
        data = io.BytesIO()
        np.save(data, flags)
        write_chunks(job.folder / "duplicates.npy", [data.getbuffer()], private=True)
        found |= {"near_documents": int(near.sum()), "removed_tokens": int(np.count_nonzero(flags))}
    write_json(said, found)
    return found


def _flags(job: Job, shards: Sequence[Shard], length: int) -> tuple[np.ndarray, np.ndarray]:
    texts = [text for shard in shards for text in texts_of(job.texts, shard, "train", job.config)]
    near = find_near(texts, job.config)
    found = [read_tagged(job, shard) for shard in shards]
    tokens = np.concatenate([arrays["train_tokens"] for arrays in found])
    sizes = np.concatenate([arrays["train_document_tokens"] for arrays in found])
    is_near = np.repeat(near, sizes)
    documents = np.repeat(np.arange(len(sizes)), sizes)[~is_near]
    flags = is_near.astype(np.uint8)
    repeated = repeated_substrings(tokens[~is_near], documents, min_tokens=length)
    flags[~is_near] = np.where(repeated, 2, 0)
    return flags, near
