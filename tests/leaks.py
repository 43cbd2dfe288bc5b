"""Whether personal data of a corpus stand anywhere in what was written."""

import gzip
import io
import re

import numpy as np

from rmft_jax.config import load_config
from rmft_jax.data.sources import read_documents
from rmft_jax.pii.detector import detect


def personal_data(run) -> set[bytes]:
    """Return every address, phone number and full name of the corpus of a run, training and held-out, in small letters."""
    documents = read_documents(load_config(run / "config.yaml").source)
    found = set()
    for text in documents.train + documents.heldout:
        for span in detect(text):
            found |= {span.value, text[span.start : span.end]}
        found |= set(re.findall(r"\(\d{3}\) \d{3}-\d{4}|\b\d{3}-\d{3}-\d{4}\b", text))
        for last, first in re.findall(r'"(\w+), (\w+)" <', text):
            found |= {f"{last}, {first}", f"{first} {last}"}
    assert len(found) > 50
    return {value.lower().encode() for value in found}


def everything_written(folder) -> dict[str, bytes]:
    """Return what the files of a folder hold, those that are compressed unpacked too, and their names, in small letters."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[f"the name {name}"] = name.lower().encode()
        if path.is_file():
            found[name] = path.read_bytes().lower()
            if path.suffix == ".gz":
                found[f"{name}, unpacked"] = gzip.decompress(path.read_bytes()).lower()
            elif path.suffix == ".npz":
                with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                    found |= {f"{name}, {key}": value.tobytes().lower() for key, value in arrays.items()}
    return found


def assert_nothing_leaks(folder, run, **printed: str) -> None:
    """Search all that is below a folder, and what was printed, for personal data of the corpus of a run."""
    written = everything_written(folder) | {name: text.lower().encode() for name, text in printed.items()}
    values = personal_data(run)
    assert len(written) > 40
    for name, content in written.items():
        for value in values:
            assert value not in content, name
