"""The work on shards as Apache Beam pipelines, for more than one machine: the same functions, and ranks by key.

Shards and what comes of them are files in the folder of the job, which the workers must see; through the pipeline go only
the shards' descriptions and a keyed hash, a place and a count of each of their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import numpy as np

from rmft_jax.data.ranks import write_ranks
from rmft_jax.data.shards import Shard
from rmft_jax.data.tagged_corpus import write_records
from rmft_jax.data.tagged_shards import Job, read_tagged, tag_shard
from rmft_jax.errors import UserError

Place = tuple[int, int, int]  # shard, place among its values, occurrences in its training documents
Ranked = tuple[int, int, int, int]  # shard, place, occurrences before it, in all
_NOWHERE = -1  # the first shard of a value that no training document has


def tag_and_rank(job: Job, shards: Sequence[Shard], options: Sequence[str]) -> None:
    """Tag the shards that are not, and write the ranks of all, as `tag_shard` and `rank_shards` do.

    options: those of the pipeline, such as --runner=FlinkRunner. Raises UserError where Beam is missing.
    """
    beam = _beam()
    with _pipeline(beam, options) as pipeline:
        every = pipeline | beam.Create(list(shards)) | beam.Reshuffle()
        by_first = (
            every
            | "tag" >> beam.FlatMap(_tag, job).with_output_types(tuple[bytes, Place])
            | "by value" >> beam.GroupByKey()
            | "rank" >> beam.FlatMap(_rank).with_output_types(tuple[int, tuple[int, list[Ranked]]])
            | "by first shard" >> beam.GroupByKey()
        )
        new = by_first | "count" >> beam.Map(_count).with_output_types(tuple[int, int])
        rows = by_first | "number" >> beam.FlatMap(_number).with_output_types(tuple[int, tuple[int, ...]])
        each = every | "each shard" >> beam.Map(_nothing).with_output_types(tuple[int, tuple[int, ...]])
        (
            (rows, each)
            | beam.Flatten()
            | "by shard" >> beam.GroupByKey()
            | "write ranks" >> beam.Map(_write_ranks, job, beam.pvalue.AsDict(new))
        )


def write(job: Job, shards: Sequence[Shard], options: Sequence[str]) -> None:
    """Write the records of shards, as `write_records` does."""
    if not shards:
        return
    beam = _beam()
    with _pipeline(beam, options) as pipeline:
        pipeline | beam.Create(list(shards)) | beam.Reshuffle() | beam.Map(_write_records, job)


def _tag(shard: Shard, job: Job) -> Iterator[tuple[bytes, Place]]:
    """Yield (hash, Place) of each value of a shard."""
    if not job.tagged(shard).exists():
        tag_shard(job, shard)
    found = read_tagged(job, shard)
    for place, (digest, count) in enumerate(zip(found["value_hash"], found["value_count"].tolist(), strict=True)):
        yield digest.tobytes(), (shard.number, place, count)


def _rank(group: tuple[bytes, Iterable[Place]]) -> Iterator[tuple[int, tuple[int, list[Ranked]]]]:
    """Yield (the first shard, (place there, all its places)) of a value."""
    places = sorted(group[1])
    total, before, ranked = sum(count for *_, count in places), 0, []
    for shard, place, count in places:
        ranked.append((shard, place, before, total))
        before += count
    shard, place = next(((shard, place) for shard, place, count in places if count), (_NOWHERE, 0))
    yield shard, (place, ranked)


def _count(group: tuple[int, Iterable[tuple[int, list[Ranked]]]]) -> tuple[int, int]:
    """Return (shard, how many values are first in it)."""
    return group[0], 0 if group[0] == _NOWHERE else sum(1 for _ in group[1])


def _number(group: tuple[int, Iterable[tuple[int, list[Ranked]]]]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield (shard, (place, occurrences before, in all, first shard, number among those that are first there, is first))."""
    first, values = group
    for number, (_, ranked) in enumerate(values if first == _NOWHERE else sorted(values)):
        for shard, place, before, total in ranked:
            yield shard, (place, before, total, first, number, int(shard == first))


def _nothing(shard: Shard) -> tuple[int, tuple[int, ...]]:
    return shard.number, ()  # a shard without values has ranks, too: none


def _write_ranks(group: tuple[int, Iterable[tuple[int, ...]]], job: Job, new: dict[int, int]) -> None:
    number, rows = group
    path = job.ranks(Shard(number, *[np.zeros(0, np.int64)] * 2))
    table = np.array(sorted(row for row in rows if row), np.int64).reshape(-1, 6)
    begins = np.cumsum([0, *(new.get(shard, 0) for shard in range(max(new, default=0) + 1))])
    _, base, total, first, local, is_first = table.T
    identity = np.where(first == _NOWHERE, _NOWHERE, begins[first] + local)
    write_ranks(path, identity=identity, base=base, total=total, is_first=is_first.astype(bool))


def _write_records(shard: Shard, job: Job) -> None:
    write_records(job, shard)


def _pipeline(beam: ModuleType, options: Sequence[str]):
    from apache_beam.options.pipeline_options import PipelineOptions

    return beam.Pipeline(options=PipelineOptions(list(options)))


def _beam() -> ModuleType:
    try:
        import apache_beam
    except ImportError:
        raise UserError("--runner beam needs Apache Beam: pip install 'rmft-jax[beam]'") from None
    return apache_beam
