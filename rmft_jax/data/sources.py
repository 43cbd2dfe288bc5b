"""Read documents: from files, or from the bundled generator."""

from __future__ import annotations

import gzip
import io
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rmft_jax.config import SourceConfig
from rmft_jax.errors import UserError


@dataclass
class Documents:
    """The texts of a source. skipped: documents left out under source.on_error=skip."""

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    skipped: int = 0


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
    if config.format in ("jsonl", "text", "tfds") and config.heldout_path:
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
    reader = {"jsonl": _jsonl, "text": _text, "tfds": _tfds}[config.format]
    texts: list[str] = []
    try:
        for text, problem in reader(path, config):
            if problem and config.on_error == "raise":
                raise UserError(f"{path} {problem}; or set source.on_error=skip")
            if problem:
                documents.skipped += 1
            elif text.strip():
                texts.append(_cut(text, config))
            if limit and len(texts) >= limit:
                break
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"source {path} cannot be read ({reason}): check the path, and that the file is whole") from None
    return texts


def _open(path: str) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _jsonl(path: str, config: SourceConfig) -> Iterator[tuple[str, str]]:
    """Yield (text, "") or ("", what is wrong where and how to mend it) for each line that is not blank."""
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError:
                yield "", f"line {number} is not valid JSON: mend or delete the line"
                continue
            yield _field(record, config, f"line {number}")


def _field(record, config: SourceConfig, where: str) -> tuple[str, str]:
    """Return (the text of a record, "") or ("", what is wrong where and how to mend it)."""
    text = record.get(config.text_field) if isinstance(record, dict) else None
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    if isinstance(text, str):
        return text, ""
    known = ", ".join(sorted(record)) if isinstance(record, dict) else "none"
    return "", f"{where} has no text in field {config.text_field!r} (fields: {known}): set source.text_field"


def _tfds(path: str, config: SourceConfig) -> Iterator[tuple[str, str]]:
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


def _text(path: str, config: SourceConfig) -> Iterator[tuple[str, str]]:
    """Yield the documents of a text file, separated by a line that holds `config.separator` alone."""
    lines: list[str] = []
    with io.TextIOWrapper(_open(path), encoding="utf-8", errors="replace", newline="") as file:
        for line in file:
            if line.rstrip("\r\n") == config.separator:
                yield "".join(lines), ""
                lines = []
            else:
                lines.append(line)
    yield "".join(lines), ""
