"""Parameters to and from the folders that Hugging Face `transformers` reads as a Llama model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import ModelConfig
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_bytes, write_json
from rmft_jax.models.gpt import EPSILON

_WEIGHTS = "model.safetensors"

# What must stand in a config.json, or may be left out: (key, value here, value of a file that leaves it out).
_FIXED = (
    ("model_type", "llama", None),
    ("hidden_act", "silu", "silu"),
    ("attention_bias", False, False),
    ("mlp_bias", False, False),
    ("rms_norm_eps", EPSILON, 1e-6),
)


def export_llama(
    params: dict, config: ModelConfig, tokenizer_vocab_size: int, folder: Path, *, bos_id: int = 1, eos_id: int = 2
) -> None:
    """Write config.json and model.safetensors for `transformers.LlamaForCausalLM.from_pretrained(folder)`, in float32.

    params: as `init_params` returns them. tokenizer_vocab_size: V, checked against the embedding.
    Raises UserError when the parameters belong to another vocabulary.
    """
    embed = np.asarray(params["embed"], np.float32)
    if len(embed) != tokenizer_vocab_size:
        raise UserError(
            f"the embedding has {len(embed)} rows but the tokenizer {tokenizer_vocab_size} ids: take the model's tokenizer"
        )
    tensors = {"model.embed_tokens.weight": embed, "model.norm.weight": params["final_norm"]["scale"]}
    for name, stacked in _to_llama(params["blocks"]).items():
        tensors |= {f"model.layers.{number}.{name}": layer for number, layer in enumerate(stacked)}
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    folder = Path(folder)
    write_bytes(folder / _WEIGHTS, save(arrays, metadata={"format": "pt"}))
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            **{key: value for key, value, _ in _FIXED},
            "vocab_size": tokenizer_vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads,
            "head_dim": config.width // config.heads,
            "rope_theta": config.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "tie_word_embeddings": True,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "torch_dtype": "float32",
        },
    )


def import_llama(folder: Path) -> tuple[dict, ModelConfig]:
    """Read a Llama model and return float32 parameters, as `init_params` makes them, and their ModelConfig.

    Raises UserError for what this model cannot express: an output that is not the embedding, biases, key-value heads shared
    by several query heads, scaled rotary positions, another activation or epsilon, weights in several files.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json", "model config", "name a folder with a Hugging Face Llama model")
    config = _read_config(settings, folder)
    tensors = _read_tensors(folder / _WEIGHTS)
    embed = _take(tensors, "model.embed_tokens.weight", (_number(settings, "vocab_size", folder), config.width), folder)
    tied = settings.get("tie_word_embeddings", False)
    head = tensors.pop("lm_head.weight", embed if tied else None)
    if head is None or not np.array_equal(head, embed):
        raise UserError(f"{folder} has an output matrix of its own: this model ties it to the embedding, take a tied model")
    params = {
        "embed": embed,
        "blocks": _from_llama(tensors, config, folder),
        "final_norm": {"scale": _take(tensors, "model.norm.weight", (config.width,), folder)},
    }
    left = sorted(name for name in tensors if not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise UserError(f"{folder / _WEIGHTS} holds {left[0]}, which this model has no place for: take a plain Llama model")
    return jax.tree.map(jnp.asarray, params), config


def _to_llama(blocks: dict) -> dict[str, np.ndarray]:
    """Return the stacked blocks under Llama's names, matrices as [L, out, in]."""
    q, k, v = np.split(np.asarray(blocks["attention"]["qkv"]["kernel"]), 3, axis=2)
    gate, up = np.split(np.asarray(blocks["mlp"]["gate_up"]["kernel"]), 2, axis=2)
    out, down = blocks["attention"]["out"]["kernel"], blocks["mlp"]["down"]["kernel"]
    matrices = {
        **{f"self_attn.{name}_proj": matrix for name, matrix in (("q", q), ("k", k), ("v", v), ("o", out))},
        **{f"mlp.{name}_proj": matrix for name, matrix in (("gate", gate), ("up", up), ("down", down))},
    }
    return {
        **{f"{name}.weight": np.swapaxes(np.asarray(matrix), 1, 2) for name, matrix in matrices.items()},
        "input_layernorm.weight": np.asarray(blocks["attention_norm"]["scale"]),
        "post_attention_layernorm.weight": np.asarray(blocks["mlp_norm"]["scale"]),
    }


def _from_llama(tensors: dict, config: ModelConfig, folder: Path) -> dict:
    """Return the stacked blocks, taking their tensors out of `tensors`."""
    width, mlp = config.width, config.mlp

    def stack(name: str, *shape: int) -> np.ndarray:
        names = (f"model.layers.{number}.{name}.weight" for number in range(config.layers))
        return np.stack([_take(tensors, each, shape, folder).T for each in names])

    return {
        "attention_norm": {"scale": stack("input_layernorm", width)},
        "attention": {
            "qkv": {"kernel": np.concatenate([stack(f"self_attn.{n}_proj", width, width) for n in "qkv"], axis=2)},
            "out": {"kernel": stack("self_attn.o_proj", width, width)},
        },
        "mlp_norm": {"scale": stack("post_attention_layernorm", width)},
        "mlp": {
            "gate_up": {"kernel": np.concatenate([stack(f"mlp.{n}_proj", mlp, width) for n in ("gate", "up")], axis=2)},
            "down": {"kernel": stack("mlp.down_proj", width, mlp)},
        },
    }


def _read_config(settings: dict, folder: Path) -> ModelConfig:
    for key, ours, default in _FIXED:
        theirs = settings.get(key, default)
        if theirs != ours:
            raise UserError(f"{folder / 'config.json'}: {key} is {theirs!r}, here it is {ours!r}: take another model")
    width, heads = (_number(settings, key, folder) for key in ("hidden_size", "num_attention_heads"))
    groups = settings.get("num_key_value_heads") or heads
    if groups != heads:
        raise UserError(f"{folder} has {groups} key-value heads for {heads} heads: here each has its own, take another")
    if width % heads or (settings.get("head_dim") or width // heads) != width // heads or width // heads % 2:
        raise UserError(f"{folder} has heads that are not hidden_size / {heads} wide, an even number: take another model")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{folder} scales its rotary positions: this model does not, take another")
    return ModelConfig(
        layers=_number(settings, "num_hidden_layers", folder),
        width=width,
        heads=heads,
        mlp_width=_number(settings, "intermediate_size", folder),
        rope_base=float(rope.get("rope_theta", settings.get("rope_theta", 10000.0))),
    )


def _number(settings: dict, key: str, folder: Path) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{folder / 'config.json'}: {key} is {value!r}: it must be a whole number of 1 or more")
    return value


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not path.exists() and path.with_suffix(".safetensors.index.json").exists():
        raise UserError(f"{path.parent} holds its weights in several files: save it again in one (max_shard_size)")
    try:
        return {name: tensor.astype(np.float32) for name, tensor in load(path.read_bytes()).items()}
    except OSError as error:
        raise UserError(f"weights {path} cannot be read ({error.strerror}): save the model as safetensors") from None
    except SafetensorError:
        raise UserError(f"weights {path} are not a safetensors file: save the model again") from None


def _take(tensors: dict, name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.shape != shape:
        found = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
        raise UserError(f"{folder / _WEIGHTS}: {name} is {found}, config.json asks for {list(shape)}: save the model again")
    return tensor
