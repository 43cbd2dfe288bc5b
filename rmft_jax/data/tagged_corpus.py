"""The data set that `prepare` writes: tagged documents in ArrayRecord with the metadata of TFDS (TensorFlow is not needed).

Anybody's program can read it: `tfds.data_source("tagged_corpus", data_dir=DIR, split="train")`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rmft_jax.data.shards import SPLITS, Shard
from rmft_jax.data.tagged_shards import Job, read_tagged, tagged_of
from rmft_jax.data.tagging import FIELDS
from rmft_jax.errors import UserError
from rmft_jax.files import read_arrays, write_json
from rmft_jax.pii.kinds import Kinds

NAME = "tagged_corpus"
VERSION = "1.1.0"  # 1.0.0 had its documents in another order than that of the corpus
_DESCRIPTION = "Documents as token ids, with the components and spans of their personal data."
Fields = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (values of all documents, how many each has)


def write_records(job: Job, shard: Shard) -> None:
    """The second pass over a shard: write its documents as records, a file for each split that it has documents of.

    Its identities, ranks, the numbers of kinds and the flags of duplicates must have been written. NNNNN.json, which is
    written last, says of each split: documents, tokens, pii_tokens, pii_occurrences, bytes, digest.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    said = {}
    for split in SPLITS:
        fields = _fields(job, shard, split)
        count = len(shard.of(split)[0])
        records, path = serialize(fields) if count else [], record_path(job, shard.number, split)
        path.parent.mkdir(exist_ok=True)
        if count:
            partial = path.with_name(f".{path.name}")
            writer = ArrayRecordWriter(str(partial), "group_size:1,zstd:1")  # the least that makes numbers small
            for record in records:
                writer.write(record)
            writer.close()
            partial.rename(path)
        digest = hashlib.sha256()
        for name in FIELDS:
            for array in fields[name]:
                digest.update(np.ascontiguousarray(array).tobytes())
        said[split] = {
            "documents": count,
            "tokens": len(fields["tokens"][0]),
            "pii_tokens": int(np.count_nonzero(fields["component"][0])),
            "pii_occurrences": len(fields["span_rank"][0]),
            "bytes": sum(map(len, records)),
            "digest": digest.hexdigest(),
        }
    write_json(job.records(shard), said)


def record_path(job: Job, number: int, split: str) -> Path:
    """Return the file of a shard's records of a split."""
    return job.folder / "records" / f"{split}-{number:05d}.array_record"


def _fields(job: Job, shard: Shard, split: str) -> Fields:
    """Return all fields of the documents of a split."""
    found = read_tagged(job, shard)
    ranks = read_arrays(job.ranks(shard), "ranks", "run `rmft prepare` again")
    corpus = read_arrays(job.folder / "corpus.npz", "numbers of the corpus", "run `rmft prepare` again")
    tagged = tagged_of(found, split)
    fields = tagged.fields()
    trained = int(found["train_document_spans"].sum())
    place = found["span_place"][:trained] if split == "train" else found["span_place"][trained:]
    rank = span_id = np.zeros(len(place), np.int64)
    if split == "train":
        rank = ranks["base"][place] + _earlier(place)
        span_id = corpus["span_begin"][shard.number] + np.arange(len(place))
    kinds = corpus["kinds"][corpus["kinds_begin"][shard.number] : corpus["kinds_begin"][shard.number + 1]]
    fields["component_kind"] = kinds[tagged.component_kind], tagged.document_components
    fields |= {
        "span_identity": (ranks["identity"][place], tagged.document_spans),
        "span_rank": (rank, tagged.document_spans),
        "span_id": (span_id, tagged.document_spans),
    }
    fields = {name: (fields[name][0].astype(dtype), fields[name][1]) for name, dtype in FIELDS.items()}
    documents, before = shard.of(split)
    fields["document"] = before + np.arange(len(documents)), np.ones(len(documents), np.int64)
    fields["duplicate"] = _duplicates(job, shard, split, corpus, len(tagged.tokens)), tagged.document_tokens
    return fields


def _duplicates(job: Job, shard: Shard, split: str, corpus: dict[str, np.ndarray], tokens: int) -> np.ndarray:
    path = job.folder / "duplicates.npy"
    if split != "train" or not path.exists():
        return np.zeros(tokens, np.uint8)
    begin = corpus["token_begin"][shard.number]
    return np.array(np.load(path, mmap_mode="r")[begin : begin + tokens])


def _earlier(place: np.ndarray) -> np.ndarray:
    """Return int64: how many earlier elements are equal to each."""
    order = np.argsort(place, kind="stable")
    values, first = np.unique(place[order], return_index=True)
    out = np.empty(len(place), np.int64)
    out[order] = np.arange(len(place)) - np.repeat(first, np.diff(first, append=len(place)))
    return out


def number_kinds(kinds: Kinds, found: Sequence[tuple[Sequence, int]]) -> list[np.ndarray]:
    """Number the kinds of all shards as one pass over the corpus would, training documents before held-out ones.

    kinds: gets the numbers. found: (names of a shard's kinds, how many its training documents have) for each shard.
    Returns int32 [1 + kinds of the shard], the corpus' number of each of a shard's; 0 is 0.
    """
    for names, training in found:
        for type, kind in names[:training]:
            kinds.number(type, kind)
    for names, training in found:
        for type, kind in names[training:]:
            kinds.number(type, kind)
    return [np.array([0, *(kinds.number(type, kind) for type, kind in names)], np.int32) for names, _ in found]


def serialize(fields: Fields) -> list[bytes]:
    """Return each document as the bytes of a tf.train.Example, as TFDS writes integers, its features by their names.

    Many documents at once: it takes a tenth of the time that messages of protobuf take, and no other module of TFDS.
    """
    columns = []
    for name in sorted(fields):
        columns.append((b"\x0a" + _prefixed(name.encode()), *_varints(*fields[name])))
    records = []
    for number in range(len(fields["tokens"][1])):
        entries = []
        for key, data, ends in columns:
            ints = data[ends[number] : ends[number + 1]]
            ints = b"\x1a" + _prefixed(b"\x0a" + _prefixed(ints) if ints else b"")  # Feature.int64_list, its packed values
            entries.append(b"\x0a" + _prefixed(key + b"\x12" + _prefixed(ints)))  # an entry of Features.feature
        records.append(b"\x0a" + _prefixed(b"".join(entries)))  # Example.features
    return records


def _prefixed(data: bytes) -> bytes:
    """Return bytes with their number as a varint before them."""
    size, out = len(data), bytearray()
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out) + data


def _varints(values: np.ndarray, counts: np.ndarray) -> tuple[bytes, list[int]]:
    """Return integers as varints of protobuf, and where those of each document begin and end, given their counts."""
    left = values if values.min(initial=0) >= 0 else values.astype(np.int64).view(np.uint64)
    width = max(1, -(-int(left.max(initial=0)).bit_length() // 7))
    ends = np.concatenate([[0], np.cumsum(counts)])
    if width == 1:
        return left.astype(np.uint8).tobytes(), ends.tolist()
    digits, used = np.empty((len(left), width), np.uint8), np.empty((len(left), width), bool)
    for byte in range(width):  # seven bits each, the lowest first; the highest bit says that there are more
        used[:, byte] = (left > 0) if byte else True
        digits[:, byte] = (left & left.dtype.type(127)).astype(np.uint8) | ((left > 127).view(np.uint8) << 7)
        left = left >> left.dtype.type(7)
    sizes = [np.count_nonzero(used[begin:end]) for begin, end in itertools.pairwise(ends.tolist())]
    return digits[used].tobytes(), list(itertools.accumulate(sizes, initial=0))


def write_metadata(folder: Path, splits: dict[str, tuple[list[int], int]]) -> None:
    """Write what TFDS needs to read the records of a folder. splits: (records of each file, bytes of all) by name."""
    import tensorflow_datasets as tfds

    with _quiet():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=NAME, filetype_suffix="array_record", template=_TEMPLATE
        )
        infos = [
            tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=size, filename_template=template)
            for name, (lengths, size) in splits.items()
        ]
        vector = lambda dtype: tfds.features.Tensor(shape=(None,), dtype=dtype)  # noqa: E731
        features = {name: vector(dtype) for name, dtype in FIELDS.items()}
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features | {"document": np.int64, "duplicate": vector(np.uint8)},
            split_infos=infos,
            version=VERSION,
            filename_template=template,
            check_data=False,
            description=_DESCRIPTION,
        )


_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def file_name(split: str, number: int, count: int) -> str:
    """Return how TFDS names a file of records."""
    return f"{NAME}-{split}.array_record-{number:05d}-of-{count:05d}"


def read_corpus(directory: Path, split: str) -> Iterator[dict[str, np.ndarray]]:
    """Yield the tagged documents of a split, in the order of the corpus: FIELDS, `document`, and `duplicate`."""
    import tensorflow_datasets as tfds

    paths = [directory / NAME / version for version in (VERSION, "1.0.0")]
    path = next((path for path in paths if path.is_dir()), None)
    if path is None:
        raise UserError(f"no prepared data in {directory}: run `rmft prepare` with the same config first")
    source = tfds.builder_from_directory(str(path)).as_data_source(split=split)
    records = (source[index] for index in range(len(source)))
    yield from records if path.name == VERSION else sorted(records, key=lambda record: record["document"])


@contextlib.contextmanager
def _quiet():
    """Keep TFDS' bars and notices out of our output; errors still raise."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    absl = logging.getLogger("absl")
    absl_level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.root.setLevel(level)
        absl.setLevel(absl_level)
