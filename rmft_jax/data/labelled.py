"""Labelled short texts for classification by prompts: generated reviews, or JSON lines of your own."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rmft_jax.data.sources import open_bytes
from rmft_jax.data.tokenizer import Tokenizer
from rmft_jax.errors import UserError

_ASPECTS = (
    "the food", "the service", "the view", "the price", "the staff", "the sound", "the plot", "the acting", "the screen",
    "the battery", "the room", "the bed", "the music", "the ending", "the coffee", "the location", "the fit",
    "the keyboard", "the picture", "the soup", "the pool", "the script", "the camera", "the packaging",
)  # fmt: skip
_GOOD = (
    "great", "good", "lovely", "superb", "pleasant", "excellent", "solid", "delightful", "smooth", "perfect", "fresh",
    "clever",
)  # fmt: skip
_BAD = (
    "terrible", "bad", "awful", "poor", "dreadful", "dull", "shabby", "stale", "weak", "dirty", "boring", "flimsy",
)  # fmt: skip
_FRAMES = ("{aspect} was {same}", "{aspect} was rather {same}", "I found {aspect} {same}", "{aspect} seemed {same}")
_TURNED = ("{aspect} was not {other}", "{aspect} was anything but {other}", "nobody could call {aspect} {other}")
_WORDS = {"bad": " terrible", "good": " great"}


class LabelledTexts(NamedTuple):
    """Texts to train on and to test on, with labels int32 [N]. words: what a prompt is completed with, for each label."""

    train: list[str]
    train_labels: np.ndarray
    test: list[str]
    test_labels: np.ndarray
    words: tuple[str, ...]


def load_labelled(
    source: str, *, shots: int, test: int, seed: int, path: str = "", text_field: str = "text", label_field: str = "label",
    skip_field: str = "", words: dict[str, str] | None = None,
) -> LabelledTexts:  # fmt: skip
    """Draw `shots` training texts of each label, and `test` other texts as they come.

    source: reviews (generated; labels bad and good) | jsonl (one object a line; of equal texts the first). words: label ->
    its word, with the space before it; other labels are left out. skip_field: records where this is true are left out.
    Raises UserError when the source cannot be read, or has too few texts of a label.
    """
    if source == "reviews":
        words = words or _WORDS
        pairs = generate_reviews(shots * 40 + test, seed=0)
    elif source == "jsonl":
        pairs = _read(path, text_field, label_field, skip_field)
    else:
        raise UserError(f"texts are {source!r}: choose one of reviews, jsonl")
    if not words or len(words) < 2:
        raise UserError("words need two labels or more, such as {bad: ' terrible', good: ' great'}: give each its word")
    number = {label: n for n, label in enumerate(words)}
    usable = [(text, number[label]) for text, label in dict(pairs).items() if label in number]
    usable = [usable[n] for n in np.random.default_rng(17).permutation(len(usable))]
    labels = np.array([label for _, label in usable], np.int32)
    spare = len(usable) - min(test, len(usable) - shots * len(words))  # the same texts test, whatever the seed
    rng, chosen = np.random.default_rng([seed, 17]), []
    for label, n in number.items():
        pool = np.flatnonzero(labels[: max(0, spare)] == n)
        if len(pool) < shots:
            raise UserError(f"{path or source} has {len(pool)} texts of {label!r} to train on: lower shots from {shots}")
        chosen.append(rng.permutation(pool)[:shots])
    if spare >= len(usable):
        raise UserError(f"{path or source} has no texts left to test on: lower shots from {shots}")
    train = rng.permutation(np.concatenate(chosen))
    take = lambda which: [usable[n][0] for n in which]  # noqa: E731
    rest = range(spare, len(usable))
    return LabelledTexts(take(train), labels[train], take(rest), labels[spare:], tuple(words.values()))


def word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the first token of each word, which must tell them apart. Raises UserError if it does not."""
    ids = tuple(row[0] for row in tokenizer.encode(list(words)))
    if len(set(ids)) < len(ids):
        raise UserError(f"the words {', '.join(map(repr, words))} do not begin with different tokens: choose other ones")
    return ids


def cloze_rows(
    texts: Sequence[str], template: str, tokenizer: Tokenizer, *, causal: bool, mask_id: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as tokens, int32 [N, length], padded at the right, and where the answer is looked for, int32 [N].

    template: what stands between text and answer, such as " It was". causal: the answer follows the last token, else it is
    in the place of mask_id, before a full stop. Of a text that is too long, the end is left out.
    """
    (after,) = tokenizer.encode([template])
    tail = after if causal else [*after, mask_id, *tokenizer.encode(["."])[0][:1]]
    room = length - len(tail) - 1
    if room < 1:
        raise UserError(f"the template {template!r} alone has {len(tail)} tokens: raise length from {length}")
    rows = [[tokenizer.bos_id, *ids[:room], *tail] for ids in tokenizer.encode(list(texts))]
    tokens = np.zeros((len(rows), length), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return tokens, np.array([len(row) - (1 if causal else 2) for row in rows], np.int32)


def generate_reviews(count: int, *, seed: int) -> list[tuple[str, str]]:
    """Return made-up reviews, all different, and their labels, good or bad.

    Each speaks of one to three aspects, most of them as the label says; a quarter of the statements deny the opposite.
    """
    rng = np.random.default_rng([seed, 19])
    found: dict[str, str] = {}
    while len(found) < count:
        good = bool(rng.integers(2))
        found.setdefault(_review(rng, good), "good" if good else "bad")
    return list(found.items())


def generate_unlabelled(count: int, *, seed: int, closing: float = 0.7, agreeing: float = 0.85) -> list[str]:
    """Return made-up reviews to pre-train on. A share `closing` ends with a verdict, of which a share `agreeing` is apt."""
    rng = np.random.default_rng([seed, 23])
    out = []
    for _ in range(count):
        good = bool(rng.integers(2))
        text = _review(rng, good)
        if rng.random() < closing:
            apt = good if rng.random() < agreeing else not good
            text += f" It was {rng.choice(_GOOD[:6] if apt else _BAD[:6])}."
        out.append(text)
    return out


def _review(rng: np.random.Generator, good: bool) -> str:
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.3, 0.4]))
    sides = [good] * count
    if count == 3:
        sides[int(rng.integers(3))] ^= bool(rng.random() < 0.6)
    parts = []
    for aspect, side in zip(rng.choice(_ASPECTS, count, replace=False), sides, strict=True):
        same, other = (_GOOD, _BAD) if side else (_BAD, _GOOD)
        frame = rng.choice(_TURNED if rng.random() < 0.25 else _FRAMES)
        parts.append(frame.format(aspect=aspect, same=rng.choice(same), other=rng.choice(other)))
    joint = " but ".join if len(set(sides)) > 1 else ", and ".join
    text = joint(parts) + "."
    return text[0].upper() + text[1:]


def _read(path: str, text_field: str, label_field: str, skip_field: str) -> list[tuple[str, str]]:
    if not path:
        raise UserError("texts of the kind jsonl need a path: a file with one object a line")
    try:
        with open_bytes(path) as file:
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"texts {path} cannot be read ({reason}): check the path, and that the file is whole") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not (skip_field and record.get(skip_field)):
                pairs.append((str(record[text_field]), str(record[label_field])))
        except (ValueError, KeyError, TypeError, AttributeError):
            fields = f"{text_field} and {label_field}"
            raise UserError(f"{path}:{number} is no object with {fields}: mend it, or name other fields") from None
    return pairs
