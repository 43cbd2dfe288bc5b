"""What a span, a component and a PII type are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rmft_jax.pii.values import outline


class Span(NamedTuple):
    """A PII occurrence: code-point offsets, the type's number, and the normalised value that makes its identity."""

    start: int
    end: int
    type: int
    value: str


class Components(NamedTuple):
    """The parts of a span, which cover it without gaps: texts, kinds (0 = literal text), and hashes of the texts."""

    texts: tuple[str, ...]
    kinds: tuple[int, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class PiiType:
    """One type of personal data: how a value is found, what it consists of, and what can stand for it.

    surrogates: kind -> replacement strings, the same ones whenever it is called; as many as it likes, of which those that
        the corpus has are left out.
    split: value as written -> (start, end, kind) of its components, which cover it whole. None = one component, the value,
        whose kind is `form(value)`, never "": what surrogates have in common with it, such as the places of digits.
    normalise: value as written -> value that two occurrences of one identity share.
    anchor_classes: kind -> which anchor it belongs to, from 0 on; none = the type has no anchors.
    recombines: kinds for which the components of other values may stand in.

    A value is found in one of two ways:
    pattern: a regular expression within the RE2 subset that matches ASCII characters only and no line break, searched for
        line by line. With `alphabet` and `inside`, it is searched for in the runs of characters of this alphabet that have
        the character `inside`; every match must lie in one.
    check: (line, start, end) of a match -> (start, end) of the value, or None if it is none; without it, all are.
    scan: text -> (start, end) of each value, for what no such pattern can say.
    """

    name: str
    surrogates: Callable[[str], Iterable[str]]
    split: Callable[[str], Iterable[tuple[int, int, str]]] | None = None
    form: Callable[[str], str] = outline
    normalise: Callable[[str], str] = str.lower
    anchor_classes: Mapping[str, int] = field(default_factory=dict)
    recombines: tuple[str, ...] = ()
    pattern: str = ""
    alphabet: str = ""
    inside: str = ""
    check: Callable[[str, int, int], tuple[int, int] | None] | None = None
    scan: Callable[[str], Iterable[tuple[int, int]]] | None = None

    @property
    def anchors(self) -> int:
        """Return the number of anchor classes."""
        return len(set(self.anchor_classes.values()))

    @property
    def placeholder(self) -> str:
        """Return what redaction writes in the place of a value, such as [EMAIL]."""
        return f"[{self.name.upper()}]"

    def parts(self, value: str) -> list[tuple[int, int, str]]:
        """Return (start, end, kind) of the components of a value as written."""
        return list(self.split(value)) if self.split else [(0, len(value), self.form(value))]
