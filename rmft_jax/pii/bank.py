"""The surrogate bank: replacement strings, tokenised once."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from rmft_jax.errors import UserError
from rmft_jax.kernels import SurrogateBank, span_values
from rmft_jax.pii.detector import Detector
from rmft_jax.pii.kinds import Kinds
from rmft_jax.pii.letters import look_alikes
from rmft_jax.pii.spans import PiiType
from rmft_jax.pii.values import component_value

_PIECES = 4  # tokens of an invented part of a value at most, which keeps it from crowding text out of its block
_REAL_PIECES = 8  # names are cut into more tokens than words
_WHOLE_PIECES = 64  # a whole value has the form of what it stands for, and so about its length
_TRIES = 50  # for one string, until it is given up
_FEW = 1000  # a stock of fewer strings is a closed set, such as top-level domains

_span_values = jax.jit(span_values, static_argnames="spans")
Encode = Callable[[list[str]], list[list[int]]]


def build_bank(
    encode: Encode,
    values: Iterable[Sequence[tuple[str, int]]],
    detector: Detector,
    *,
    rows: int,
    seed: int,
    also: Iterable[tuple[str, int]] = (),
    real: np.ndarray | None = None,
) -> SurrogateBank:
    """Tokenise the surrogates of every kind.

    Four sorts of tables. Invented: the stock of a kind without what the corpus has, so that no combination of surrogates
    and an anchor is a real value, except where a kind's whole stock is real (the common TLDs). Recombined: the corpus' own
    components, each once for every value that has it, so that surrogates have the corpus' own distribution; in one that a
    single value has, digits are drawn anew, which tell people apart and teach no language. Look-alike: the same, but a
    component that one value alone has, which may be as good as that value, gives way to a string that looks like such
    components and is none. Placeholders: one row a type, and an empty one.

    Args:
      encode: strings -> token ids, each string as it is encoded in the middle of a line.
      values: the components of each PII value of the corpus in order, (text as written, kind), literal text as kind 0.
      detector: what has found the values and cut them into components: its types, and the kinds that the corpus has.
      rows: surrogates of each kind at most; seed: which ones.
      also, real: of a corpus of which `values` is a sample, those components of all values that are `in_stock`, and the
        `real_values` of all.

    Returns: a SurrogateBank of numpy arrays.

    Raises UserError when no surrogate of a kind is left.
    """
    types, kinds = detector.types, detector.kinds
    values = [list(parts) for parts in values]
    taken: dict[int, list[str]] = {}
    for parts in (*values, also):
        for text, kind in parts:
            taken.setdefault(kind, []).append(text)
    tables = [_Table([""], [[]])]
    for number, (type, kind) in enumerate(kinds.names, 1):
        tables.append(_invented(encode, types[type], kind, _reals_like(number, kinds, types, taken), rows, seed))
    of_stock = {}
    for stock, texts in _real_stocks(values, seed).items():
        of_stock[stock] = list(range(len(kinds.names) + 1))
        for number, (type, kind) in enumerate(kinds.names, 1):
            if kind in types[type].recombines:
                table = _table(sorted(texts.get(number, ())), encode, _REAL_PIECES, rows, seed)
                if table.entries:
                    of_stock[stock][number] = len(tables)
                    tables.append(table)
    placeholder = len(tables) + np.arange(len(types), dtype=np.int32)
    tables += [_Table([type.placeholder], encode([type.placeholder])) for type in types]
    tables.append(_Table([""], [[]]))
    classes = [-1, *(types[type].anchor_classes.get(kind, -1) for type, kind in kinds.names)]
    texts = [text for table in tables for text in table.texts]
    entries = [ids for table in tables for ids in table.entries]
    counts = np.array([len(table.entries) for table in tables], np.int32)
    lengths = np.array([len(ids) for ids in entries], np.int32)
    return SurrogateBank(
        tokens=np.array([id for ids in entries for id in ids], np.int32),
        begins=(np.cumsum(lengths) - lengths).astype(np.int32),
        lengths=lengths,
        first=(np.cumsum(counts) - counts).astype(np.int32),
        counts=counts,
        anchor_class=np.pad(np.array(classes, np.int32), (0, len(tables) - len(classes)), constant_values=-1),
        anchors=np.array([type.anchors for type in types], np.int32),
        placeholder=placeholder,
        empty=np.int32(len(tables) - 1),
        **{
            stock: np.array([*numbers, *range(len(numbers), len(tables))], np.int32) for stock, numbers in of_stock.items()
        },
        values=np.array([component_value(text) for text in texts], np.int32),
        real=_real(values) if real is None else real,
    )


def join_banks(
    banks: Sequence[SurrogateBank], names: Sequence[Sequence[str]], real: Sequence[np.ndarray], types: Sequence[PiiType]
) -> SurrogateBank:
    """Return the surrogates of several corpora as one bank: all tables of the first, then those of the second, ...

    So kind k of a corpus becomes k + the number of tables before its own. Recombined and look-alike strings stay those of
    each corpus. Invented ones go where another corpus has them as a component, except where a kind's whole stock is real. A
    real value of one is a real value for all.

    Args:
      banks, names: of each corpus; the latter "TYPE KIND" of its kinds from 1 on.
      real: of each corpus the `component_value` of its components, int [any].
      types: those of all corpora, numbered alike.

    Returns: a SurrogateBank of numpy arrays.

    Raises UserError when no surrogate of a kind is left.
    """
    by_name = {type.name: type for type in types}
    tables, pieces = (np.cumsum([0, *map(len, of_banks)]).tolist() for of_banks in
                      ([bank.counts for bank in banks], [bank.tokens for bank in banks]))  # fmt: skip
    every = lambda field: np.concatenate([getattr(bank, field) for bank in banks])  # noqa: E731
    moved = lambda field, by: np.concatenate([getattr(bank, field) + n for bank, n in zip(banks, by, strict=False)])  # noqa: E731
    counts, values = every("counts"), every("values")
    ends, keep = np.cumsum(counts), np.ones(len(values), bool)
    for corpus, kinds in enumerate(names):
        others = np.unique(np.concatenate([np.zeros(0, np.int32), *real[:corpus], *real[corpus + 1 :]]))
        for number, (type, _, kind) in enumerate((name.partition(" ") for name in kinds), tables[corpus] + 1):
            if _is_closed(by_name[type], by_name[type].surrogates(kind)):
                continue
            rows = slice(ends[number] - counts[number], ends[number])
            keep[rows] = ~np.isin(values[rows], others)
            if not keep[rows].any():
                raise UserError(f"no surrogate of {type} ({kind}) is left that no corpus of training.mix has: prepare them "
                                f"with a larger masking.surrogates")  # fmt: skip
    left = np.bincount(np.repeat(np.arange(len(counts)), counts)[keep], minlength=len(counts)).astype(np.int32)
    return banks[0]._replace(
        tokens=every("tokens"),
        begins=moved("begins", pieces)[keep],
        lengths=every("lengths")[keep],
        values=values[keep],
        first=(np.cumsum(left) - left).astype(np.int32),
        counts=left,
        anchor_class=every("anchor_class"),
        recombined=moved("recombined", tables),
        look_alike=moved("look_alike", tables),
        real=np.unique(every("real")),
    )


def in_stock(detector: Detector) -> Callable[[str, int], bool]:
    """Return whether a component (text, kind) is one of those that surrogates of its kind are invented from."""
    types, names = detector.types, [None, *detector.kinds.names]

    @functools.cache
    def stock(kind: int) -> frozenset[str]:
        type, name = names[kind]
        return frozenset(map(_key(types[type]), types[type].surrogates(name)))

    return lambda text, kind: kind > 0 and _key(types[names[kind][0]])(text) in stock(kind)


def real_values(value: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return the `span_values` of values, uint32 [values]. value: int32 [components] of all; parts: int64 [values]."""
    index = np.arange(len(value)) - np.repeat(np.cumsum(parts) - parts, parts)
    span = np.repeat(np.arange(len(parts)), parts)
    room = 1 << max(10, len(value).bit_length())  # few shapes, which each are compiled
    padded = [np.pad(array.astype(np.int32), (0, room - len(value)), constant_values=fill) for array, fill in
              ((value, 0), (index, 0), (span, room - 1))]  # fmt: skip
    return np.asarray(_span_values(*padded, spans=room))[: len(parts)]


def _real_stocks(values: list[list[tuple[str, int]]], seed: int) -> dict[str, dict[int, list[str]]]:
    """Return the stocks made of the corpus' components, by name and kind; each component once for every value with it."""
    having: dict[int, list[str]] = {}
    for parts in values:
        for text, kind in parts:
            having.setdefault(kind, []).append(text.lower())
    return {
        "recombined": {kind: _without_lone_digits(texts, seed) for kind, texts in having.items()},
        "look_alike": {kind: _without_lone(texts, seed) for kind, texts in having.items()},
    }


def _without_lone_digits(texts: list[str], seed: int) -> list[str]:
    """Return the texts with other digits in those that stand there once; none of the new ones stands there too."""
    counts, rng = Counter(texts), random.Random(seed)

    def redrawn(text: str) -> str:
        if counts[text] > 1 or not any(letter.isdigit() for letter in text):
            return text
        draws = ("".join(rng.choice("0123456789") if c.isdigit() else c for c in text) for _ in range(_TRIES))
        return next((draw for draw in draws if draw not in counts), "")

    return [new for text in sorted(texts) if (new := redrawn(text))]


def _without_lone(texts: list[str], seed: int) -> list[str]:
    """Return the texts with look-alikes in the place of those that stand there once."""
    counts = Counter(texts)
    shared, alone = (sorted(text for text in texts if (counts[text] > 1) is many) for many in (True, False))
    return shared + look_alikes(alone, len(alone), seed, never=shared)


class _Table:
    """The rows of one kind: their texts and token ids."""

    def __init__(self, texts: Sequence[str], entries: Sequence[Sequence[int]]):
        self.texts, self.entries = texts, entries


def _reals_like(number: int, kinds: Kinds, types: Sequence[PiiType], real: dict[int, list[str]]) -> set[str]:
    """Return what surrogates of a kind must not be: components of its anchor class, or any whole value."""
    type, kind = kinds.names[number - 1]
    classes = types[type].anchor_classes
    alike = [
        other
        for other, (its_type, its_kind) in enumerate(kinds.names, 1)
        if its_type == type and (types[type].split is None or classes.get(its_kind, its_kind) == classes.get(kind, kind))
    ]
    key = _key(types[type])
    return {key(text) for other in alike for text in real.get(other, ())}


def _key(type: PiiType) -> Callable[[str], str]:
    return str.lower if type.split else type.normalise


def _invented(encode: Encode, type: PiiType, kind: str, real: set[str], rows: int, seed: int) -> _Table:
    stock, key = sorted(type.surrogates(kind)), _key(type)
    fresh = [text for text in stock if key(text) not in real]
    if _is_closed(type, stock):
        fresh = stock
    elif type.split and len(fresh) < _FEW:  # nearly every word is somebody's: two in one are nobody's
        rng = random.Random(seed)
        fresh = sorted({text for _ in range(5 * rows) if (text := "".join(rng.choices(stock, k=2))) not in real})
    table = _table(fresh, encode, _PIECES if type.split else _WHOLE_PIECES, rows, seed)
    if not table.entries:
        raise UserError(
            f"no surrogate of {type.name} ({kind}) is left that the corpus does not have: widen its pattern, or leave it out"
        )
    return table


def _is_closed(type: PiiType, stock: Iterable[str]) -> bool:
    """Return whether a stock is all that there is of its kind, such as the common TLDs."""
    return type.split is not None and len(list(stock)) < _FEW


def _table(stock: Iterable[str], encode: Encode, pieces: int, rows: int, seed: int) -> _Table:
    stock = list(stock)
    random.Random(seed).shuffle(stock)
    pairs = [(text, ids) for text, ids in zip(stock, encode(stock), strict=True) if len(ids) <= pieces][:rows]
    return _Table([text for text, _ in pairs], [ids for _, ids in pairs])


def _real(values: list[list[tuple[str, int]]]) -> np.ndarray:
    """Return the `span_values` of all values of the corpus, uint32 [R], sorted; at least one number."""
    if not values:
        return np.zeros(1, np.uint32)
    value = np.array([component_value(text) for parts in values for text, _ in parts], np.int32)
    return np.unique(real_values(value, np.array([len(parts) for parts in values], np.int64)))
