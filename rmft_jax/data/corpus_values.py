"""All distinct values of the corpus, shard by shard: what the surrogate bank and the identity index are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmft_jax.data.canaries import make_canaries
from rmft_jax.data.shards import Shard
from rmft_jax.data.tagged_shards import Job, read_tagged
from rmft_jax.errors import UserError
from rmft_jax.files import read_arrays
from rmft_jax.pii.bank import in_stock, real_values
from rmft_jax.pii.detector import Detector

_SAMPLE = 1 << 18  # values whose components are held in memory
_MEND = "run `rmft prepare` again"


@dataclass
class CorpusValues:
    """What is known of all values, in the order of their identities.

    detector: numbers the kinds of the corpus. hashes: uint64 [identities], the first 64 bits of keyed hashes. counts: int64
    [identities]. canaries: int64 [canaries], the identity of each. pieces: those of the vocabulary that hold a value.
    sample: the components (text in lower case, kind) of every value or, of more than 262,144, of evenly spaced ones.
    stocked: those components of all values that surrogates are invented from, empty where the sample has all values.
    real: uint32, `real_values` of all, sorted.
    """

    detector: Detector
    hashes: np.ndarray
    counts: np.ndarray
    canaries: np.ndarray
    pieces: set[int]
    sample: list[list[tuple[str, int]]]
    stocked: set[tuple[str, int]]
    real: np.ndarray


def corpus_values(job: Job, shards: Sequence[Shard]) -> CorpusValues:
    """Collect the values of all shards. Raises UserError for canaries that were not detected as PII."""
    corpus = read_arrays(job.folder / "corpus.npz", "numbers of the corpus", _MEND)
    detector = Detector(job.config.pii)
    for type, kind in json.loads(corpus["kind_names"].tobytes()):
        detector.kinds.number(type, kind)
    identities = sum(int(read_arrays(job.ranks(shard), "ranks", _MEND)["is_first"].sum()) for shard in shards)
    step = max(1, -(-identities // _SAMPLE))
    canaries = np.full(len(make_canaries(job.config.canary, job.config.source.seed)), -1, np.int64)
    out = CorpusValues(detector, np.zeros(identities, np.uint64), np.zeros(identities, np.int64), canaries, set(), [], set(),
                       np.zeros(0, np.uint32))  # fmt: skip
    real = np.zeros(identities, np.uint32)
    is_stocked = in_stock(detector)
    for shard in shards:
        found, rank = read_tagged(job, shard), read_arrays(job.ranks(shard), "ranks", _MEND)
        identity, own = rank["identity"], rank["is_first"]
        places = identity[own]
        out.hashes[places], out.counts[places] = found["value_hash"][own, 0], rank["total"][own]
        out.pieces.update(found["pieces"].tolist())
        planted = np.flatnonzero(found["canary_place"] >= 0)
        canaries[planted] = identity[found["canary_place"][planted]]
        parts = found["value_parts"]
        real[places] = real_values(found["part_value"], parts)[own]
        kinds = corpus["kinds"][corpus["kinds_begin"][shard.number] :][found["part_kind"]].tolist()
        texts = found["part_text"].tobytes().decode("utf-8", "surrogatepass").split("\0")
        ends = np.cumsum(parts)
        for number in np.flatnonzero(own).tolist():
            components = list(zip(*(of[ends[number] - parts[number] : ends[number]] for of in (texts, kinds)), strict=True))
            if identity[number] % step == 0:
                out.sample.append(components)
            if step > 1:
                out.stocked.update(part for part in components if is_stocked(*part))
    if (canaries < 0).any():
        raise UserError(f"{(canaries < 0).sum()} canaries were not detected as PII: check pii.types and pii.ignore")
    out.real = np.unique(real) if identities else np.zeros(1, np.uint32)
    return out
