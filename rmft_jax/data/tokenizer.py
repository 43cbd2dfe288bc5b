"""SentencePiece, trained so that no piece holds PII, and encoding that respects given borders."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from rmft_jax.config import TokenizerConfig
from rmft_jax.errors import UserError
from rmft_jax.files import write_bytes

UNKNOWN, BOS, EOS = 0, 1, 2


class Tokenizer:
    """Text to ids and back, without loss: no normalisation, no dummy prefix, unknown characters as bytes."""

    def __init__(self, model: bytes):
        """model: a serialised SentencePiece model. Raises UserError when it is not one."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError("the tokenizer file is not a SentencePiece model: run `rmft prepare` again") from None

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a model file."""
        try:
            return cls(path.read_bytes())
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read ({error.strerror}): run `rmft prepare` first") from None

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
        """Train on pieces of text from which PII has been cut out, so that no piece of the vocabulary can hold any."""
        model = io.BytesIO()
        lines = (line for text in texts for line in text.split("\n") if line)
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=lines,
                model_writer=model,
                vocab_size=config.vocab_size,
                model_type=config.model_type,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 20,
                num_threads=1,  # the result depends on the number of threads for some model types
                unk_id=UNKNOWN,
                bos_id=BOS,
                eos_id=EOS,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            if "vocab" in str(error).lower():
                raise UserError(
                    f"tokenizer.vocab_size {config.vocab_size} is more than this corpus can fill: lower it"
                ) from None
            raise
        return cls(model.getvalue())

    def save(self, path: Path) -> None:
        """Write the model file."""
        write_bytes(path, self.model)

    @property
    def vocab_size(self) -> int:
        """Return the number of ids."""
        return self._processor.GetPieceSize()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each string on its own, exactly as it stands: no token crosses from one into the next."""
        return self._processor.Encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; special ones are left out, broken UTF-8 becomes U+FFFD."""
        return self._processor.Decode([int(id) for id in ids])

    def byte_lengths(self) -> list[int]:
        """Return how many UTF-8 bytes each id stands for (0 for special ones)."""
        piece = self._processor.IdToPiece
        is_byte, special = self._processor.IsByte, {UNKNOWN, BOS, EOS}
        return [
            0 if id in special else 1 if is_byte(id) else len(piece(id).replace("\u2581", " ").encode())
            for id in range(self.vocab_size)
        ]
