"""Turn documents and their PII spans into token ids with small integer arrays: the form in which they are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rmft_jax.data.tokenizer import Tokenizer
from rmft_jax.pii.detector import Detector
from rmft_jax.pii.spans import Span

# The fields of one tagged document; the comment gives what their first axis counts.
FIELDS = {
    "tokens": np.int32,  # tokens
    "component": np.int32,  # tokens; 0 = plain text, else 1 + index into the component fields
    "component_kind": np.int32,  # components
    "component_span": np.int32,  # components; index into the span fields
    "component_index": np.int32,  # components; position within the span
    "component_value": np.int32,  # components; hash of the text in lower case
    "span_type": np.int32,  # spans
    "span_identity": np.int32,  # spans; -1 = a value that the training documents do not have
    "span_rank": np.int32,  # spans; occurrences of the same value before this one
    "span_id": np.int32,  # spans; number of the occurrence in the corpus
}


@dataclass
class Identities:
    """Numbers every distinct PII value and every occurrence, in the order of the corpus."""

    index: dict[str, int]
    counts: list[int]
    occurrences: int = 0

    @classmethod
    def empty(cls) -> Identities:
        """Return an index with nothing in it."""
        return cls({}, [])

    def add(self, spans: Sequence[Span]) -> dict[str, list[int]]:
        """Count the spans of the next training document; return their identity, rank and id."""
        identity, rank, ids = [], [], []
        for span in spans:
            number = self.index.setdefault(span.value, len(self.index))
            if number == len(self.counts):
                self.counts.append(0)
            identity.append(number)
            rank.append(self.counts[number])
            ids.append(self.occurrences)
            self.counts[number] += 1
            self.occurrences += 1
        return {"span_identity": identity, "span_rank": rank, "span_id": ids}

    def look_up(self, spans: Sequence[Span]) -> dict[str, list[int]]:
        """Return the same fields for a held-out document, without counting it."""
        known = [self.index.get(span.value, -1) for span in spans]
        return {"span_identity": known, "span_rank": [0] * len(spans), "span_id": [0] * len(spans)}


def tag(
    documents: Iterable[tuple[str, Sequence[Span]]],
    numbering: Iterable[dict[str, list[int]]],
    tokenizer: Tokenizer,
    detector: Detector,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the FIELDS of each document. Component borders are token borders; the text stands between the
    tokenizer's bos_id and eos_id.

    detector: what has found the spans, and numbers the kinds of their components.
    """
    for (text, spans), numbers in zip(documents, numbering, strict=True):
        parts: list[str] = []
        owner: list[int] = []  # component number of each part, 0 = plain text
        kinds: list[int] = []
        span_of: list[int] = []
        index_in: list[int] = []
        values: list[int] = []
        done = 0
        for number, span in enumerate(spans):
            parts.append(text[done : span.start])
            owner.append(0)
            components = detector.components(text, span)
            count = len(components.kinds)
            parts += components.texts
            owner += range(len(kinds) + 1, len(kinds) + 1 + count)
            kinds += components.kinds
            values += components.values
            span_of += [number] * count
            index_in += range(count)
            done = span.end
        parts.append(text[done:])
        owner.append(0)
        ids = tokenizer.encode(parts)
        lengths = [1] + [len(part) for part in ids] + [1]
        record = {
            "tokens": [tokenizer.bos_id, *(id for part in ids for id in part), tokenizer.eos_id],
            "component": np.repeat([0, *owner, 0], lengths),
            "component_kind": kinds,
            "component_span": span_of,
            "component_index": index_in,
            "component_value": values,
            "span_type": [span.type for span in spans],
            **numbers,
        }
        yield {name: np.asarray(record[name], dtype) for name, dtype in FIELDS.items()}
