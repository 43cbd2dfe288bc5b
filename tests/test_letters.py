"""Strings that look like given ones and are none of them."""

import collections
import random

from rmft_jax.data.synthetic_words import FIRST, LAST
from rmft_jax.pii.letters import look_alikes

NAMES = sorted({name.lower() for name in (*FIRST, *LAST)})


def test_look_alikes_are_made_of_the_same_runs_of_letters_and_are_none_of_the_texts():
    never = look_alikes(NAMES, 50, 1, never=())
    found = look_alikes(NAMES, 300, 0, never=never)
    assert len(found) > 250 and len(set(found)) > 100
    assert not set(found) & {*NAMES, *never}
    runs = {f"^{name}$"[i : i + 4] for name in NAMES for i in range(len(name))}
    assert all(f"^{text}$"[i : i + 4] in runs for text in found for i in range(len(text)))
    assert max(map(len, found)) <= max(map(len, NAMES))
    assert found == look_alikes(NAMES, 300, 0, never=never) != look_alikes(NAMES, 300, 1, never=never)


def test_letters_come_as_often_as_in_the_texts():
    rng = random.Random(3)
    wide = ["".join(rng.choices("abcd", (4, 2, 1, 1), k=12)) for _ in range(3000)]
    letters = collections.Counter("".join(look_alikes(wide, 3000, 0, never=())))
    shares = [letters[letter] / letters.total() for letter in "abcd"]
    assert all(abs(share - true) < 0.02 for share, true in zip(shares, (0.5, 0.25, 0.125, 0.125), strict=True))


def test_nothing_comes_from_nothing():
    assert look_alikes([], 5, 0, never=()) == [] and look_alikes(["a"], 5, 0, never=()) == []
