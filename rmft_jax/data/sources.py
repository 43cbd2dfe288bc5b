"""Read documents: from files, or from the bundled generator."""

from __future__ import annotations

import csv
import errno
import gzip
import importlib
import io
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

from rmft_jax.config import SourceConfig
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
    if config.format == "synthetic":
        from rmft_jax.data.synthetic import synthetic_mail

        texts = [item["text"] for item in synthetic_mail(config.limit or 500, seed=config.seed)]
        documents.train = [_cut(text, config) for text in texts]
    elif config.format == "python_docs":
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
        documents.train = [_cut(text, config) for text in texts[: config.limit or None]]
    else:
        documents.train = _read(config, config.path, config.limit, documents)
    if config.format not in ("synthetic", "python_docs") and config.heldout_path:
        documents.heldout = _read(config, config.heldout_path, config.heldout_limit, documents)
    else:
        _set_aside(documents, config)
    for name, texts in (("training", documents.train), ("held-out", documents.heldout)):
        if not texts:
            raise UserError(
                f"source {config.heldout_path or config.path or config.format} has no {name} documents: "
                f"check source.path, source.text_field and source.heldout_fraction"
            )
    return documents


def read_texts(path: str, *, text_field: str, separator: str, limit: int = 0) -> list[str]:
    """Read the texts of any file that prompts can come from: .jsonl(.gz) with a field, or plain text."""
    kind = "jsonl" if ".jsonl" in Path(path).suffixes else "text"
    config = SourceConfig(format=kind, path=path, text_field=text_field, separator=separator)
    return _read(config, path, limit, Documents())


def _set_aside(documents: Documents, config: SourceConfig) -> None:
    """Move a random share of the documents to the held-out set; the order of the others stays."""
    count = max(1, round(config.heldout_fraction * len(documents.train))) if config.heldout_fraction else 0
    if config.heldout_limit:
        count = min(count, config.heldout_limit)
    chosen = set(random.Random(config.seed).sample(range(len(documents.train)), min(count, len(documents.train))))
    documents.heldout = [text for number, text in enumerate(documents.train) if number in chosen]
    documents.train = [text for number, text in enumerate(documents.train) if number not in chosen]


def _cut(text: str, config: SourceConfig) -> str:
    return text[: config.max_characters] if config.max_characters else text


def _read(config: SourceConfig, path: str, limit: int, documents: Documents) -> list[str]:
    texts: list[str] = []
    seen: set[int] = set()
    try:
        for record in _READERS[config.format](path, config):
            if record.problem and config.on_error == "raise":
                raise UserError(f"{path} {record.problem}; or set source.on_error=skip")
            if record.problem:
                documents.skipped += 1
                continue
            documents.faults.update(record.faults)
            if record.id:
                documents.faults["repeated id"] += hash(record.id) in seen
                seen.add(hash(record.id))
            text = record.text
            if "\0" in text:
                documents.faults["NUL"] += 1
                text = text.replace("\0", "")
            if not text.strip():
                documents.faults["empty"] += 1
                continue
            texts.append(_cut(text, config))
            if limit and len(texts) >= limit:
                break
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"source {path} cannot be read ({reason}): check the path, and that the file is whole") from None
    return texts


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
}
