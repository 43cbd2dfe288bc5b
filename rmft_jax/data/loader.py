"""Feed blocks to the train step: shuffled by seed and epoch, split over processes, prefetched (grain)."""

from __future__ import annotations

from collections.abc import Iterator

import grain.python as grain
import numpy as np

from rmft_jax.data.blocks import Blocks, as_batch, fill_up
from rmft_jax.kernels import TaggedBatch

_KEPT_BYTES = 256 << 20


def shuffled(blocks: int, seed: int) -> grain.MapDataset:
    """Return the endless sequence of shuffled epochs: (block, epoch) at each place."""
    order = grain.MapDataset.range(blocks).seed(seed).shuffle().repeat(None)
    return order.map_with_index(lambda index, block: (block, index // blocks))


def batches(
    blocks: Blocks, *, batch_size: int, seed: int, start: int = 0, process: int = 0, processes: int = 1
) -> Iterator[TaggedBatch]:
    """Yield this process' share of every batch, from step `start` on, without end.

    Step s of the whole run takes examples [s B, (s + 1) B) of the endless sequence of shuffled epochs, whatever the number
    of processes; so the state of the loader is the step alone.

    Args:
      batch_size: B, sequences per step over all processes, divisible by `processes`.
      seed: of the shuffle; each epoch has an order of its own.
    """
    local, rows = shuffled(len(blocks), seed)[start * batch_size + process :: processes], _Rows(blocks)
    yield from local.batch(batch_size // processes, batch_fn=rows.batch).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    )


def examples_of(blocks: int, *, batch_size: int, seed: int, step: int) -> list[tuple[int, int]]:
    """Return the (block, epoch) pairs of a step of the whole run, numbered from 1, in the order of the batch."""
    order = shuffled(blocks, seed)
    return [tuple(map(int, order[place])) for place in range((step - 1) * batch_size, step * batch_size)]


class _Rows:
    """Rows by number. Those of a small corpus are kept once they are made: a row takes longer to make than a small model to
    learn it."""

    def __init__(self, blocks: Blocks):
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
