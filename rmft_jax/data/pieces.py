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
    wanted = {value.lower() for value in values if len(value) >= _LEAST}
    sizes = sorted({len(value) for value in wanted})
    found = []
    for id, size in enumerate(tokenizer.byte_lengths()):
        if size < _LEAST:
            continue
        piece = tokenizer.decode([id]).lower()
        if any(piece[at : at + n] in wanted for n in sizes if n <= len(piece) for at in range(len(piece) - n + 1)):
            found.append(id)
    return found
