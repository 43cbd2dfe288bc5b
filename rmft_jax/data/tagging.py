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
        """Encode documents, given their spans. A value is encoded once, however often it stands there."""
        texts: list[str] = []  # of each document: what stands before, between and after its spans
        numbers: dict[int, int] = {}
        known: list[Components] = []
        which: list[int] = []  # of each span: the number of its components among the known ones
        for text, found in documents:
            done = 0
            for span in found:
                components = detector.components(text, span)
                which.append(numbers.setdefault(id(components), len(known)))
                if which[-1] == len(known):
                    known.append(components)
                texts.append(text[done : span.start])
                done = span.end
            texts.append(text[done:])
        counts = np.array([len(found) for _, found in documents], np.int64)
        tagged = _interleave(
            tokenizer, tokenizer.encode_flat(texts), known, np.array(which, np.int64), counts, np.arange(len(counts))
        )
        return cls(**tagged, span_type=np.array([span.type for _, found in documents for span in found], np.int32))

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


def _interleave(
    tokenizer: Tokenizer,
    texts: tuple[np.ndarray, np.ndarray],
    known: Sequence[Components],
    which: np.ndarray,
    spans: np.ndarray,
    document: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return the fields of `Tagged` but span_type: each document is a text, then a span and a text as often as it has spans.

    texts: (ids, their numbers) of all texts. which: int64 [spans], the known components of each. spans: int64 [documents],
    how many each has; document: its number.
    """
    parts = tokenizer.encode_flat([text for components in known for text in components.texts])
    part_ends, own_parts = _borders(parts[1]), np.array([len(components.kinds) for components in known], np.int64)
    first_part = _borders(own_parts)
    # a chunk is a text or a span; where it stands among all chunks
    text_at = 2 * np.arange(len(texts[1])) - np.repeat(document, spans + 1)
    span_at = 2 * np.arange(len(which)) + np.repeat(document, spans) + 1
    begins, sizes = np.empty(len(text_at) + len(span_at), np.int64), np.empty(len(text_at) + len(span_at), np.int64)
    begins[text_at], sizes[text_at] = _borders(texts[1])[:-1], texts[1]
    begins[span_at] = len(texts[0]) + part_ends[first_part[which]]
    sizes[span_at] = part_ends[first_part[which + 1]] - part_ends[first_part[which]]
    ends = _borders(sizes)
    lengths = np.diff(ends[_borders(2 * spans + 1)])
    out = ends[:-1] + 2 * np.repeat(document, 2 * spans + 1) + 1
    tokens, within = np.empty(ends[-1] + 2 * len(spans), np.int32), _within(sizes)
    tokens[np.repeat(out, sizes) + within] = np.concatenate([texts[0], parts[0]])[np.repeat(begins, sizes) + within]
    first_token = _borders(lengths + 2)[:-1]
    tokens[first_token], tokens[first_token + lengths + 1] = tokenizer.bos_id, tokenizer.eos_id
    of_span = own_parts[which]
    index = _within(of_span)
    part = np.repeat(first_part[which], of_span) + index  # of each component
    begin = out[span_at] - np.repeat(first_token, spans) - part_ends[first_part[which]]
    flat = lambda name: np.array([x for components in known for x in getattr(components, name)], np.int32)  # noqa: E731
    return {
        "tokens": tokens,
        "component_begin": (np.repeat(begin, of_span) + part_ends[part]).astype(np.int32),
        "component_size": parts[1][part].astype(np.int32),
        "component_kind": flat("kinds")[part],
        "component_span": np.repeat(_within(spans), of_span).astype(np.int32),
        "component_index": index.astype(np.int32),
        "component_value": flat("values")[part],
        "document_tokens": lengths + 2,
        "document_components": np.diff(_borders(of_span)[_borders(spans)]),
        "document_spans": spans,
    }


def _borders(sizes: np.ndarray) -> np.ndarray:
    """Return where groups of these sizes begin, and where the last one ends, int64 [groups + 1]."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _within(sizes: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... within each of the groups of these sizes, int64 [sum of sizes]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
