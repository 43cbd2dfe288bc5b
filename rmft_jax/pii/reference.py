"""Masking in plain Python, str -> str: slow, obvious, and what the device path is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rmft_jax.pii.spans import Span
from rmft_jax.pii.types import TYPES, components


def mask_text(
    text: str,
    spans: Sequence[Span],
    ranks: Sequence[int],
    draw_anchor: Callable[[int, int], int],
    draw_word: Callable[[int, int, int], str],
) -> list[str]:
    """Replace every span of rank >= 1 but for its anchor (RMFT, arXiv 2512.03310).

    Args:
      spans, ranks: the PII of the text and how many occurrences of the same value the corpus has before each.
      draw_anchor(span, n): which of n anchor classes stays in span number `span`.
      draw_word(span, index, kind): the replacement of component `index` of that span.

    Returns: the masked text, cut at the borders of components; join it to read it.
    """
    out, done = [], 0
    for number, (span, rank) in enumerate(zip(spans, ranks, strict=True)):
        type = TYPES[span.type]
        first_kind = 1 + sum(len(earlier.kinds) for earlier in TYPES[: span.type])
        anchor = draw_anchor(number, type.anchors) if type.anchors else -1
        out.append(text[done : span.start])
        for index, component in enumerate(components(text, span)):
            is_anchor = component.kind > 0 and anchor >= 0 and type.anchor_classes[component.kind - first_kind] == anchor
            if rank == 0 or component.kind == 0 or is_anchor:
                out.append(text[component.start : component.end])
            else:
                out.append(draw_word(number, index, component.kind))
        done = span.end
    out.append(text[done:])
    return out
