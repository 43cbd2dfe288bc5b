"""The kinds of components that a corpus has, numbered."""

from __future__ import annotations

from collections.abc import Sequence

from rmft_jax.pii.spans import PiiType


class Kinds:
    """Numbers kinds: 0 = literal text, then those which have an anchor class, then others in the order they are asked for.

    names: (type's number, kind) of each from 1 on, as `PiiType.parts` names them.
    """

    def __init__(self, types: Sequence[PiiType]):
        self.names: list[tuple[int, str]] = []
        self._numbers: dict[tuple[int, str], int] = {}
        for number, type in enumerate(types):
            for kind in type.anchor_classes:
                self.number(number, kind)

    def number(self, type: int, kind: str) -> int:
        """Return the number of a kind, a new one if it has none."""
        if not kind:
            return 0
        if (number := self._numbers.get((type, kind))) is None:
            self.names.append((type, kind))
            number = self._numbers[type, kind] = len(self.names)
        return number
