"""Feed blocks to the train step: shuffled by seed and epoch, split over processes, prefetched (grain)."""

from __future__ import annotations

from collections.abc import Iterator

import grain.python as grain
import numpy as np

from rmft_jax.data.blocks import Blocks, as_batch
from rmft_jax.kernels import TaggedBatch


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
    size = len(blocks)
    order = grain.MapDataset.range(size).seed(seed).shuffle().repeat(None)
    examples = order.map_with_index(lambda index, block: (block, index // size))
    local = examples[start * batch_size + process :: processes]
    rows = local.map(lambda pair: blocks[int(pair[0])] | {"epoch": np.int32(pair[1])})
    yield from rows.batch(batch_size // processes, batch_fn=as_batch).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    )


def sequential_batches(blocks: Blocks, *, batch_size: int) -> Iterator[tuple[TaggedBatch, np.ndarray]]:
    """Yield every block once, in order, with the document of each token int64 [B, W]; the last batch is filled with
    padding (segment 0, document -1)."""
    for begin in range(0, len(blocks), batch_size):
        indices = range(begin, min(begin + batch_size, len(blocks)))
        rows = [blocks[index] for index in indices]
        documents = [blocks.documents(index) for index in indices]
        empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
        missing = batch_size - len(rows)
        rows += [empty] * missing
        documents += [np.full(blocks.width, -1, np.int64)] * missing
        yield as_batch(rows), np.stack(documents)
