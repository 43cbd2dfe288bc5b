"""Tokenizers in the form of Hugging Face: a tokenizer.json, and the files beside it that name its special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from rmft_jax.data.sentencepiece_tokenizer import SPACE, SPACE_BYTES
from rmft_jax.data.word_cache import encode_around, flat
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_bytes
from rmft_jax.progress import say

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_MODEL = "config.json"  # of the model whose tokenizer it is
FILES = (
    _FILE, _CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja",
)  # fmt: skip
"""What a folder of `transformers` may hold of a tokenizer."""

# The expressions that cut text into words before it is encoded, by the name that GGUF files give them (tokenizer.ggml.pre):
# that of GPT-2 is built into `tokenizers`, those of Llama 3 and Qwen 2 are published in their tokenizer.json.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "gpt2", "olmo", "mpt", "phi-2", "roberta-bpe"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _WORDS % "{1,3}"),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _WORDS % ""),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens in GGUF files


class HuggingFaceTokenizer:
    """A tokenizer.json whose decoding gives back the text: byte-level BPE, or pieces with bytes for what has none.

    A normalizer that is Unicode's NFC alone is left out: it would compose letters and their accents in the text.
    """

    file = f"tokenizer/{_FILE}"

    def __init__(self, files: dict[str, bytes], where: str = _FILE):
        """files: by name, tokenizer.json and what there is of FILES and the model's config.json; where: for messages.

        The number of ids is the model's vocab_size, which may be more than the tokenizer has, so that both fit each other.
        Raises UserError for a file that is not whole, and when no token is named to end a text.
        """
        self.files, self.model = files, files[_FILE]
        self._tree = _tree(files, _FILE, where)
        settings = self._tree | {"padding": None, "truncation": None}
        if _is_nfc(settings):
            settings["normalizer"] = None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings))
        except Exception as error:  # noqa: BLE001  `tokenizers` raises nothing narrower
            raise UserError(f"{where} is not a tokenizer of Hugging Face ({_brief(error)}): fetch it again") from None
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        own = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        self.vocab_size = _rows(files, own, where)
        self.bos_id, self.eos_id = self._ends(where)
        of_bytes = [self._tokenizer.token_to_id(piece) for piece in SPACE_BYTES]
        self._space_ids = of_bytes if self._has("decoder", "ByteFallback") and None not in of_bytes else []

    @classmethod
    def load(cls, path: Path) -> HuggingFaceTokenizer:
        """Read tokenizer.json and what stands beside it. Raises UserError as the constructor does."""
        files = {name: file.read_bytes() for name in (*FILES, _MODEL) if (file := path.with_name(name)).is_file()}
        try:
            files[_FILE] = path.read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read ({error.strerror}): check tokenizer.path") from None
        out = cls(files, str(path))
        if _is_nfc(out._tree):
            say(f"tokenizer {path}: its normalizer NFC is left out, so that text stays as it is")
        return out

    def save(self, folder: Path) -> None:
        """Write the files, into a folder of their own."""
        for name, data in self.files.items():
            write_bytes((folder / self.file).with_name(name), data)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each string on its own, exactly as it stands: no token crosses from one into the next."""
        return encode_around(SPACE, self._space_ids, texts, self._encode)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode each string on its own: the ids of all, int32 [ids], and how many each has, int64 [texts]."""
        return flat(self.encode(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; special ones are left out, broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def byte_lengths(self) -> list[int]:
        """Return how many UTF-8 bytes each id stands for (0 for special ones, and for those that only the model has)."""
        letters = set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) if self._has("decoder", "ByteLevel") else set()
        by_bytes = self._has("decoder", "ByteFallback")
        added = self._tokenizer.get_added_tokens_decoder()
        out = [0] * self.vocab_size
        for token, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id in added:
                out[id] = 0 if added[id].special else len(added[id].content.encode())
            elif letters and letters.issuperset(token):
                out[id] = len(token)
            else:
                out[id] = 1 if by_bytes and _is_byte(token) else len(token.replace(SPACE, " ").encode())
        return out

    def pieces_apart(self) -> list[str]:
        """Return the strings that are found before others are looked for, between spaces."""
        return [f" {a.content} " for a in self._tokenizer.get_added_tokens_decoder().values() if not a.special]

    def changes_by(self, text: str) -> str:
        """Say which part of the tokenizer changes `text`."""
        normalizer = self._tokenizer.normalizer
        if normalizer is not None and normalizer.normalize_str(text) != text:
            return f"its normalizer {_kind(self._tree.get('normalizer'))}"
        pre_tokenizer, decoder, model = (_kind(self._tree.get(part)) for part in ("pre_tokenizer", "decoder", "model"))
        return f"its pre_tokenizer {pre_tokenizer}, model {model} and decoder {decoder}"

    def transformers_files(self) -> dict[str, bytes]:
        """Return the files that this tokenizer was read from, as they were, and one that names its special tokens."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for key, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            config[key] = self._tokenizer.id_to_token(id)
        files = {name: data for name, data in self.files.items() if name != _MODEL}
        return {_CONFIG: json.dumps(config, ensure_ascii=False, indent=1).encode()} | files

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _has(self, part: str, kind: str) -> bool:
        return kind in _kind(self._tree.get(part))

    def _ends(self, where: str) -> tuple[int, int]:
        """Return the ids before and after a text: as the files beside it name them, or the only special token there is."""
        found: dict[str, int] = {}
        for name in (_CONFIG, "special_tokens_map.json"):
            settings = _tree(self.files, name, where)
            for key in ("bos", "eos"):
                token = settings.get(f"{key}_token")
                token = token.get("content") if isinstance(token, dict) else token
                id = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
                if id is not None:
                    found.setdefault(key, id)
        settings = _tree(self.files, _MODEL, where)
        for key in ("bos", "eos"):
            id = settings.get(f"{key}_token_id")
            id = id[0] if isinstance(id, list) and id else id
            if isinstance(id, int) and 0 <= id < self.vocab_size:
                found.setdefault(key, id)
        special = [id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]
        if not found and len(special) == 1:
            found = {"eos": special[0]}
        if not found:
            raise UserError(
                f"tokenizer {where} has {len(special)} special tokens and does not say which of them ends a text: put "
                f'{_CONFIG} beside it, with {{"bos_token": ..., "eos_token": ...}}'
            )
        return found.get("bos", found.get("eos")), found.get("eos", found.get("bos"))


def read_files(folder: Path) -> dict[str, bytes]:
    """Return what a folder of `transformers` holds of a tokenizer, by name; {} where it has none.

    GPT-2's vocab.json and merges.txt alone become a tokenizer.json beside them.
    """
    files = {name: file.read_bytes() for name in FILES if (file := folder / name).is_file()}
    if _FILE not in files and {"vocab.json", "merges.txt"} <= set(files):
        model = read_json(folder / _MODEL, "model config", "name a folder with a Hugging Face model").get("model_type")
        name = {"gpt2": "gpt-2", "gpt_neo": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}.get(model)
        if name is None:
            raise UserError(f"{folder} has vocab.json and merges.txt but no {_FILE}: save its tokenizer again")
        vocab = read_json(folder / "vocab.json", "vocabulary", "fetch it again")
        lines = files["merges.txt"].decode("utf-8", "replace").split("\n")
        merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
        special = [t for t in vocab if t.startswith("<|") and t.endswith("|>")]
        files[_FILE] = byte_level_bpe(vocab, merges, special, (), name, str(folder))
    return files


def rebuild(metadata: dict[str, Any], where: str) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json for the tokenizer that a GGUF file describes.

    metadata: values by their keys, tokenizer.ggml.*. where: the file, for messages. Raises UserError for a tokenizer that is
    not byte-level BPE, for unknown rules of cutting text into words, and for metadata that do not fit each other.
    """
    get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    if get("model") != "gpt2":
        raise UserError(f"{where} has a tokenizer of kind {get('model')!r}, not byte-level BPE ('gpt2'): take another model")
    tokens, merges = get("tokens", []), get("merges", [])
    types = get("token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or not tokens:
        raise UserError(f"{where}: tokenizer.ggml.tokens are {len(tokens)} with {len(types)} types: convert the model again")
    of_type = lambda wanted: [token for token, type in zip(tokens, types, strict=True) if type == wanted]  # noqa: E731
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        id = get(f"{key}_token_id")
        if isinstance(id, int) and 0 <= id < len(tokens):
            config[f"{name}_token"] = tokens[id]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    first = config.get("bos_token") if get("add_bos_token") else None
    vocab = {token: id for id, token in enumerate(tokens)}
    spec = byte_level_bpe(vocab, merges, of_type(_CONTROL), of_type(_USER_DEFINED), get("pre", "default"), where, first)
    return {_FILE: spec, _CONFIG: json.dumps(config, ensure_ascii=False, indent=1).encode()}


def byte_level_bpe(
    vocab: dict[str, int],
    merges: Iterable[str],
    special: Sequence[str],
    added: Sequence[str],
    pre: str,
    where: str,
    first: str | None = None,
) -> bytes:
    """Return the tokenizer.json of a byte-level BPE.

    Args:
      vocab: token -> id. merges: "left right", the first ones first.
      special: tokens that no text holds. added: tokens that are found before anything else.
      pre: how text is cut into words, by the name it has in GGUF files. where: for messages.
      first: the token that `tokenizers` puts before a text when it is asked to add special tokens.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

    if (rule := _PRE_TOKENIZERS.get(pre)) is None:
        known = ", ".join(_PRE_TOKENIZERS)
        raise UserError(f"{where} cuts text into words by the rules {pre!r}, known are {known}: take another model")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule in ("gpt2", "digits"))
    if rule == "digits":
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif rule != "gpt2":
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), byte_level])
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        out = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges="{1,3}" in rule))
    except Exception as error:  # noqa: BLE001  `tokenizers` raises nothing narrower
        raise UserError(f"{where}: merges and tokens do not fit ({_brief(error)}): convert the model again") from None
    out.pre_tokenizer, out.decoder = byte_level, decoders.ByteLevel()
    if first:
        out.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, vocab[first])])
    out.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    out.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return out.to_str(pretty=True).encode()


def _tree(files: dict[str, bytes], name: str, where: str) -> dict:
    """Return a JSON file's object, {} where there is no such file. Raises UserError when it is not one."""
    if name not in files:
        return {}
    try:
        tree = json.loads(files[name])
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        file = where if name == _FILE else Path(where).with_name(name)
        raise UserError(f"{file} is not whole JSON with an object: fetch it again")
    return tree


def _rows(files: dict[str, bytes], own: int, where: str) -> int:
    """Return the vocab_size of the model beside the tokenizer, which has at least the tokenizer's `own` ids."""
    rows = _tree(files, _MODEL, where).get("vocab_size", own)
    if not isinstance(rows, int) or rows < own:
        raise UserError(f"tokenizer {where} has {own} ids, but {_MODEL} beside it says vocab_size {rows}: they do not fit")
    return rows


def _kind(part: dict | None) -> str:
    """Return the names of what a part of a tokenizer.json consists of."""
    if not part:
        return "none"
    inner = [item for items in part.values() if isinstance(items, list) for item in items if isinstance(item, dict)]
    return "+".join(_kind(item) for item in inner if "type" in item) or str(part.get("type"))


def _is_nfc(tree: dict) -> bool:
    normalizer = tree.get("normalizer")
    return isinstance(normalizer, dict) and normalizer.get("type") == "NFC"


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
