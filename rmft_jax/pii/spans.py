"""What a span, a component and a PII type are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """A PII occurrence: code-point offsets, the type's number, and the normalised value that makes its identity."""

    start: int
    end: int
    type: int
    value: str


class Component(NamedTuple):
    """A part of a span: code-point offsets in the text and the kind's number."""

    start: int
    end: int
    kind: int


@dataclass(frozen=True)
class PiiType:
    """One type of personal data.

    kinds: names of its replaceable components. anchor_classes: for each kind, which anchor it belongs to, from 0 on; () =
    the type has no anchors, all of a value is replaced.
    find: text -> (start, end) of each occurrence. normalise: the value that two occurrences of one identity share.
    split: value -> (start, end, kind or "") covering it whole; "" = literal. surrogates: kind -> replacement strings.
    recombines: kinds for which the components of other values may stand in. placeholder: what redaction writes.
    """

    name: str
    kinds: tuple[str, ...]
    find: Callable[[str], Iterable[tuple[int, int]]]
    normalise: Callable[[str], str]
    split: Callable[[str], Iterable[tuple[int, int, str]]]
    surrogates: Callable[[str], list[str]]
    anchor_classes: tuple[int, ...] = ()
    recombines: tuple[str, ...] = ()

    @property
    def anchors(self) -> int:
        """Return the number of anchor classes."""
        return len(set(self.anchor_classes))

    @property
    def placeholder(self) -> str:
        """Return what redaction writes in the place of a value, such as [EMAIL]."""
        return f"[{self.name.upper()}]"
