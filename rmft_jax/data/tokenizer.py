"""Text to token ids and back without loss: what both kinds of tokenizers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rmft_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.errors import UserError

# What a tokenizer must give back: parts of documents, each encoded on its own.
_PROBE = (
    "From:  Jane", " ", "jane", ".", "doe", "@", "mail", ".", "COM", "\r\n\r\n\tThere's ", "1,234.50",
    " for  'the' <s> x</s>", " <|endoftext|> naïve café", " e\u0301 \u212b ﬁ ½ ① ² \uff21",
    " 中文，日本語 \U0001f642 \u00a0\u200b", "--- ", "\n", "  \n end  ",
)  # fmt: skip


class Tokenizer(Protocol):
    """Ids of a text and the text of ids, exactly.

    file: where prepared data keep it, relative to their folder. model: the serialised tokenizer.
    vocab_size: number of ids, that of the rows of an embedding.
    bos_id, eos_id: stand before and after every document, and may be the same.
    """

    file: str
    model: bytes
    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each string on its own, exactly as it stands: no token crosses from one into the next."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode each string on its own: the ids of all, int32 [ids], and how many each has, int64 [texts]."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; special ones are left out, broken UTF-8 becomes U+FFFD."""

    def byte_lengths(self) -> list[int]:
        """Return how many UTF-8 bytes each id stands for (0 for special ones)."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder / file)` needs."""

    def transformers_files(self) -> dict[str, bytes]:
        """Return the files, by name, that `transformers.AutoTokenizer.from_pretrained` reads from a folder."""

    def pieces_apart(self) -> list[str]:
        """Return the strings that are found before others are looked for, between spaces."""

    def changes_by(self, text: str) -> str:
        """Say which part of the tokenizer changes `text`."""


def tokenizer_path(directory: Path) -> Path:
    """Return where prepared data keep their tokenizer."""
    path = directory / HuggingFaceTokenizer.file
    return path if path.exists() else directory / SentencePieceTokenizer.file


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a SentencePiece model or, where the name ends in .json, a tokenizer.json of Hugging Face.

    path: the file, or a folder with tokenizer.json or tokenizer.model. Raises UserError when it cannot be read, or when it
    does not give back the text that it was given.
    """
    if path.is_dir():
        path = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), path)
    kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    return lossless(kind.load(path), str(path))


def lossless(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """Return the tokenizer if it gives back the text that it was given, in parts. Raises UserError naming `where` if not."""
    parts = [*_PROBE, *tokenizer.pieces_apart()]
    text = tokenizer.decode([id for part in tokenizer.encode(parts) for id in part])
    if text != "".join(parts):
        before, after = _first_difference("".join(parts), text)
        raise UserError(
            f"tokenizer {where} does not keep text as it is: {before!r} comes back as {after!r}, through "
            f"{tokenizer.changes_by(''.join(parts))}: take one without loss, such as byte-level BPE"
        )
    return tokenizer


def _first_difference(one: str, other: str) -> tuple[str, str]:
    """Return the surroundings of the first place at which two strings differ, in both."""
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[max(0, same - 4) : same + 4], other[max(0, same - 4) : same + 4]
