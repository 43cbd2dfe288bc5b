"""Strings that look like given ones and are none of them: a Markov chain over letters."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

_CONTEXT = 3  # letters that the next one depends on
_TRIES = 50  # for one string, until it is given up


def look_alikes(texts: Sequence[str], count: int, seed: int, *, never: Iterable[str]) -> list[str]:
    """Return up to `count` strings drawn from a Markov chain over the letters of `texts`.

    Every letter depends on the three before it; the start and the end of a string count as letters. A draw that is one of
    `texts` or of `never`, or longer than all of `texts`, is thrown away; fewer strings come back when nearly all are.

    Args:
      texts: repeated ones count so many times. seed: the same seed gives the same strings.
    Source: Shannon 1948, "A Mathematical Theory of Communication", section 3: series of approximations to English.
    """
    follows: dict[str, list[str]] = {}
    for text in texts:
        context = ""
        for letter in [*text, ""]:  # "" ends a string
            follows.setdefault(context, []).append(letter)
            context = (context + letter)[-_CONTEXT:]
    known, longest = {*texts, *never}, max(map(len, texts), default=0)
    rng = random.Random(seed)

    def draw() -> str:
        text = ""
        while len(text) <= longest and (letter := rng.choice(follows[text[-_CONTEXT:]])):
            text += letter
        return text

    out = []
    for _ in range(count if texts else 0):
        fitting = (text for _ in range(_TRIES) if (text := draw()) not in known and len(text) <= longest)
        if text := next(fitting, ""):
            out.append(text)
    return out
