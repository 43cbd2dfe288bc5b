"""Words and names that surrogates are made of. Each function returns the same list whenever it is called."""

from __future__ import annotations

import functools
import re


@functools.cache
def words() -> tuple[str, ...]:
    """Return about 6,000 common English words of 3 to 10 letters, in lower case."""
    from mimesis import Text
    from mimesis.locales import Locale

    drawn = Text(Locale.EN, seed=0).words(quantity=100_000)  # enough to meet nearly every one
    return tuple(sorted({word.lower() for word in drawn if re.fullmatch(r"[A-Za-z]{3,10}", word)}))


@functools.cache
def names() -> tuple[str, ...]:
    """Return English first names and surnames of 2 to 12 letters, with a capital."""
    from mimesis import Person
    from mimesis.locales import Locale

    person = Person(Locale.EN, seed=0)
    drawn = [draw() for draw in (person.first_name, person.last_name) for _ in range(20_000)]
    return tuple(sorted({name for name in drawn if re.fullmatch(r"[A-Z][a-z]{1,11}", name)}))
