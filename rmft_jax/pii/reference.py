"""Masking in plain Python, str -> str: slow, obvious, and what the device path is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rmft_jax.pii.detector import Detector
from rmft_jax.pii.spans import Span


def mask_text(
    text: str,
    spans: Sequence[Span],
    ranks: Sequence[int],
    detector: Detector,
    draw_anchor: Callable[[int, int], int],
    draw_word: Callable[[int, int, int], str],
) -> list[str]:
    """Replace every span of rank >= 1 but for its anchor (RMFT, arXiv 2512.03310).

    Args:
      spans, ranks: the PII of the text and how many occurrences of the same value the corpus has before each.
      detector: what has found them.
      draw_anchor(span, n): which of n anchor classes stays in span number `span`.
      draw_word(span, index, kind): the replacement of component `index` of that span.

    Returns: the masked text, cut at the borders of components; join it to read it.
    """
    out, done = [], 0
    for number, (span, rank) in enumerate(zip(spans, ranks, strict=True)):
        type = detector.types[span.type]
        anchor = draw_anchor(number, type.anchors) if type.anchors else -1
        out.append(text[done : span.start])
        components = detector.components(text, span)
        for index, (written, kind) in enumerate(zip(components.texts, components.kinds, strict=True)):
            name = detector.kinds.names[kind - 1][1] if kind else ""
            is_anchor = type.anchor_classes.get(name, -1) == anchor >= 0
            keeps = rank == 0 or kind == 0 or is_anchor
            out.append(written if keeps else draw_word(number, index, kind))
        done = span.end
    out.append(text[done:])
    return out
