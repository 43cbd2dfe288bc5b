"""Turn documents and their PII spans into token ids with small integer arrays: the form in which they are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rmft_jax.data.tokenizer import Tokenizer
from rmft_jax.pii.detector import Detector
from rmft_jax.pii.spans import Components, Span

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
    fields = Tagged.of(list(documents), tokenizer, detector).fields()
    ends = {name: np.cumsum(counts) for name, (_, counts) in fields.items()}
    for number, numbers in enumerate(numbering):
        record = {
            name: values[ends[name][number] - counts[number] : ends[name][number]]
            for name, (values, counts) in fields.items()
        }
        yield {name: np.asarray({**record, **numbers}[name], dtype) for name, dtype in FIELDS.items()}


@dataclass
class Tagged:
    """Tagged documents one after the other, without what the rest of the corpus decides: identities, ranks, ids.

    document_*: int64 [documents], how many tokens, components and spans each has.
    component_begin, component_size: int32 [components], which tokens of its document a component has; the others as in
    FIELDS, int32.
    """

    tokens: np.ndarray
    component_begin: np.ndarray
    component_size: np.ndarray
    component_kind: np.ndarray
    component_span: np.ndarray
    component_index: np.ndarray
    component_value: np.ndarray
    span_type: np.ndarray
    document_tokens: np.ndarray
    document_components: np.ndarray
    document_spans: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[tuple[str, Sequence[Span]]], tokenizer: Tokenizer, detector: Detector) -> Tagged:
        """Encode documents, given their spans."""
        parts: list[str] = []  # of all documents: text, the components of a span, text, ..., text
        spans: list[tuple[int, Components]] = []  # of each span: the number of its first part, its components
        ends: list[int] = []
        for text, found in documents:
            done = 0
            for span in found:
                components = detector.components(text, span)
                parts.append(text[done : span.start])
                spans.append((len(parts), components))
                parts += components.texts
                done = span.end
            parts.append(text[done:])
            ends.append(len(parts))
        types = [span.type for _, found in documents for span in found]
        counts = np.array([len(found) for _, found in documents], np.int64)
        return cls._of_parts(tokenizer, *tokenizer.encode_flat(parts), np.array(ends, np.int64), spans, types, counts)

    @classmethod
    def _of_parts(cls, tokenizer, ids, sizes, ends, spans, types, document_spans) -> Tagged:
        first, components = [first for first, _ in spans], [components for _, components in spans]
        of_span = np.array([len(found.kinds) for found in components], np.int64)
        index = _within(of_span)
        part = np.repeat(np.array(first, np.int64), of_span) + index  # of each component
        borders = np.concatenate([[0], np.cumsum(sizes)])
        begins = borders[np.concatenate([[0], ends[:-1]])] if len(ends) else ends
        lengths = np.diff(borders[np.concatenate([[0], ends])])
        tokens = np.empty(len(ids) + 2 * len(ends), np.int32)
        first_token = np.cumsum(lengths + 2) - lengths - 2
        tokens[np.arange(len(ids)) + np.repeat(2 * np.arange(len(ends)) + 1, lengths)] = ids
        tokens[first_token], tokens[first_token + lengths + 1] = tokenizer.bos_id, tokenizer.eos_id
        span_document = np.repeat(np.arange(len(ends)), document_spans)
        document = np.repeat(span_document, of_span)
        flat = lambda name: np.array([x for found in components for x in getattr(found, name)], np.int32)  # noqa: E731
        return cls(
            tokens=tokens,
            component_begin=(borders[part] - begins[document] + 1).astype(np.int32),
            component_size=sizes[part].astype(np.int32),
            component_kind=flat("kinds"),
            component_span=np.repeat(_within(document_spans), of_span).astype(np.int32),
            component_index=index.astype(np.int32),
            component_value=flat("values"),
            span_type=np.array(types, np.int32),
            document_tokens=lengths + 2,
            document_components=np.bincount(document, minlength=len(ends)),
            document_spans=document_spans,
        )

    @classmethod
    def join(cls, parts: Sequence[Tagged]) -> Tagged:
        """Return the documents of all parts as one."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def fields(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return FIELDS but for those of the corpus, (all values, how many each document has)."""
        first_token = np.cumsum(self.document_tokens) - self.document_tokens
        begin = np.repeat(first_token, self.document_components) + self.component_begin
        component = np.zeros(len(self.tokens), np.int32)
        sizes = self.component_size.astype(np.int64)
        numbers = 1 + _within(self.document_components)
        component[np.repeat(begin, sizes) + _within(sizes)] = np.repeat(numbers, sizes)
        out = {"tokens": (self.tokens, self.document_tokens), "component": (component, self.document_tokens)}
        for name in ("component_kind", "component_span", "component_index", "component_value"):
            out[name] = getattr(self, name), self.document_components
        return out | {"span_type": (self.span_type, self.document_spans)}


def _within(sizes: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... within each of the groups of these sizes, int64 [sum of sizes]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
