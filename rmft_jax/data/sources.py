"""Read documents: from files, from objects of Python, or from the bundled generator."""

from __future__ import annotations

import array
import contextlib
import csv
import errno
import glob
import gzip
import importlib
import io
import itertools
import json
import os
import random
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, NamedTuple

import numpy as np

from rmft_jax.config import SourceConfig
from rmft_jax.data import grain_source
from rmft_jax.data.mail import read_mbox, read_tree, text_of
from rmft_jax.errors import UserError


@dataclass
class Documents:
    """The texts of a source. skipped: documents left out under source.on_error=skip.

    faults: how many documents had what out of order, or were left out for being empty: see docs/data.md.
    """

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    skipped: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class Record(NamedTuple):
    """A document as a reader has it. problem: what is wrong where and how to mend it, of one that cannot be read."""

    text: str
    problem: str = ""
    id: str = ""
    faults: tuple[str, ...] = ()


def read_documents(config: SourceConfig) -> Documents:
    """Read the training and held-out documents of a source.

    Raises UserError for a missing file, a corrupt line (unless on_error is skip), or a source without documents.
    """
    documents = Documents()
    documents.train = list(iterate(config, documents))
    if has_heldout(config):
        documents.heldout = list(iterate(config, documents, heldout=True))
    else:
        texts, chosen = documents.train, set_aside(len(documents.train), config)
        documents.heldout = [text for number, text in enumerate(texts) if number in chosen]
        documents.train = [text for number, text in enumerate(texts) if number not in chosen]
    check_counts(len(documents.train), len(documents.heldout), config)
    return documents


def iterate(config: SourceConfig, documents: Documents, *, heldout: bool = False) -> Iterator[str]:
    """Yield the texts of a source one after the other, or of its file of held-out ones.

    documents: where to count what is skipped and what is out of order. Raises UserError as `read_documents` does.
    """
    if heldout:
        yield from _read(config, config.heldout_path, config.heldout_limit, documents)
    elif config.format == "synthetic":
        from rmft_jax.data.synthetic import synthetic_mail

        yield from (_cut(item["text"], config) for item in synthetic_mail(config.limit or 500, seed=config.seed))
    elif config.format == "python_docs":
        from pydoc_data.topics import topics

        yield from (_cut(topics[name], config) for name in sorted(topics)[: config.limit or None])
    else:
        yield from _read(config, config.path, config.limit, documents)


def has_heldout(config: SourceConfig) -> bool:
    """Return whether the held-out documents are another file, and not set aside."""
    return config.format not in ("synthetic", "python_docs") and bool(config.heldout_path)


def identity(config: SourceConfig) -> list:
    """Return what tells whether a source is another one now: name, size, time of each file that there is, or what
    `grain_source.identity` says. Raises UserError for a grain source that cannot be loaded."""
    paths = [path for path in (config.path, config.heldout_path) if path]
    if config.format == "grain":
        return [grain_source.identity(path) for path in paths]
    files = [Path(name) for path in paths for name in _files(path)]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]


def set_aside(count: int, config: SourceConfig) -> set[int]:
    """Return which of `count` documents are held out: a random share."""
    share = max(1, round(config.heldout_fraction * count)) if config.heldout_fraction else 0
    if config.heldout_limit:
        share = min(share, config.heldout_limit)
    return set(random.Random(config.seed).sample(range(count), min(share, count)))


def check_counts(train: int, heldout: int, config: SourceConfig) -> None:
    """Raise UserError where there are no documents of either kind."""
    for name, count in (("training", train), ("held-out", heldout)):
        if not count:
            raise UserError(
                f"source {config.heldout_path or config.path or config.format} has no {name} documents: "
                f"check source.path, source.text_field and source.heldout_fraction"
            )


def read_texts(path: str, *, text_field: str, separator: str, limit: int = 0) -> list[str]:
    """Read the texts of any file that prompts can come from: .jsonl(.gz) with a field, or plain text."""
    kind = "jsonl" if ".jsonl" in Path(path).suffixes else "text"
    config = SourceConfig(format=kind, path=path, text_field=text_field, separator=separator)
    return list(_read(config, path, limit, Documents()))


def _cut(text: str, config: SourceConfig) -> str:
    return text[: config.max_characters] if config.max_characters else text


def _read(config: SourceConfig, path: str, limit: int, documents: Documents) -> Iterator[str]:
    seen, count = array.array("q"), 0  # hashes of ids: 8 bytes for each document of any number of them
    try:
        for record in _READERS[config.format](path, config):
            if record.problem and config.on_error == "raise":
                raise UserError(f"{path} {record.problem}; or set source.on_error=skip")
            if record.problem:
                documents.skipped += 1
                continue
            documents.faults.update(record.faults)
            if record.id:
                seen.append(hash(record.id))
            text = record.text
            if "\0" in text:
                documents.faults["NUL"] += 1
                text = text.replace("\0", "")
            if not text.strip():
                documents.faults["empty"] += 1
                continue
            yield _cut(text, config)
            count += 1
            if limit and count >= limit:
                break
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"source {path} cannot be read ({reason}): check the path, and that the file is whole") from None
    documents.faults["repeated id"] += len(seen) - len(np.unique(np.array(seen, np.int64)))


def open_bytes(path: str) -> IO[bytes]:
    """Open a file for reading, decompressed where its name ends in .gz or .zst."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        zstandard = _library("zstandard", path)
        return io.BufferedReader(_Zstandard(open(path, "rb"), zstandard.ZstdDecompressor().decompressobj))
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """The decompressed bytes of a file of one frame or several. Raises OSError where it is not whole."""

    def __init__(self, file: IO[bytes], new_frame: Callable):
        self._file, self._new_frame = file, new_frame
        self._frame, self._coming, self._ready = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, room) -> int:
        while not self._ready:
            data = self._coming or self._file.read(2**17)
            if not data:
                if self._frame is not None:
                    raise OSError("it ends within compressed data")
                return 0
            self._frame, self._coming = self._frame or self._new_frame(), b""
            try:
                self._ready = self._frame.decompress(data)
            except Exception as error:  # noqa: BLE001  zstandard.ZstdError, of a library that may not be installed
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._coming, self._frame = self._frame.unused_data, None
        count = min(len(room), len(self._ready))
        room[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _library(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{path} needs {name.partition('.')[0]}: pip install 'rmft-jax[data]'") from None


def _decode(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Return bytes as text; bytes that are no UTF-8 become U+FFFD, which is a fault."""
    try:
        return data.decode("utf-8"), ()
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), ("undecodable",)


def _jsonl(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield a record for each line that is not blank."""
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            text, faults = _decode(line)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                yield Record("", f"line {number} is not valid JSON: mend or delete the line")
                continue
            yield _field(record, config, f"line {number}", faults)


def _field(record, config: SourceConfig, where: str, faults: tuple[str, ...] = ()) -> Record:
    """Return the text and the id of a record, mail parsed if source.mail says so."""
    value = record.get(config.text_field) if isinstance(record, dict) else None
    if not isinstance(value, str | bytes):
        known = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else "none"
        problem = f"{where} has no text in field {config.text_field!r} (fields: {known}): set source.text_field"
        return Record("", problem)
    id = record.get("id", "")
    if config.mail:
        text, more = text_of(value if isinstance(value, bytes) else value.encode("utf-8", "replace"))
    elif isinstance(value, bytes):
        text, more = _decode(value)
    else:
        text, more = value, ()
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can have it
            text, more = value.encode("utf-8", "replace").decode("utf-8"), ("undecodable",)
    return Record(text, "", str(id) if isinstance(id, str | int) else "", (*faults, *more))


def _csv(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the rows of a file of comma-separated values whose first row names the columns."""
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                text = row.get(config.text_field)
                faults = ("undecodable",) if isinstance(text, str) and "\ufffd" in text else ()
                yield _field(row, config, f"row at line {rows.line_num}", faults)
        except csv.Error as error:
            yield Record("", f"line {rows.line_num} is no comma-separated row ({error}): mend or delete it")


def _parquet(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the rows of a Parquet file, a batch of rows in memory at a time."""
    parquet, number = _library("pyarrow.parquet", path), 0
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in (config.text_field, "id") if name in file.schema_arrow.names]
            if config.text_field not in names:
                yield _field(dict.fromkeys(file.schema_arrow.names), config, "the file")
                return
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for row in batch.to_pylist():
                    yield _field(row, config, f"row {number}")
                    number += 1
    except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"row {number}: {str(error).splitlines()[0][:200]}") from None


def _mbox(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the messages of an mbox file."""
    with open_bytes(path) as file:
        for raw in read_mbox(file):
            text, faults = text_of(raw)
            yield Record(text, "", "", faults)


def _maildir(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the messages below a folder or in a .tar(.gz) of one, a file each."""
    if not Path(path).exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for name, raw in read_tree(Path(path)):
        text, faults = text_of(raw)
        yield Record(text, "", name, faults)


def _tfds(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the texts of a split of the TFDS data set config.path; path: that for config.split, or the name of another."""
    import tensorflow_datasets as tfds

    split = config.split if path == config.path else path
    try:
        if Path(config.path).is_dir():
            records = tfds.builder_from_directory(config.path).as_data_source(split)
        else:
            records = tfds.data_source(config.path, split=split)
    except Exception as error:  # of many kinds: no such name, no network, no such split, another file format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"TFDS data set {config.path}, split {split}, cannot be read ({reason[:200]})") from None
    for number, record in enumerate(records):
        yield _field(record, config, f"record {number}")


def _grain(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the records of a source that is an object of Python."""
    yield from _items(grain_source.load_source(path), path, config)


def _array_record(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the records of an ArrayRecord file, or of all those that a pattern such as data/*.array_record names."""
    from grain.python import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource(_files(path))
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0][:200]) from None
    yield from _items(source, path, config)


def _items(source, path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield records that are dicts, JSON objects, or, without source.text_field, the text itself."""
    for number, item, problem in grain_source.read_records(source, path):
        if problem:
            yield Record("", problem)
            continue
        faults: tuple[str, ...] = ()
        if isinstance(item, str | bytes) and not config.text_field:
            item = {"": item}
        elif isinstance(item, str | bytes):
            text, faults = _decode(item) if isinstance(item, bytes) else (item, ())
            with contextlib.suppress(ValueError, RecursionError):
                item = json.loads(text)
            if not isinstance(item, dict):
                yield Record("", f"record {number} is no JSON object: set source.text_field='' if records are the text")
                continue
        yield _field(item, config, f"record {number}", faults)


def _files(path: str) -> list[str]:
    """Return the files that a pattern names, in order; the path itself where there are none."""
    return [path] if Path(path).exists() else sorted(glob.glob(path)) or [path]


def _text(path: str, config: SourceConfig) -> Iterator[Record]:
    """Yield the documents of a text file, separated by a line that holds `config.separator` alone."""
    lines: list[bytes] = []
    with open_bytes(path) as file:
        for line in file:
            if line.rstrip(b"\r\n") == config.separator.encode():
                yield _plain(lines, config)
                lines = []
            else:
                lines.append(line)
    if lines:
        yield _plain(lines, config)


def _plain(lines: list[bytes], config: SourceConfig) -> Record:
    raw = b"".join(lines)
    text, faults = text_of(raw) if config.mail else _decode(raw)
    return Record(text, "", "", faults)


_READERS = {
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "text": _text,
    "mbox": _mbox,
    "maildir": _maildir,
    "tfds": _tfds,
    "array_record": _array_record,
    "grain": _grain,
}


def first_rows(path: str, format: str, count: int) -> list[dict]:
    """Return the first rows of a jsonl, csv or parquet file as they are, those that are none left out."""
    if format == "parquet":
        with _library("pyarrow.parquet", path).ParquetFile(path) as file:
            return next((batch.to_pylist() for batch in file.iter_batches(batch_size=count)), [])
    with open_bytes(path) as lines:
        if format == "csv":
            csv.field_size_limit(2**31 - 1)
            text = io.TextIOWrapper(lines, encoding="utf-8", errors="replace", newline="")
            return list(itertools.islice(csv.DictReader(text), count))
        rows = []
        for line in itertools.islice(lines, count):
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(_decode(line)[0]))
    return [row for row in rows if isinstance(row, dict)]


def first_bytes(path: str, count: int) -> bytes:
    """Return the first bytes of a file, of a .gz or .zst one those that it unpacks to."""
    with open_bytes(path) as file:
        return file.read(count)
