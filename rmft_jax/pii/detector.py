"""Find personal data in text: all types of a config at once, many texts at once."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rmft_jax.config import PiiConfig
from rmft_jax.pii import custom, windows
from rmft_jax.pii.spans import Component, PiiType, Span

_BATCH = 1 << 22  # characters searched at once
_REMEMBERED = 1 << 18  # windows, and values, whose parts are kept

_Hit = tuple[int, int, int, str]  # start and end in the window, type, value


class Detector:
    """The types of a config, numbered: the built-in ones in the order of `types`, then the custom ones."""

    def __init__(self, config: PiiConfig, engine: str = ""):
        """engine: re2 | re; "" = re2 where it is installed. Raises UserError for a type that lacks what it needs."""
        modules = [importlib.import_module(f"rmft_jax.pii.types.{name}") for name in config.types]
        self.types: tuple[PiiType, ...] = (*(m.make(config) for m in modules), *map(custom.make, config.custom))
        numbered = list(enumerate(self.types))
        self._ignore = frozenset(value.lower() for value in config.ignore)
        self._compiled = {number: re.compile(type.pattern, re.ASCII) for number, type in numbered if type.pattern}
        self._in_runs = [number for number in self._compiled if self.types[number].inside]
        self._in_lines = [number for number in self._compiled if not self.types[number].inside]
        self._scanned = [number for number, type in numbered if type.scan]
        patterns = [self.types[number].pattern for number in self._in_lines]
        self._gate = windows.gate_of(patterns, engine or windows.default_engine()) if patterns else None
        self._hits: dict[tuple[int, bytes], tuple[_Hit, ...]] = {}
        self._parts: dict[tuple[int, str], tuple[tuple[int, int, str], ...]] = {}

    def detect(self, text: str) -> list[Span]:
        """Find the PII in a text, in order.

        Of overlapping values the one that starts earlier wins, then the longer one, then the type with the lower number;
        what loses is dropped. Offsets count code points.
        """
        return next(self.detect_many([text]))

    def detect_many(self, texts: Iterable[str]) -> Iterator[list[Span]]:
        """Yield what `detect` returns for each text, at many times its speed."""
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= _BATCH:
                yield from self._detect_batch(batch)
                batch, size = [], 0
        if batch:
            yield from self._detect_batch(batch)

    def components(self, text: str, span: Span) -> list[Component]:
        """Cut a span into components that cover it without gaps."""
        start, written = span.start, text[span.start : span.end]
        key = span.type, written
        if (parts := self._parts.get(key)) is None:
            if len(self._parts) >= _REMEMBERED:
                self._parts.clear()
            parts = self._parts[key] = tuple(self.types[span.type].parts(written))
        return [Component(start + a, start + b, kind) for a, b, kind in parts]

    def _detect_batch(self, texts: Sequence[str]) -> Iterator[list[Span]]:
        """Search texts joined by line breaks, which no pattern crosses."""
        data = "\n".join(texts).encode("utf-8", "surrogatepass")
        codes = np.frombuffer(data, np.uint8)
        begins = np.cumsum([0, *(len(text) + 1 for text in texts)])
        later_bytes = np.flatnonzero((codes & 0xC0) == 0x80) if begins[-1] != len(data) + 1 else np.zeros(0, np.int64)
        found: list[tuple[int, int, int, str]] = []

        def look(number: int, bounds: tuple[np.ndarray, np.ndarray]) -> None:
            places = bounds[0] - np.searchsorted(later_bytes, bounds[0])  # from bytes to code points
            for place, begin, end in zip(places.tolist(), *(bound.tolist() for bound in bounds), strict=True):
                for start, stop, type, value in self._hits_of(number, data[begin:end]):
                    found.append((place + start, place + stop, type, value))

        for number in self._in_runs:
            look(number, windows.runs_with(codes, self.types[number].alphabet, self.types[number].inside))
        if self._gate is not None:
            look(-1, windows.lines_at(codes, self._gate(data)))
        for begin, text in zip(begins.tolist(), texts, strict=False):
            for number in self._scanned:
                for start, end in self.types[number].scan(text):
                    if (value := self.types[number].normalise(text[start:end])) not in self._ignore:
                        found.append((begin + start, begin + end, number, value))
        return _by_document(found, begins)

    def _hits_of(self, number: int, window: bytes) -> tuple[_Hit, ...]:
        """Search a window, or remember what was found in one like it. number: the type; -1 = all types of lines."""
        key = number, window
        if (hits := self._hits.get(key)) is None:
            if len(self._hits) >= _REMEMBERED:
                self._hits.clear()
            line = window.decode("utf-8", "surrogatepass")
            numbers = self._in_lines if number < 0 else [number]
            hits = self._hits[key] = tuple(hit for n in numbers for hit in self._search(n, line))
        return hits

    def _search(self, number: int, line: str) -> Iterator[_Hit]:
        type = self.types[number]
        for match in self._compiled[number].finditer(line):
            if bounds := type.check(line, *match.span()):
                start, end = bounds
                if (value := type.normalise(line[start:end])) not in self._ignore:
                    yield start, end, number, value


@functools.lru_cache(16)
def detector(config: PiiConfig) -> Detector:
    """Return the Detector of a config, the same object for equal configs."""
    return Detector(config)


def detect(text: str, types: Iterable[str] = ("email",), ignore: Iterable[str] = ()) -> list[Span]:
    """Find PII of built-in types in a text, see Detector.detect. ignore: normalised values that are nobody's."""
    return detector(PiiConfig(types=tuple(types), ignore=tuple(sorted(ignore)))).detect(text)


def _by_document(found: list[tuple[int, int, int, str]], begins: np.ndarray) -> Iterator[list[Span]]:
    """Yield the spans of each document, in order and without overlaps. begins: int [documents + 1]."""
    found.sort(key=lambda hit: (hit[0], -hit[1], hit[2]))
    place = 0
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        spans, done = [], begin
        while place < len(found) and found[place][0] < end:
            start, stop, type, value = found[place]
            if start >= done:
                spans.append(Span(start - begin, stop - begin, type, value))
                done = stop
            place += 1
        yield spans
