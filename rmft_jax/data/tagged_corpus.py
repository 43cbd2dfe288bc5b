"""The data set that `prepare` writes: tagged documents in ArrayRecord, through a TFDS builder (TensorFlow is not needed).

Anybody's program can read it: `tfds.builder_from_directory(DIR).as_data_source("train")`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from rmft_jax.data.tagging import FIELDS
from rmft_jax.errors import UserError

VERSION = "1.0.0"
Records = Callable[[], Iterable[dict[str, np.ndarray]]]


def write_corpus(directory: Path, splits: dict[str, Records]) -> Path:
    """Write the splits below `directory`; return the folder with the records. TFDS moves it in place when it is whole."""
    builder = _builder_class()(data_dir=str(directory), splits=splits)
    with _quiet():
        builder.download_and_prepare()
    return Path(builder.data_path)


def read_corpus(directory: Path, split: str) -> Iterator[dict[str, np.ndarray]]:
    """Yield the tagged documents of a split, in the order of the corpus: FIELDS, `document`, and `duplicate`."""
    import tensorflow_datasets as tfds

    path = directory / "tagged_corpus" / VERSION
    if not path.is_dir():
        raise UserError(f"no prepared data in {directory}: run `rmft prepare` with the same config first")
    source = tfds.builder_from_directory(str(path)).as_data_source(split=split)
    records = [source[index] for index in range(len(source))]
    yield from sorted(records, key=lambda record: record["document"])


@functools.cache  # TFDS registers a builder by its name, once
def _builder_class() -> type:
    import tensorflow_datasets as tfds

    class TaggedCorpus(tfds.core.GeneratorBasedBuilder):
        """Documents as token ids, with the components and spans of their personal data."""

        VERSION = tfds.core.Version(VERSION)

        def __init__(self, *, splits: dict[str, Records] | None = None, **options):
            self._records = splits or {}
            super().__init__(file_format="array_record", **options)

        def _info(self):
            vector = lambda dtype: tfds.features.Tensor(shape=(None,), dtype=dtype)  # noqa: E731
            features = {name: vector(dtype) for name, dtype in FIELDS.items()}
            features |= {"document": np.int64, "duplicate": vector(np.uint8)}
            return tfds.core.DatasetInfo(
                builder=self,
                description="Documents as token ids, with the components and spans of their personal data.",
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(records) for split, records in self._records.items()}

        def _generate_examples(self, records: Records):
            for number, record in enumerate(records()):
                yield number, record | {"document": number}

    return TaggedCorpus


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
