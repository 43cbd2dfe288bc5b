"""The first pass over a shard: find its personal data, cut and tokenise its text. What the rest of the corpus decides, the
identity and the rank of each value, comes later."""

from __future__ import annotations

import functools
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.canaries import make_canaries
from rmft_jax.data.pieces import pieces_among, substrings
from rmft_jax.data.shards import SPLITS, Shard, groups_of, texts_of
from rmft_jax.data.tagging import Tagged
from rmft_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_path
from rmft_jax.files import read_arrays, write_arrays
from rmft_jax.pii.detector import Detector
from rmft_jax.pii.spans import Span

_CHUNK = 1 << 20  # characters that are tagged at once


@dataclass(frozen=True)
class Job:
    """What the work on any shard needs: the folder where all of it lies, and the settings."""

    folder: Path
    config: Config

    @property
    def texts(self) -> Path:
        """Return the folder of the text."""
        return self.folder / "texts"

    @property
    def tokenizer(self) -> Path:
        """Return the folder of the tokenizer."""
        return self.folder / "tokenizer"

    @property
    def key_file(self) -> Path:
        """Return the file of the secret that hashes of values are made with."""
        return self.folder / "identity.key"

    @property
    def key(self) -> bytes:
        """Return that secret."""
        return bytes.fromhex(self.key_file.read_text())

    def tagged(self, shard: Shard) -> Path:
        """Return the file that `tag_shard` writes."""
        return self.folder / "tagged" / f"{shard.number:05d}.npz"

    def ranks(self, shard: Shard) -> Path:
        """Return the file that `rank_shards` writes for a shard."""
        return self.folder / "ranks" / f"{shard.number:05d}.npz"

    def records(self, shard: Shard) -> Path:
        """Return the file that `write_records` writes last."""
        return self.folder / "records" / f"{shard.number:05d}.json"


def tag_shard(job: Job, shard: Shard) -> None:
    """Tag a shard: write the arrays of `Tagged` for each split, under SPLIT_NAME, and what it has in values.

    span_place: int32 [spans of both splits], which of the shard's values each span is, by their first appearance.
    value_hash: uint64 [values, 2], 128 bits of a keyed hash. value_count: int64 [values], occurrences in training documents.
    value_parts: int64 [values]; part_kind: int32, part_value: int32, part_text: their components in lower case, joined by
    NUL. kinds: those of its components as JSON, [type, kind] each; train_kinds: how many of these training documents have.
    canary_place: int64 [canaries], -1 = not in this shard. pieces: int64, of the vocabulary, that hold a value.
    text_bytes: of the training documents.
    """
    config, tokenizer = job.config, tokenizer_of(job.tokenizer)
    detector, values = Detector(config.pii), _Values()
    arrays: dict[str, np.ndarray] = {}
    for split in SPLITS:
        parts = []
        for chunk in groups_of(texts_of(job.texts, shard, split, config), _CHUNK):
            documents = list(zip(chunk, detector.detect_many(chunk), strict=True))
            parts.append(Tagged.of(documents, tokenizer, detector))
            for text, spans in documents:
                values.add(text, spans, detector)
        tagged = Tagged.join(parts or [Tagged.of([], tokenizer, detector)])
        arrays |= {f"{split}_{name}": array for name, array in vars(tagged).items()}
        if split == "train":
            values.close_training()
            arrays["train_kinds"] = np.int64(len(detector.kinds.names))
            arrays["text_bytes"] = np.int64(byte_lengths_of(job.tokenizer)[tagged.tokens].sum())
    if tokenizer.vocab_size <= 1 << 16:  # the larger part of what is written
        arrays |= {f"{split}_tokens": arrays[f"{split}_tokens"].astype(np.uint16) for split in SPLITS}
    known = [value for value, place in values.places.items() if place < values.training]
    addresses = [canary.address for canary in make_canaries(config.canary, config.source.seed)]
    arrays |= values.arrays(job.key) | {
        "kinds": np.frombuffer(json.dumps(detector.kinds.names).encode(), np.uint8),
        "canary_place": np.array([values.places.get(address, -1) for address in addresses], np.int64),
        "pieces": np.array(pieces_among(substrings_of(job.tokenizer), known), np.int64),
    }
    write_arrays(job.tagged(shard), arrays, private=True, compress=False)


def read_tagged(job: Job, shard: Shard) -> dict[str, np.ndarray]:
    """Return what `tag_shard` has written."""
    return read_arrays(job.tagged(shard), "tagged text", "run `rmft prepare` again")


def tagged_of(arrays: dict[str, np.ndarray], split: str) -> Tagged:
    """Return the documents of a split."""
    return Tagged(**{name: arrays[f"{split}_{name}"] for name in Tagged.__dataclass_fields__})


class _Values:
    """The distinct values of a shard in the order of their appearance, those of training documents first."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.training = 0
        self._spans: list[int] = []
        self._parts: list[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = []
        self._counted = 0

    def add(self, text: str, spans: Sequence[Span], detector: Detector) -> None:
        """Count the spans of the next document."""
        for span in spans:
            place = self.places.setdefault(span.value, len(self._parts))
            if place == len(self._parts):
                self._parts.append(detector.components(text, span))
            self._spans.append(place)

    def close_training(self) -> None:
        """Note that all later documents are held out."""
        self.training, self._counted = len(self._parts), len(self._spans)

    def arrays(self, key: bytes) -> dict[str, np.ndarray]:
        digests = b"".join(hmac.digest(key, value.encode("utf-8", "surrogatepass"), "sha256")[:16] for value in self.places)
        flat = lambda number, dtype: np.array([x for parts in self._parts for x in parts[number]], dtype)  # noqa: E731
        texts = "\0".join(text.lower() for parts in self._parts for text in parts.texts)
        return {
            "span_place": np.array(self._spans, np.int32),
            "value_hash": np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64),
            "value_count": np.bincount(self._spans[: self._counted], minlength=len(self._parts)).astype(np.int64),
            "value_parts": np.array([len(parts.kinds) for parts in self._parts], np.int64),
            "part_kind": flat(1, np.int32),
            "part_value": flat(2, np.int32),
            "part_text": np.frombuffer(texts.encode("utf-8", "surrogatepass"), np.uint8),
        }


@functools.lru_cache(2)
def tokenizer_of(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder, loaded once in each process."""
    return load_tokenizer(tokenizer_path(folder))


@functools.lru_cache(2)
def byte_lengths_of(folder: Path) -> np.ndarray:
    """Return int64 [ids]: how many bytes of text each id of the tokenizer in a folder stands for."""
    return np.array(tokenizer_of(folder).byte_lengths(), np.int64)


@functools.lru_cache(2)
def substrings_of(folder: Path) -> dict[str, list[int]]:
    """Return what the pieces of the tokenizer in a folder contain."""
    return substrings(tokenizer_of(folder))
