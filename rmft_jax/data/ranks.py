"""Identities and ranks of all values of the corpus, from the distinct values that each shard has and how often.

DuckDB holds the table, which spills to the disk when it outgrows its memory. A shard of a corpus of mail has a tenth as
many distinct values as occurrences, so the table is far smaller than the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmft_jax.data.shards import Shard
from rmft_jax.data.tagged_shards import Job, read_tagged
from rmft_jax.errors import UserError
from rmft_jax.files import write_arrays

_MEMORY = "1GB"


def rank_shards(job: Job, shards: Sequence[Shard], threads: int) -> None:
    """Write for each shard, in the order of its values:

    identity: int64, the number of the value by its first appearance in the training documents, -1 = only in held-out ones.
    base: int64, its occurrences in the training documents of earlier shards. total: int64, those in the whole corpus.
    is_first: bool, whether this is the first shard that has it in its training documents.
    """
    import duckdb

    database = job.folder / "ranks.duckdb"
    for path in (database, Path(f"{database}.wal")):
        path.unlink(missing_ok=True)  # of a call that was cut off
    settings = {"memory_limit": _MEMORY, "threads": threads, "temp_directory": str(job.folder / "spilled")}
    with duckdb.connect(str(database), config=settings) as table:
        table.execute("set enable_progress_bar = false")  # it is drawn on stdout, where results go
        table.execute('create table found (shard integer, place integer, a ubigint, b ubigint, "count" bigint)')
        for shard in shards:
            found = read_tagged(job, shard)
            hashes = found["value_hash"]
            rows = {  # noqa: F841  DuckDB finds it by its name
                "shard": np.full(len(hashes), shard.number, np.int32),
                "place": np.arange(len(hashes), dtype=np.int32),
                "a": np.ascontiguousarray(hashes[:, 0]),
                "b": np.ascontiguousarray(hashes[:, 1]),
                "count": found["value_count"],
            }
            if len(hashes):
                table.execute("insert into found select * from rows")
        own = "(shard::bigint * 4294967296 + place)"
        table.execute(
            f"""create table ranked as
            select shard, place,
                coalesce(sum("count") over earlier, 0)::bigint as base,
                coalesce(min(case when "count" > 0 then {own} end) over same, -1)::bigint as first,
                (sum("count") over same)::bigint as total
            from found
            window same as (partition by a, b),
                earlier as (partition by a, b order by shard rows between unbounded preceding and 1 preceding)
            order by shard, place"""
        )
        firsts = table.execute(f"select first from ranked where first = {own} order by first").fetchnumpy()["first"]
        for shard in shards:
            query = "select base, first, total from ranked where shard = ? order by place"
            rows = table.execute(query, [shard.number]).fetchnumpy()
            base, first, total = (np.asarray(rows[name], np.int64) for name in ("base", "first", "total"))
            identity = np.where(first >= 0, np.searchsorted(firsts, first), -1)
            place = shard.number * 2**32 + np.arange(len(first))
            write_ranks(job.ranks(shard), identity=identity, base=base, total=total, is_first=first == place)
    database.unlink()


def write_ranks(path: Path, **arrays: np.ndarray) -> None:
    """Write what `rank_shards` says. Raises UserError where there are more occurrences than fit an int32."""
    if len(arrays["total"]) and arrays["total"].max() >= 2**31:
        raise UserError("a value occurs more than 2^31 times: add it to pii.ignore")
    write_arrays(path, arrays, private=True, compress=False)
