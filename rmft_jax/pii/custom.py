"""PII types of the user's own, from `pii.custom`: a pattern or a list of words, with a checksum if there is one."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from rstr import Rstr

from rmft_jax.config import CustomPiiConfig
from rmft_jax.errors import UserError
from rmft_jax.pii.checksums import luhn_sum, mod97
from rmft_jax.pii.spans import PiiType
from rmft_jax.pii.words import words

_DRAWS = 100_000  # strings drawn from a pattern, to find those of one length and with the right checksum
_ENOUGH = 500

CHECKSUMS: dict[str, Callable[[str], bool]] = {
    "none": lambda written: True,
    "luhn": lambda written: written.isdecimal() and written.isascii() and luhn_sum(written) == 0,
    "mod97": lambda written: written.isalnum() and written.isascii() and mod97(written) == 1,
}


def make(config: CustomPiiConfig) -> PiiType:
    """Return the type. Surrogates of a pattern match it, have the checksum, and are as long as the value if they can be.

    Surrogates of a word list are English words. Raises UserError when the list cannot be read or is empty.
    """
    if config.words:
        return PiiType(
            name=config.name,
            scan=_word_search(config),
            form=lambda written: "words",
            surrogates=lambda form: words(),
            normalise=lambda written: " ".join(written.lower().split()),
        )
    pattern = re.compile(config.pattern)
    has_checksum = CHECKSUMS[config.checksum]

    def is_value(written: str) -> bool:
        return bool(written) and has_checksum(_bare(written))

    # By `re` over the whole text: what somebody else wrote may mean something else to another engine, or cross lines.
    return PiiType(
        name=config.name,
        scan=lambda text: (match.span() for match in pattern.finditer(text) if is_value(match[0])),
        form=lambda written: f"length {len(written)}",
        surrogates=lambda form: _drawn(pattern, is_value, int(form.split()[1])),
        normalise=_bare,
    )


def _bare(written: str) -> str:
    return re.sub(r"[\W_]", "", written).lower() or written


def _drawn(pattern: re.Pattern, is_value: Callable[[str], bool], length: int) -> list[str]:
    rng = Rstr(random.Random(f"{pattern.pattern} {length}"))
    fitting: dict[str, None] = {}
    others: dict[str, None] = {}
    for _ in range(_DRAWS):
        drawn = rng.xeger(pattern)
        if pattern.fullmatch(drawn) and is_value(drawn):
            (fitting if len(drawn) == length else others)[drawn] = None
            if len(fitting) >= _ENOUGH:
                break
    return list(fitting) or sorted(others, key=lambda text: abs(len(text) - length))[:_ENOUGH]


def _word_search(config: CustomPiiConfig) -> Callable[[str], Iterator[tuple[int, int]]]:
    """Return a search for the entries of a word list as whole words, in any case; the longest entry wins."""
    try:
        lines = Path(config.words).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"pii.custom {config.name}: words: {config.words} cannot be read ({reason}): check it") from None
    entries: dict[str, list[str]] = {}
    for entry in sorted({line.strip().lower() for line in lines if line.strip()}, key=lambda entry: (-len(entry), entry)):
        if first := re.search(r"\w+", entry):
            entries.setdefault(first[0], []).append(entry[first.start() :])
    if not entries:
        raise UserError(f"pii.custom {config.name}: words {config.words} holds no word: give one a line")

    def scan(text: str) -> Iterator[tuple[int, int]]:
        for word in re.finditer(r"\w+", text):
            for entry in entries.get(word[0].lower(), ()):
                end = word.start() + len(entry)
                if text[word.start() : end].lower() == entry and not re.match(r"\w", text[end : end + 1]):
                    yield word.start(), end
                    break

    return scan
