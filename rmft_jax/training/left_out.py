"""skipped.jsonl: the steps that were left out, and what was in their batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.loader import Mixture, examples_of
from rmft_jax.devices import is_main
from rmft_jax.files import LineFile, read_lines

FILE = "skipped.jsonl"


class LeftOut:
    """A line for each step that was left out: step, epoch (of its first row), blocks, and with training.mix corpora (of each
    block: 0 = the run's own, n = the n-th of the mix). Lines after the resumed step go."""

    def __init__(self, directory: Path, config: Config, blocks: Mixture, begin: int):
        """begin: the step to go on from."""
        self._path, self._blocks = directory / FILE, blocks
        self._order = {"batch_size": config.training.batch_size, "seed": config.seed}
        kept = [record for record in read_lines(self._path) if record["step"] <= begin]
        self._known = max([begin, *(record["step"] for record in kept)])
        self._file = LineFile(self._path, kept) if is_main() and self._path.exists() else None

    def add(self, steps: np.ndarray) -> None:
        """Note those of some steps that are not yet. steps: numbers from 1, in any order; 0 is none."""
        new = sorted(int(step) for step in np.ravel(steps) if step > self._known)
        if not new:
            return
        self._known = new[-1]
        if not is_main():
            return
        self._file = self._file or LineFile(self._path)
        for step in new:
            pairs = examples_of(self._blocks, step=step, **self._order)
            corpora, blocks = zip(*(self._blocks.locate(number) for number, _ in pairs), strict=True)
            mixed = {"corpora": list(corpora)} if len(self._blocks.sources) > 1 else {}
            self._file.add({"step": step, "epoch": pairs[0][1], "blocks": list(blocks), **mixed})
        self._file.flush()
