"""Feed blocks to the train step: of one corpus or several, shuffled by seed and epoch, split over processes, prefetched
(grain)."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction

import grain.python as grain
import numpy as np

from rmft_jax.data.blocks import Blocks, as_batch, fill_up
from rmft_jax.kernels import TaggedBatch

_KEPT_BYTES = 256 << 20
_APART = 0x9E3779B9  # between the seeds of two corpora


def shuffled(blocks: int, seed: int, first: int = 0) -> grain.MapDataset:
    """Return the endless sequence of shuffled epochs: (block, epoch) at each place. first: number of the first block."""
    order = grain.MapDataset.range(blocks).seed(seed).shuffle().repeat(None)
    return order.map_with_index(lambda index, block: (first + block, index // blocks))


class Mixture:
    """The blocks of a run: those of its own corpus, then those of the corpora that are mixed in, numbered through.

    own: the blocks of the run's own corpus.
    """

    def __init__(self, sources: Sequence[Blocks], weights: Sequence[float] = ()):
        """weights: of all but the first source, each one's share of the examples; the first has what is left."""
        self.sources, self.own, self._weights = tuple(sources), sources[0], tuple(weights)
        self._first = list(itertools.accumulate(map(len, sources), initial=0))
        self.width = self.own.width
        self.max_components = max(source.max_components for source in sources)
        self.max_spans = max(source.max_spans for source in sources)
        for source in sources:  # rows of one shape
            source.max_components, source.max_spans = self.max_components, self.max_spans

    @classmethod
    def of(cls, blocks: Blocks | Mixture) -> Mixture:
        """Return a mixture as it is, and blocks as a mixture of one."""
        return blocks if isinstance(blocks, Mixture) else cls([blocks])

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        source, block = self.locate(number)
        row = self.sources[source][block]
        return row | {"example": np.int32(number - len(self))} if source else row

    def locate(self, number: int) -> tuple[int, int]:
        """Return the source of a block, and its number there."""
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        return source, int(number) - self._first[source]

    def order(self, seed: int) -> grain.MapDataset:
        """Return the endless sequence of examples: (block, epoch of its source) at each place.

        Each source keeps to an endless sequence of shuffled epochs of its own; `shares` says which one is next.
        """
        orders = [
            shuffled(len(source), (seed + number * _APART) % 2**32, first)
            for number, (source, first) in enumerate(zip(self.sources, self._first, strict=False))
        ]
        return grain.MapDataset.select_from_datasets(orders, _Turns(self._weights)) if self._weights else orders[0]


def shares(weights: Sequence[float], examples: int) -> list[int]:
    """Return how many of the first `examples` each source of a mixture has. weights: of all sources but the first.

    Exact for any number: the first source has examples x weight rounded up, so has each further one of what is left by then,
    with its weight among those that are left. Of two sources neither is ever a whole example from its share.
    """
    parts = _parts(tuple(weights))
    out, rest = [], sum(parts)
    for part in parts:
        later = examples * (rest - part) // rest
        out.append(examples - later)
        examples, rest = later, rest - part
    return out


@functools.lru_cache(16)
def _parts(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Return whole numbers in the relation of the weights of all sources."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = math.lcm(*(weight.denominator for weight in exact))
    return tuple(int(weight * whole) for weight in (1 - sum(exact), *exact))


class _Turns(grain.DatasetSelectionMap):
    """Whose turn it is at each place, and which of its examples comes: grain's own `mix` rounds weights to hundredths of the
    least one, and so drifts off."""

    def __init__(self, weights: Sequence[float]):
        self._weights = tuple(weights)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, place: int) -> tuple[int, int]:
        before, after = (shares(self._weights, count) for count in (place, place + 1))
        source = next(number for number, count in enumerate(before) if count < after[number])
        return source, before[source]


def batches(
    blocks: Blocks | Mixture, *, batch_size: int, seed: int, start: int = 0, process: int = 0, processes: int = 1
) -> Iterator[TaggedBatch]:
    """Yield this process' share of every batch, from step `start` on, without end.

    Step s of the whole run takes examples [s B, (s + 1) B) of the endless sequence of `Mixture.order`, whatever the number
    of processes; so the state of the loader is the step alone.

    Args:
      batch_size: B, sequences per step over all processes, divisible by `processes`.
      seed: of the shuffle; each epoch has an order of its own.
    """
    mixture = Mixture.of(blocks)
    local, rows = mixture.order(seed)[start * batch_size + process :: processes], _Rows(mixture)
    yield from local.batch(batch_size // processes, batch_fn=rows.batch).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    )


def examples_of(blocks: Mixture, *, batch_size: int, seed: int, step: int) -> list[tuple[int, int]]:
    """Return the (block, epoch) pairs of a step of the whole run, numbered from 1, in the order of the batch."""
    order = blocks.order(seed)
    return [tuple(map(int, order[place])) for place in range((step - 1) * batch_size, step * batch_size)]


class _Rows:
    """Rows by number. Those of a small corpus are kept once they are made: a row takes longer to make than a small model to
    learn it."""

    def __init__(self, blocks: Mixture):
        self._blocks, self._table = blocks, None
        first = blocks[0]
        if len(blocks) * sum(value.nbytes for value in first.values()) <= _KEPT_BYTES:
            self._table = {name: np.empty((len(blocks), *value.shape), value.dtype) for name, value in first.items()}
            self._made = np.zeros(len(blocks), bool)

    def batch(self, pairs: list[tuple[int, int]]) -> TaggedBatch:
        """Return the rows of (block, epoch) pairs."""
        numbers, epochs = np.array(pairs, np.int64).T
        if self._table is None:
            return as_batch([self._blocks[number] for number in numbers])._replace(epoch=epochs.astype(np.int32))
        for number in numbers[~self._made[numbers]]:  # two threads may both make a row: they write the same
            for name, value in self._blocks[number].items():
                self._table[name][number] = value
            self._made[number] = True
        rows = {name: table[numbers] for name, table in self._table.items()}
        return TaggedBatch(**rows)._replace(epoch=epochs.astype(np.int32))


def sequential_batches(blocks: Blocks, *, batch_size: int) -> Iterator[tuple[TaggedBatch, np.ndarray]]:
    """Yield every block once, in order, with the document of each token int64 [B, W]; the last batch is filled with
    padding (segment 0, document -1)."""
    for begin in range(0, len(blocks), batch_size):
        indices = range(begin, min(begin + batch_size, len(blocks)))
        rows = [blocks[index] for index in indices]
        documents = [blocks.documents(index) for index in indices]
        documents += [np.full(blocks.width, -1, np.int64)] * (batch_size - len(rows))
        yield fill_up(as_batch(rows), batch_size), np.stack(documents)
