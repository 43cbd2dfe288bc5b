"""SentencePiece, trained so that no piece holds PII, and encoding that respects given borders."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from rmft_jax.config import TokenizerConfig
from rmft_jax.data.word_cache import WordCache, encode_around, flat
from rmft_jax.errors import UserError
from rmft_jax.files import write_bytes

_UNKNOWN, _BOS, _EOS = 0, 1, 2  # of the models trained here
SPACE = "\u2581"  # what pieces have for a space. In a text it is encoded as its bytes, or it would come back as a space
SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]


class SentencePieceTokenizer:
    """A SentencePiece model: no normalisation, no dummy prefix, unknown characters as bytes."""

    file = "tokenizer.model"

    def __init__(self, model: bytes):
        """model: a serialised SentencePiece model. Raises UserError when it is not one, or has no end of text."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError("the tokenizer file is not a SentencePiece model: run `rmft prepare` again") from None
        self.vocab_size = self._processor.GetPieceSize()
        ids = [id for id in (self._processor.bos_id(), self._processor.eos_id()) if id >= 0]
        if not ids:
            raise UserError("the SentencePiece model has no piece for the beginning or end of a text: take another one")
        self.bos_id, self.eos_id = ids[0], ids[-1]
        bytes_of_it = [self._processor.PieceToId(piece) for piece in SPACE_BYTES]
        self._space_ids = bytes_of_it if all(map(self._processor.IsByte, bytes_of_it)) else []
        self._words = self._word_cache()

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        """Read a model file."""
        try:
            return cls(path.read_bytes())
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read ({error.strerror}): run `rmft prepare` first") from None

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig, **options: object) -> SentencePieceTokenizer:
        """Train on pieces of text from which PII has been cut out, so that no piece of the vocabulary can hold any.

        options: further ones of SentencePiece's trainer.
        """
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
                unk_id=_UNKNOWN,
                bos_id=_BOS,
                eos_id=_EOS,
                pad_id=-1,
                minloglevel=2,
                **options,
            )
        except RuntimeError as error:
            if "vocab" in str(error).lower():
                raise UserError(
                    f"tokenizer.vocab_size {config.vocab_size} is more than this corpus can fill: lower it"
                ) from None
            raise
        return cls(model.getvalue())

    def save(self, folder: Path) -> None:
        """Write the model file."""
        write_bytes(folder / self.file, self.model)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each string on its own, exactly as it stands: no token crosses from one into the next."""
        return self._encode(list(texts))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode each string on its own: the ids of all, int32 [ids], and how many each has, int64 [texts]."""
        return self._words.encode(texts) if self._words else flat(self._encode(list(texts)))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; special ones are left out, broken UTF-8 becomes U+FFFD."""
        return self._processor.Decode([int(id) for id in ids])

    def byte_lengths(self) -> list[int]:
        """Return how many UTF-8 bytes each id stands for (0 for special ones)."""
        piece, is_byte = self._processor.IdToPiece, self._processor.IsByte
        return [
            0 if self._is_special(id) else 1 if is_byte(id) else len(piece(id).replace(SPACE, " ").encode())
            for id in range(self.vocab_size)
        ]

    def pieces_apart(self) -> list[str]:
        """Return the strings that are found before others are looked for."""
        return []

    def changes_by(self, text: str) -> str:
        """Say what of the model changes `text`."""
        return "the normalisation it was trained with, such as a space put before the text"

    def transformers_files(self) -> dict[str, bytes]:
        """Return tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the same ids.

        Those of a unigram model may differ between ways of equal probability, which rounding decides, and where a text holds
        a special piece such as "<s>" in letters that the model does not know. U+2581 in a text is a space there.
        Raises UserError for a model that is neither BPE nor unigram.
        """
        specials = [id for id in range(self.vocab_size) if self._is_special(id)]
        names = {id: self._processor.IdToPiece(id) for id in specials}
        tree = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
                | {"normalized": False, "special": True}
                for id, name in names.items()
            ],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": self._huggingface_model(),
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": names[self.bos_id],
            "eos_token": names[self.eos_id],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # "</s>" in a text is text
        }
        if (unknown := self._processor.unk_id()) >= 0:
            config["unk_token"] = names[unknown]
        trees = {"tokenizer.json": tree, "tokenizer_config.json": config}
        return {name: json.dumps(tree, ensure_ascii=False, indent=1).encode() for name, tree in trees.items()}

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return encode_around(SPACE, self._space_ids, texts, lambda parts: self._processor.Encode(parts, num_threads=1))

    def _word_cache(self) -> WordCache | None:
        """Return a cache of words, where the ids of a text are those of its words one after the other: in BPE alone, as
        rounding decides between ways of equal probability in a unigram model."""
        ids = range(self.vocab_size)
        # BPE scores pieces by their rank. The model itself would say, but its protocol does not load beside Beam's protobuf.
        if not all(self._processor.GetScore(id).is_integer() for id in ids):
            return None
        return WordCache.of_pieces((self._processor.IdToPiece(id).replace(SPACE, " ") for id in ids), self._encode)

    def _is_special(self, id: int) -> bool:
        return self._processor.IsControl(id) or self._processor.IsUnknown(id)

    def _huggingface_model(self) -> dict:
        """Return the model as `tokenizers` writes it.

        BPE: SentencePiece joins the two neighbours whose union is the best piece, `tokenizers` those that come first in a
        list: all pairs that a piece can be made of, by the score of the piece.
        """
        from sentencepiece import sentencepiece_model_pb2 as protocol

        proto = protocol.ModelProto.FromString(self.model)
        if any(p.type == protocol.ModelProto.SentencePiece.USER_DEFINED for p in proto.pieces):
            raise UserError("the SentencePiece model has pieces that its user defined: `transformers` cannot be given it")
        normal = {p.piece: p.score for p in proto.pieces if p.type == protocol.ModelProto.SentencePiece.NORMAL}
        unknown = max(0, self._processor.unk_id())
        if proto.trainer_spec.model_type == protocol.TrainerSpec.UNIGRAM:
            # Control and byte pieces have no score. No text may be read as one, so theirs is worse than any way round.
            never = min(normal.values()) - 100
            vocab = [[p.piece, normal.get(p.piece, never)] for p in proto.pieces]
            return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": True}
        if proto.trainer_spec.model_type != protocol.TrainerSpec.BPE:
            raise UserError("the SentencePiece model is neither BPE nor unigram: `transformers` cannot be given it")
        merges = [
            [piece[:cut], piece[cut:]]
            for piece in sorted(normal, key=normal.get, reverse=True)
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]
        return {
            "type": "BPE",
            "unk_token": proto.pieces[unknown].piece,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {p.piece: id for id, p in enumerate(proto.pieces)},
            "merges": merges,
        }
