"""The text of a source in shards: read once, in order, so that many processes can work on it and each can be done again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.canaries import make_canaries, places_of
from rmft_jax.data.sources import Documents, check_counts, has_heldout, iterate, set_aside
from rmft_jax.files import read_arrays, read_json, write_arrays, write_json
from rmft_jax.progress import say

_MEND = "run `rmft prepare` again"


@dataclass(frozen=True)
class Shard:
    """Some consecutive documents of the source.

    train: int64 [documents], its training documents in order, by their number in the shard; -1 - n is a copy of the n-th
    canary. heldout: int64 [documents], its held-out ones. train_begin, heldout_begin: how many come in the shards before.
    """

    number: int
    train: np.ndarray
    heldout: np.ndarray
    train_begin: int = 0
    heldout_begin: int = 0

    def of(self, split: str) -> tuple[np.ndarray, int]:
        """Return (documents, how many come before) of train or heldout."""
        return (self.train, self.train_begin) if split == "train" else (self.heldout, self.heldout_begin)


SPLITS = ("train", "heldout")


def read_shards(folder: Path, config: Config) -> dict:
    """Write the texts of the source to `folder` in shards of source.shard_characters, unless that has been done; return
    documents (of each shard), characters, heldout_from (the first shard of the held-out file), skipped and faults."""
    summary = folder / "read.json"
    if summary.exists():
        return read_json(summary, "texts", _MEND)
    say(f"prepare: reading {config.source.path or config.source.format}")
    counted, sizes, characters = Documents(), [], 0
    heldout_from = None
    for heldout in (False, True) if has_heldout(config.source) else (False,):
        heldout_from = len(sizes) if heldout else None
        for texts in groups_of(iterate(config.source, counted, heldout=heldout), config.source.shard_characters):
            data = [text.encode("utf-8", "surrogatepass") for text in texts]
            arrays = {"text": np.frombuffer(b"".join(data), np.uint8), "sizes": np.array(list(map(len, data)), np.int64)}
            write_arrays(_path(folder, len(sizes)), arrays, private=True, compress=False)
            sizes.append(len(texts))
            characters += sum(map(len, texts))
    faults = {name: count for name, count in sorted(counted.faults.items()) if count}
    found = {"documents": sizes, "characters": characters, "heldout_from": heldout_from}
    found |= {"skipped": counted.skipped, "faults": faults}
    write_json(summary, found)
    return found


def plan_shards(read: dict, config: Config) -> list[Shard]:
    """Decide which documents of each shard are for training, in what order, and which are held out.

    Raises UserError when there are none of either kind.
    """
    sizes, border = read["documents"], read["heldout_from"]
    border = len(sizes) if border is None else border
    total = sum(sizes[:border])
    chosen = np.zeros(total, bool)
    if not has_heldout(config.source):
        chosen[list(set_aside(total, config.source))] = True
    left = total - chosen.sum()
    check_counts(left, chosen.sum() + sum(sizes[border:]), config.source)
    canaries = make_canaries(config.canary, config.source.seed)
    places, copies = places_of(canaries, int(left), config.source.seed)
    shards, begin, before = [], 0, 0
    for number, size in enumerate(sizes[:border]):
        own = chosen[begin : begin + size]
        train = np.flatnonzero(~own)
        last = number == border - 1
        here = (places >= before) & ((places < before + len(train)) | last)
        train = np.insert(train, places[here] - before, -1 - copies[here])
        shards.append(Shard(number, train, np.flatnonzero(own)))
        begin, before = begin + size, before + int((~own).sum())
    none = np.zeros(0, np.int64)
    shards += [Shard(number, none, np.arange(sizes[number])) for number in range(border, len(sizes))]
    begins = {f"{split}_begin": np.cumsum([0, *(len(shard.of(split)[0]) for shard in shards)]) for split in SPLITS}
    return [
        dataclasses.replace(shard, **{name: int(values[shard.number]) for name, values in begins.items()})
        for shard in shards
    ]


def texts_of(folder: Path, shard: Shard, split: str, config: Config) -> list[str]:
    """Return the texts of a shard's documents of a split, in order."""
    arrays = read_arrays(_path(folder, shard.number), "texts", _MEND)
    data, ends = arrays["text"].tobytes(), np.cumsum(arrays["sizes"])
    begins = ends - arrays["sizes"]
    canaries = make_canaries(config.canary, config.source.seed)
    return [
        data[begins[number] : ends[number]].decode("utf-8", "surrogatepass") if number >= 0 else canaries[-1 - number].text
        for number in shard.of(split)[0].tolist()
    ]


def groups_of(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Yield lists of consecutive texts; one ends with the text that fills it."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _path(folder: Path, number: int) -> Path:
    return folder / f"text-{number:05d}.npz"
