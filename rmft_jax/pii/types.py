"""The PII types and what each must say of itself. Adding a type: write its module and list it in TYPES."""

from __future__ import annotations

import hashlib
import hmac
import re
import zlib
from collections.abc import Iterable

import numpy as np

from rmft_jax.pii.email import EMAIL
from rmft_jax.pii.spans import Component, PiiType, Span

TYPES: tuple[PiiType, ...] = (EMAIL,)
KINDS: tuple[str, ...] = ("literal",) + tuple(kind for type in TYPES for kind in type.kinds)


def detect(text: str, types: Iterable[str] = ("email",), ignore: frozenset[str] = frozenset()) -> list[Span]:
    """Find the PII in a text, in order and without overlaps (the earlier start wins, then the longer span).

    ignore: normalised values that are nobody's. Offsets count code points.
    """
    wanted = set(types)
    spans = [
        Span(start, end, number, value)
        for number, type in enumerate(TYPES)
        if type.name in wanted
        for start, end in type.find(text)
        if (value := type.normalise(text[start:end])) not in ignore
    ]
    spans.sort(key=lambda span: (span.start, -span.end))
    kept: list[Span] = []
    for span in spans:
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def components(text: str, span: Span) -> list[Component]:
    """Cut a span into components that cover it without gaps; kinds are numbered as in KINDS, 0 = literal."""
    type = TYPES[span.type]
    return [
        Component(span.start + start, span.start + end, KINDS.index(kind) if kind else 0)
        for start, end, kind in type.split(text[span.start : span.end])
    ]


def anchor_tables() -> tuple[np.ndarray, np.ndarray]:
    """Return anchor_class int32 [kinds] and anchors int32 [types], as SurrogateBank holds them."""
    classes = [-1] + [anchor for type in TYPES for anchor in type.anchor_classes or (-1,) * len(type.kinds)]
    anchors = [type.anchors for type in TYPES]
    return np.array(classes, np.int32), np.array(anchors, np.int32)


def shape(value: str) -> str:
    """Return the outline of a value, for logs: letters become x, digits 0 (`xxxx.xxxxx@xxxxx.xxx`)."""
    return re.sub(r"\d", "0", re.sub(r"[^\W\d_]", "x", value))


def keyed_hash(value: str, key: bytes) -> str:
    """Return 16 hex digits of HMAC-SHA256: equal values meet, and without the key nobody can try out addresses."""
    return hmac.new(key, value.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:16]


def component_value(text: str) -> int:
    """Return a hash of a component's text in lower case, as an int32: what two components of equal text share."""
    value = zlib.crc32(text.lower().encode("utf-8", "surrogatepass"))
    return value - 2**32 if value >= 2**31 else value
