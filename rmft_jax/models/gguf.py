"""Parameters from GGUF files, the form in which `llama.cpp` reads models: Llama, Qwen2 and Qwen3, quantised or not.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Needs the extra [gguf].
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from rmft_jax.config import ModelConfig
from rmft_jax.errors import UserError
from rmft_jax.models.huggingface import FAMILIES, Family, read_model

# (key of the metadata below the architecture's name, key of config.json)
_SETTINGS = (
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("feed_forward_length", "intermediate_size"),
    ("context_length", "max_position_embeddings"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("rope.freq_base", "rope_theta"),
)
# their names below blk.N -> those of `transformers` below layers.N
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")


class Gguf:
    """A GGUF file. metadata: its values by key. settings: the config.json that says the same."""

    def __init__(self, path: Path):
        """Raises UserError when the file is not whole, when its model is of another kind, and without the extra."""
        self.path = path
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UserError(f"{path} needs the library gguf, which is not installed: pip install 'rmft-jax[gguf]'") from None
        try:
            reader = GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except OSError as error:
            raise UserError(f"model {path} cannot be read ({error.strerror or error}): check the path") from None
        except Exception:  # noqa: BLE001  what the library raises depends on where the file ends
            raise UserError(f"model {path} is not a whole GGUF file: fetch it again") from None
        self._tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        self.settings = self._settings()

    def read_model(self) -> tuple[dict, ModelConfig]:
        """Return float32 parameters and their ModelConfig; raises UserError as `huggingface.read_model` does."""
        return read_model(self.settings, self.path, functools.partial(_Tensors, self.path, self._tensors, self.settings))

    def _settings(self) -> dict[str, Any]:
        architecture = self.metadata.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise UserError(f"{self.path} is a {architecture} model, of GGUF files {known} can be read: take another")
        get = lambda key: self.metadata.get(f"{architecture}.{key}")  # noqa: E731
        scaled = "scaled rotary positions"
        for key, what in (("expert_count", "experts"), ("rope.scaling.factor", scaled), ("rope.scale_linear", scaled)):
            if get(key) not in (None, 0, 1):
                raise UserError(f"{self.path} is a model with {what}, which this one has not: take another")
        out = {theirs: value for key, theirs in _SETTINGS if (value := get(key)) is not None}
        for key in ("rms_norm_eps", "rope_theta"):  # 1e-5 was written as a float32
            if isinstance(out.get(key), float):
                out[key] = float(str(np.float32(out[key])))
        heads, width = out.get("num_attention_heads"), out.get("hidden_size")
        out.setdefault("num_key_value_heads", heads)
        rotated = get("rope.dimension_count")
        if isinstance(heads, int) and isinstance(width, int) and heads:
            head = out.get("head_dim") or width // heads
            out |= {"head_dim": head, "partial_rotary_factor": (rotated or head) / head}
        return out | {
            "model_type": architecture,
            "architectures": [FAMILIES[architecture].architecture],
            "vocab_size": len(self._tensors["token_embd.weight"][0]) if "token_embd.weight" in self._tensors else None,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
        }


class _Tensors:
    """The tensors of a file, dequantised one at a time. files: names as `transformers` has them -> tensor."""

    def __init__(self, path: Path, tensors: dict[str, Any], settings: dict, family: Family):
        self._path, self._settings, self.bytes = path, settings, path.stat().st_size
        self._permuted = family.architecture == "LlamaForCausalLM"
        self.files = {_name(name): tensor for name, tensor in tensors.items()}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor as float32 and forget it. Raises UserError unless it is there with this shape."""
        if name not in self.files:
            raise UserError(f"{self._path} has no tensor {name}, which its metadata ask for: convert the model again")
        data, kind = self.files.pop(name)
        try:
            out = _dequantise(data, kind)
        except NotImplementedError:
            raise UserError(f"{self._path}: `gguf` cannot read {kind.name}, as {name} is quantised: take another") from None
        if out.shape != shape:
            wanted = f"its metadata ask for {list(shape)}"
            raise UserError(f"{self._path}: {name} has shape {list(out.shape)}, {wanted}: convert the model again")
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return _unpermute(out, self._settings[heads]) if self._permuted and heads else out


def _dequantise(data: np.ndarray, kind) -> np.ndarray:
    """Return a tensor as float32, made of a few rows at a time: what `gguf` does takes several times the room."""
    from gguf import dequantize

    few = max(1, (1 << 22) // max(1, data[0].nbytes)) if data.ndim > 1 else len(data)
    first = dequantize(data[:few], kind)
    if len(data) <= few:
        return first.astype(np.float32, copy=False)
    out = np.empty((len(data), *first.shape[1:]), np.float32)
    for begin in range(0, len(data), few):
        out[begin : begin + few] = dequantize(data[begin : begin + few], kind)
    return out


def _name(name: str) -> str:
    """Return the name that a tensor has in `transformers`; its own for one that Llama does not have."""
    *place, module, kind = name.split(".")
    if len(place) == 2 and place[0] == "blk" and module in _LAYER:
        return f"layers.{place[1]}.{_LAYER[module]}.{kind}"
    return f"{_WHOLE[module]}.{kind}" if not place and module in _WHOLE else name


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a query or key projection in the order of `transformers`.

    There feature i of a head is rotated with feature i + D/2; files hold the two side by side, as `llama.cpp` rotates them.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
