"""memorization.jsonl: what the counters of the tracker gain from one report to the next. Its format: docs/tracker.md."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.loader import shares
from rmft_jax.devices import is_main
from rmft_jax.files import LineFile, read_lines
from rmft_jax.training.tracker import slice_names

SCHEMA = 1


class Tally:
    """What was counted over some rows of one epoch: hits, targets int64 [slices], lengths int64 [bins]."""

    def __init__(self, hits: np.ndarray, targets: np.ndarray, lengths: np.ndarray):
        self.hits, self.targets, self.lengths = (np.asarray(x).astype(np.int64) for x in (hits, targets, lengths))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.hits + other.hits, self.targets + other.targets, self.lengths + other.lengths)

    def record(self, names: tuple[str, ...], row: int) -> dict:
        """Return `slices` and `runs` as files hold them. names: of the slices. row: most tokens that a run can have."""
        slices = {"all": (self.hits[:2].sum(), self.targets[:2].sum())}
        slices |= {name: (self.hits[n], self.targets[n]) for n, name in enumerate(names)}
        count, used = int(self.lengths.sum()), np.flatnonzero(self.lengths)
        longest = int(used[-1]) + 1 if count else 0
        return {
            "slices": {
                name: {"hits": int(hits), "targets": int(targets), "m": hits / targets if targets else None}
                for name, (hits, targets) in slices.items()
            },
            "runs": {
                "count": count,
                "mean": float(self.hits[:2].sum() / count) if count else None,
                "longest": longest if longest < max(len(self.lengths), 1) or len(self.lengths) >= row else None,
                "histogram": self.lengths[:longest].tolist(),
            },
        }

    @classmethod
    def of_record(cls, record: dict, names: tuple[str, ...], bins: int) -> Tally:
        """Return what `record` wrote."""
        counts = [[record["slices"][name][key] for name in names] for key in ("hits", "targets")]
        lengths = record["runs"]["histogram"]
        return cls(*counts, np.pad(lengths, (0, bins - len(lengths))))


class TrackerLog:
    """memorization.jsonl: a line for each report and epoch, one for each finished epoch; lines after the resumed step go.

    Reports are at the steps of metrics.jsonl, and like its records they are read after the next dispatch.
    """

    def __init__(self, directory: Path, config: Config, blocks: int, begin: int, counts: dict):
        """blocks: of the run's own corpus, which alone is followed. begin: the step to go on from; counts: the state's
        `counts` at that step."""
        path, self._names, self._begin = directory / "memorization.jsonl", slice_names(config), begin
        self._every, self._batch, self._blocks = config.training.log_every, config.training.batch_size, blocks
        self._weights = config.training.weights
        self._row, self._follows = config.training.sequence_length, config.tracker.examples
        self._last, self._since = jax.device_get(counts), begin
        self._bins = self._last["lengths"].shape[1]
        self._pending: tuple[int, int, dict] | None = None
        self._epochs: dict[int, Tally] = {}  # the unfinished ones
        records = [record for record in read_lines(path) if record.get("step", begin + 1) <= begin]
        for record in records:
            self._add_up(record["epoch"], Tally.of_record(record, self._names, self._bins), record["kind"] == "epoch")
        slices = ["all", *self._names]
        header = {"kind": "tracker", "schema": SCHEMA, "slices": slices, "examples": blocks, "lengths": self._bins}
        self._file = LineFile(path, (header, *records)) if is_main() else None

    def add(self, step: int, count: int, counts: dict) -> None:
        """Note the counts of the `count` steps up to `step`, just dispatched; read those of the dispatch before, if due."""
        due, self._pending = self._pending, (step, count, counts)
        if due:
            self._read(*due)

    def flush(self) -> None:
        """Write the counts of what is still to be read, with a report of the newest step."""
        if self._pending:
            self._read(*self._pending, also=self._pending[:1])
            self._pending = None
        if self._file:
            self._file.flush()

    def _read(self, last: int, count: int, counts: dict, also: tuple[int, ...] = ()) -> None:
        steps = [step for step in range(last - count + 1, last + 1) if step % self._every == 0 or step in also]
        if not steps:
            return
        counts = jax.device_get(counts)
        for step in steps:
            place = step - (last - count + 1)
            self._write(step, jax.tree.map(lambda x: x[place], counts) if count > 1 else counts)  # noqa: B023

    def _write(self, step: int, counts: dict) -> None:
        change = {name: counts[name] - self._last[name] for name in ("hits", "targets", "lengths")}  # modulo 2^32
        first, end = (shares(self._weights, of_step * self._batch)[0] for of_step in (self._since, step))
        whole = {"examples_memorized": int(counts["whole"]) if self._follows else None}
        records = []
        for epoch in range(first // self._blocks, (end - 1) // self._blocks + 1):
            at = epoch % len(change["hits"])
            tally = Tally(change["hits"][at], change["targets"][at], change["lengths"][at])
            about = {"kind": "interval", "step": step, "since": self._since, "epoch": epoch, **whole}
            records.append(about | tally.record(self._names, self._row))
            self._add_up(epoch, tally)
        for epoch in [epoch for epoch in self._epochs if (epoch + 1) * self._blocks <= end]:
            about = {"kind": "epoch", "step": step, "epoch": epoch, **whole}
            records.append(about | self._epochs[epoch].record(self._names, self._row))
            del self._epochs[epoch]
        self._last, self._since = counts, step
        if self._file:
            self._file.add(*records)

    def _add_up(self, epoch: int, tally: Tally, finished: bool = False) -> None:
        if finished:
            self._epochs.pop(epoch, None)
        else:
            self._epochs[epoch] = self._epochs[epoch] + tally if epoch in self._epochs else tally
