"""Find personal data in text: all types of a config at once, many texts at once."""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rmft_jax.config import PiiConfig
from rmft_jax.pii import custom, windows
from rmft_jax.pii.kinds import Kinds
from rmft_jax.pii.spans import Components, PiiType, Span
from rmft_jax.pii.values import component_value

_BATCH = 1 << 19  # characters searched at once; few enough for a processor's cache
_REMEMBERED = 1 << 18  # windows, and values, whose parts are kept

_LINES = -1  # stands for all types that are searched for line by line
_Hit = tuple[int, int, int, str]  # start, minus end, type, value: the order in which the first one wins


class Detector:
    """The types of a config, numbered: the built-in ones in the order of `types`, then the custom ones.

    kinds: numbers the kinds of the components that have been cut so far.
    """

    def __init__(self, config: PiiConfig, engine: str = ""):
        """engine: re2 | re; "" = re2 where it is installed. Raises UserError for a type that lacks what it needs."""
        modules = [importlib.import_module(f"rmft_jax.pii.types.{name}") for name in config.types]
        self.types: tuple[PiiType, ...] = (*(m.make(config) for m in modules), *map(custom.make, config.custom))
        self.kinds = Kinds(self.types)
        numbered = list(enumerate(self.types))
        self._ignore = frozenset(value.lower() for value in config.ignore)
        self._compiled = {number: re.compile(type.pattern, re.ASCII) for number, type in numbered if type.pattern}
        self._in_runs = [number for number in self._compiled if self.types[number].inside]
        self._in_lines = [number for number in self._compiled if not self.types[number].inside]
        self._scanned = [number for number, type in numbered if type.scan]
        patterns = [self.types[number].pattern for number in self._in_lines]
        self._gate = windows.gate_of(patterns, engine or windows.default_engine()) if patterns else None
        self._hits: dict[int, dict[bytes, list[_Hit]]] = {number: {} for number in (_LINES, *self._in_runs)}
        self._components: dict[tuple[int, str], Components] = {}

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

    def components(self, text: str, span: Span) -> Components:
        """Cut a span into its components."""
        key = span.type, text[span.start : span.end]
        if (components := self._components.get(key)) is None:
            _make_room(self._components)
            type, written = key
            parts = self.types[type].parts(written)
            texts = tuple([written[start:end] for start, end, _ in parts])
            kinds = tuple([self.kinds.number(type, kind) for *_, kind in parts])
            components = self._components[key] = Components(texts, kinds, tuple(map(component_value, texts)))
        return components

    def _detect_batch(self, texts: Sequence[str]) -> Iterator[list[Span]]:
        """Search texts joined by line breaks, which no pattern crosses."""
        data = "\n".join(texts).encode("utf-8", "surrogatepass")
        begins = list(itertools.accumulate((len(text) + 1 for text in texts), initial=0))
        later_bytes = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) == 0x80)
        found: list[_Hit] = []

        def look(number: int, bounds: tuple[np.ndarray, np.ndarray]) -> None:
            known = self._hits[number]
            places = bounds[0] - np.searchsorted(later_bytes, bounds[0])  # from bytes to code points
            for place, begin, end in zip(places.tolist(), *(bound.tolist() for bound in bounds), strict=True):
                window = data[begin:end]
                if (hits := known.get(window)) is None:
                    _make_room(known)
                    hits = known[window] = self._search(number, window)
                for start, minus_end, type, value in hits:
                    found.append((place + start, minus_end - place, type, value))

        for number in self._in_runs:
            look(number, windows.runs_with(data, self.types[number].alphabet, self.types[number].inside))
        if self._gate is not None:
            look(_LINES, windows.lines_at(data, self._gate(data)))
        for number in self._scanned:
            for begin, text in zip(begins, texts, strict=False):
                for start, end in self.types[number].scan(text):
                    if (value := self.types[number].normalise(text[start:end])) not in self._ignore:
                        found.append((begin + start, -begin - end, number, value))
        found.sort()
        return _by_document(found, begins)

    def _search(self, number: int, window: bytes) -> list[_Hit]:
        """Search a window by `re`: for one type, or for _LINES."""
        line = window.decode("utf-8", "surrogatepass")
        hits = []
        for n in self._in_lines if number == _LINES else (number,):
            type = self.types[n]
            for match in self._compiled[n].finditer(line):
                if bounds := type.check(line, *match.span()) if type.check else match.span():
                    start, end = bounds
                    if (value := type.normalise(line[start:end])) not in self._ignore:
                        hits.append((start, -end, n, value))
        return hits


@functools.lru_cache(16)
def detector(config: PiiConfig) -> Detector:
    """Return the Detector of a config, the same object for equal configs."""
    return Detector(config)


def detect(text: str, types: Iterable[str] = ("email",), ignore: Iterable[str] = ()) -> list[Span]:
    """Find PII of built-in types in a text, see Detector.detect. ignore: normalised values that are nobody's."""
    return detector(PiiConfig(types=tuple(types), ignore=tuple(sorted(ignore)))).detect(text)


def _by_document(found: list[_Hit], begins: list[int]) -> Iterator[list[Span]]:
    """Yield the spans of each document, in order and without overlaps. begins: int [documents + 1]."""
    place, total = 0, len(found)
    for begin, end in itertools.pairwise(begins):
        spans, done = [], begin
        while place < total and found[place][0] < end:
            start, minus_end, type, value = found[place]
            if start >= done:
                spans.append(Span(start - begin, -minus_end - begin, type, value))
                done = -minus_end
            place += 1
        yield spans


def _make_room(memory: dict) -> None:
    if len(memory) >= _REMEMBERED:
        memory.clear()
