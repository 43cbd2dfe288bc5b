"""What a vocabulary holds: a piece that is somebody's address is memorized before training begins."""

from __future__ import annotations

from collections.abc import Iterable

from rmft_jax.data.tokenizer import Tokenizer

_LEAST = 6  # characters: shorter values are parts of ordinary words by chance


def longest_pieces(tokenizer: Tokenizer, count: int = 10) -> list[int]:
    """Return the ids of the longest pieces in bytes, the longest first."""
    lengths = tokenizer.byte_lengths()
    return sorted(range(len(lengths)), key=lambda id: -lengths[id])[:count]


def pieces_with(tokenizer: Tokenizer, values: Iterable[str]) -> list[int]:
    """Return the ids of pieces that contain a value of personal data of at least 6 characters as a whole, in any case."""
    return pieces_among(substrings(tokenizer), values)


def pieces_among(table: dict[str, list[int]], values: Iterable[str]) -> list[int]:
    """Return the same, given the `substrings` of the tokenizer."""
    return sorted({id for value in values for id in table.get(value.lower(), ())})


def substrings(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Return all strings of at least 6 characters that pieces contain, in lower case, and the ids of those pieces."""
    table: dict[str, list[int]] = {}
    for id, size in enumerate(tokenizer.byte_lengths()):
        if size < _LEAST:
            continue
        piece = tokenizer.decode([id]).lower()
        cuts = [(begin, end) for begin in range(len(piece)) for end in range(begin + _LEAST, len(piece) + 1)]
        for text in {piece[begin:end] for begin, end in cuts}:
            table.setdefault(text, []).append(id)
    return table
