"""Parameters to and from the folders that Hugging Face `transformers` reads: GPT-2, GPT-Neo, GPT-NeoX, Llama, Qwen2, Qwen3.

A family is a table: what its config.json calls each field of ModelConfig, and what its weights call each parameter. Import
and export both read that table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import ModelConfig, model_rules
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_chunks, write_json
from rmft_jax.models.gpt import init_params, mlp_pairs

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "silu": "swiglu"}
_SUFFIXES = {"kernel": "weight", "scale": "weight", "embed": "weight", "bias": "bias"}
# What older files hold beside the parameters: attention masks and rotary frequencies, which follow from the config.
_BUFFERS = ("attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


class Family(NamedTuple):
    """How one family of models is written down.

    architecture: class of `transformers`. prefix: of all names of weights but the output's.
    fields: (key of config.json, field of ModelConfig, value of a file that leaves the key out: None = it may not).
    fixed: what ModelConfig has in every model of the family. refused: (key, the one value that can be expressed), which is
    also that of a file without the key.
    modules: our module -> theirs, {} or {0} = number of the layer; several where ours holds theirs side by side.
    transposed: matrices are [out, in]. interleaved: query, key and value stand together for each head in one matrix.
    """

    architecture: str
    prefix: str
    fields: tuple[tuple[str, str, Any], ...]
    fixed: dict[str, Any]
    refused: tuple[tuple[str, Any], ...]
    modules: dict[str, tuple[str, ...]]
    output: str = "lm_head"
    transposed: bool = True
    interleaved: bool = False


def _layer(names: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the modules of a block; `a|b` names two that stand side by side in ours."""
    return {f"blocks.{ours}": tuple(theirs.split("|")) for ours, theirs in names.items()}


_LLAMA_FIELDS = (
    ("hidden_size", "width", None),
    ("num_hidden_layers", "layers", None),
    ("num_attention_heads", "heads", None),
    ("intermediate_size", "mlp_width", None),
    ("max_position_embeddings", "max_positions", 2048),
    ("rms_norm_eps", "norm_epsilon", 1e-6),
    ("hidden_act", "activation", "silu"),
    ("tie_word_embeddings", "tied", False),
)
_LLAMA_MODULES = {"embed": ("embed_tokens",), "final_norm": ("norm",)} | _layer(
    {
        "attention_norm": "layers.{}.input_layernorm",
        "attention.qkv": "layers.{0}.self_attn.q_proj|layers.{0}.self_attn.k_proj|layers.{0}.self_attn.v_proj",
        "attention.q_norm": "layers.{}.self_attn.q_norm",
        "attention.k_norm": "layers.{}.self_attn.k_norm",
        "attention.out": "layers.{}.self_attn.o_proj",
        "mlp_norm": "layers.{}.post_attention_layernorm",
        "mlp.gate_up": "layers.{0}.mlp.gate_proj|layers.{0}.mlp.up_proj",
        "mlp.down": "layers.{}.mlp.down_proj",
    }
)
_GPT_FIXED = {"positions": "learned", "norm": "layer", "out_bias": True, "mlp_bias": True}

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        prefix="model.",
        fields=(
            *_LLAMA_FIELDS,
            ("num_key_value_heads", "kv_heads", 0),
            ("head_dim", "head_width", 0),
            ("rope_theta", "rope_base", 10000.0),
            ("attention_bias", "qkv_bias", False),
            ("attention_bias", "out_bias", False),
            ("mlp_bias", "mlp_bias", False),
        ),
        fixed={},
        refused=(("partial_rotary_factor", 1.0),),
        modules=_LLAMA_MODULES,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        prefix="model.",
        fields=(*_LLAMA_FIELDS, ("num_key_value_heads", "kv_heads", 32), ("rope_theta", "rope_base", 10000.0)),
        fixed={"qkv_bias": True},
        refused=(("use_sliding_window", False), ("partial_rotary_factor", 1.0)),
        modules=_LLAMA_MODULES,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        prefix="model.",
        fields=(
            *_LLAMA_FIELDS,
            ("num_key_value_heads", "kv_heads", 32),
            ("head_dim", "head_width", 128),
            ("rope_theta", "rope_base", 10000.0),
            ("attention_bias", "qkv_bias", False),
            ("attention_bias", "out_bias", False),
        ),
        fixed={"qk_norm": True},
        refused=(("use_sliding_window", False), ("partial_rotary_factor", 1.0)),
        modules=_LLAMA_MODULES,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        fields=(
            ("n_embd", "width", None),
            ("n_layer", "layers", None),
            ("n_head", "heads", None),
            ("n_inner", "mlp_width", 0),
            ("n_positions", "max_positions", 1024),
            ("layer_norm_epsilon", "norm_epsilon", 1e-5),
            ("activation_function", "activation", "gelu_new"),
            ("tie_word_embeddings", "tied", True),
        ),
        fixed=_GPT_FIXED | {"qkv_bias": True},
        refused=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)),
        modules={"embed": ("wte",), "positions": ("wpe",), "final_norm": ("ln_f",)}
        | _layer(
            {
                "attention_norm": "h.{}.ln_1",
                "attention.qkv": "h.{}.attn.c_attn",
                "attention.out": "h.{}.attn.c_proj",
                "mlp_norm": "h.{}.ln_2",
                "mlp.up": "h.{}.mlp.c_fc",
                "mlp.down": "h.{}.mlp.c_proj",
            }
        ),
        transposed=False,
    ),
    "gpt_neo": Family(
        architecture="GPTNeoForCausalLM",
        prefix="transformer.",
        fields=(
            ("hidden_size", "width", None),
            ("num_layers", "layers", None),
            ("num_heads", "heads", None),
            ("intermediate_size", "mlp_width", 0),
            ("max_position_embeddings", "max_positions", 2048),
            ("layer_norm_epsilon", "norm_epsilon", 1e-5),
            ("activation_function", "activation", "gelu_new"),
            ("window_size", "local_window", 256),
            ("tie_word_embeddings", "tied", True),
        ),
        fixed=_GPT_FIXED | {"attention_scale": 1.0},
        refused=(),
        modules={"embed": ("wte",), "positions": ("wpe",), "final_norm": ("ln_f",)}
        | _layer(
            {
                "attention_norm": "h.{}.ln_1",
                "attention.qkv": "h.{0}.attn.attention.q_proj|h.{0}.attn.attention.k_proj|h.{0}.attn.attention.v_proj",
                "attention.out": "h.{}.attn.attention.out_proj",
                "mlp_norm": "h.{}.ln_2",
                "mlp.up": "h.{}.mlp.c_fc",
                "mlp.down": "h.{}.mlp.c_proj",
            }
        ),
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        prefix="gpt_neox.",
        fields=(
            ("hidden_size", "width", None),
            ("num_hidden_layers", "layers", None),
            ("num_attention_heads", "heads", None),
            ("intermediate_size", "mlp_width", None),
            ("max_position_embeddings", "max_positions", 2048),
            ("layer_norm_eps", "norm_epsilon", 1e-5),
            ("hidden_act", "activation", "gelu"),
            ("tie_word_embeddings", "tied", False),
            ("rope_theta", "rope_base", 10000.0),
            ("partial_rotary_factor", "rotary_share", 0.25),
            ("use_parallel_residual", "parallel", True),
            ("attention_bias", "qkv_bias", True),
            ("attention_bias", "out_bias", True),
        ),
        fixed={"norm": "layer", "mlp_bias": True},
        refused=(),
        modules={"embed": ("embed_in",), "final_norm": ("final_layer_norm",)}
        | _layer(
            {
                "attention_norm": "layers.{}.input_layernorm",
                "attention.qkv": "layers.{}.attention.query_key_value",
                "attention.out": "layers.{}.attention.dense",
                "mlp_norm": "layers.{}.post_attention_layernorm",
                "mlp.up": "layers.{}.mlp.dense_h_to_4h",
                "mlp.down": "layers.{}.mlp.dense_4h_to_h",
            }
        ),
        output="embed_out",
        interleaved=True,
    ),
}


def import_model(folder: Path) -> tuple[dict, ModelConfig]:
    """Read a model and return float32 parameters, as `init_params` makes them, and their ModelConfig.

    Raises UserError as `read_model` does, and for a file that is not whole.
    """
    folder = Path(folder)
    path = folder / "config.json"
    settings = read_json(path, "model config", "name a folder with a Hugging Face model")
    if not isinstance(settings, dict):
        raise UserError(f"model config {path} is not a JSON object: name a folder with a Hugging Face model")
    return read_model(settings, path, functools.partial(_Tensors, folder))


def read_model(settings: dict, path: Path, open_tensors: Callable[[Family], Any]) -> tuple[dict, ModelConfig]:
    """Read the parameters that a config.json describes, float32, as `init_params` makes them, and their ModelConfig.

    One tensor is in memory beside the parameters at a time, however many files hold the weights.

    Args:
      settings: the config.json. path: where they are from, for messages.
      open_tensors: the family -> what holds the tensors by the family's names: `files`, the names that are left, `bytes` of
        all files, and `take(name, shape)`, which returns one and forgets it.

    Raises UserError for a family that is not in FAMILIES, for what this model cannot express (scaled rotary positions,
    another activation), and for weights that do not fit the config.
    """
    try:
        family, config = _read_config(settings, path)
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # a word where a number belongs, and the like
        why = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is not a config that transformers writes ({why}): save the model again") from None
    vocab_size = _number(settings, "vocab_size", path)
    tensors = open_tensors(family)
    shapes = jax.eval_shape(lambda: init_params(config, vocab_size, jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    if count > 8 * tensors.bytes:  # less than a bit each; said before there is room made for them
        raise UserError(f"{path} asks for {count:,} parameters, its weights are {tensors.bytes:,} bytes: they do not fit")

    def read(place, shape) -> jax.Array:
        out = _aligned(shape.shape)
        for number, layer in enumerate(out if place[0].key == "blocks" else [out]):
            for name, part, form in _pieces(family, config, place, layer):
                theirs = tensors.take(name.format(number), form.theirs(part).shape)
                part[...] = form.ours(theirs, part.shape)
        return jnp.asarray(out)

    params = jax.tree_util.tree_map_with_path(read, shapes)
    output = f"{family.output}.weight"
    tied = config.tied and output in tensors.files
    if tied and not np.array_equal(tensors.take(output, params["embed"].shape), params["embed"]):
        raise UserError(f"{path} ties the output to the embedding but there is another one: set tie_word_embeddings false")
    if tensors.files:
        name = min(tensors.files)
        source = path.parent if path.name == "config.json" else path
        raise UserError(f"{source} holds {name}, which this model has no place for: take a plain {family.architecture}")
    return params, config


def export_model(
    params: dict, config: ModelConfig, folder: Path, *, bos_id: int = 1, eos_id: int = 2, shard_bytes: int = 2 << 30
) -> None:
    """Write config.json, generation_config.json and float32 safetensors for `transformers`' AutoModelForCausalLM.

    params: as `init_params` returns them. bos_id, eos_id: the tokens before and after a text. shard_bytes: larger weights go
    into several files with an index.
    Raises UserError when no family has such a model.
    """
    folder, (family, settings) = Path(folder), _write_config(config)
    files: dict[str, str] = {}
    shards = list(_shards(family, config, params, shard_bytes))
    for number, names in enumerate(shards, 1):
        file = _WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_chunks(folder / file, _safetensors(names))
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", settings | ids | {"vocab_size": len(params["embed"]), "torch_dtype": "float32"})


def _shards(family: Family, config: ModelConfig, params: dict, limit: int) -> Iterator[dict[str, tuple]]:
    """Yield for each file its names with the shapes of the tensors and functions that make them."""
    shard: dict[str, tuple[tuple[int, ...], Callable]] = {}
    size = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        stacked = path[0].key == "blocks"
        for number in range(config.layers if stacked else 1):
            index = number if stacked else slice(None)
            shape = np.broadcast_to(np.float32(0), leaf.shape)[index]
            for place, (name, part, form) in enumerate(_pieces(family, config, path, shape)):
                if shard and size + 4 * part.size > limit:
                    yield shard
                    shard, size = {}, 0
                size += 4 * part.size
                name = name if path[0].key == "output" else family.prefix + name.format(number)
                make = functools.partial(_piece, family, config, path, leaf, index, place)
                shard[name] = form.theirs(part).shape, make
    yield shard


def _piece(family: Family, config: ModelConfig, path, leaf, index: int | slice, place: int) -> np.ndarray:
    _, part, form = list(_pieces(family, config, path, np.asarray(leaf[index])))[place]
    return form.theirs(part)


def _safetensors(tensors: dict[str, tuple[tuple[int, ...], Callable]]) -> Iterator[bytes | np.ndarray]:
    """Yield the bytes of a safetensors file, a tensor at a time, where the library would hold all of them twice.

    Source: https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in tensors.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, make in tensors.values():
        yield np.ascontiguousarray(make(), "<f4")


class _Form(NamedTuple):
    """How a tensor of theirs holds a part of ours, [..., columns] or, of several, [..., groups, some of each, columns].

    turned: as [out, in]; apart: all queries, then all keys, then all values, which we have [..., H, 3, D].
    """

    turned: bool
    apart: bool

    def theirs(self, part: np.ndarray) -> np.ndarray:
        """Return a part of ours as theirs."""
        if self.apart:
            part = part.swapaxes(-3, -2)
        part = part.reshape(*part.shape[:-3], -1) if part.ndim > 2 else part
        return part.T if self.turned else part

    def ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor of theirs as a part of ours of this shape."""
        part = tensor.T if self.turned else tensor
        if self.apart:
            return part.reshape(*shape[:-3], shape[-2], shape[-3], -1).swapaxes(-3, -2)
        return part.reshape(shape)


def _pieces(family: Family, config: ModelConfig, path, layer: np.ndarray) -> Iterator[tuple[str, np.ndarray, _Form]]:
    """Yield for each tensor of theirs that a parameter of ours holds: its name, the part of `layer`, and the form."""
    *module, kind = (key.key for key in path)
    module = ".".join(module) or kind
    names = (family.output,) if module == "output" else family.modules[module]
    readers = config.heads // config.groups
    if module.endswith("qkv"):  # models.gpt.column_order
        layer = layer.reshape(*layer.shape[:-1], config.groups, readers + 2, config.head_dim)
    elif module.endswith("gate_up"):
        layer = layer.reshape(*layer.shape[:-1], mlp_pairs(config), 2, -1)
    cuts = {1: [], 2: [1], 3: [readers, readers + 1]}[len(names)]
    apart = module.endswith("qkv") and len(names) == 1 and not family.interleaved
    form = _Form(kind == "kernel" and (family.transposed or module == "output"), apart)
    for name, part in zip(names, np.split(layer, cuts, axis=-2) if cuts else [layer], strict=True):
        yield f"{name}.{_SUFFIXES[kind]}", part, form


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return room for a float32 array where jax on CPU takes it over as it is, instead of copying it."""
    size = 4 * math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + size].view(np.float32).reshape(shape)


class _Tensors:
    """The tensors of a folder, read one at a time. files: name without the family's prefix -> (file, name in it)."""

    def __init__(self, folder: Path, family: Family):
        self.folder, self.files, self.bytes = folder, {}, 0
        for path in self._paths():
            self.bytes += path.stat().st_size if path.exists() else 0
            for name in list(self._open(path).keys()):
                plain = name.removeprefix(family.prefix)
                plain = f"{family.output}.weight" if plain in ("lm_head.weight", "embed_out.weight") else plain
                if not plain.endswith(_BUFFERS) or plain.endswith("c_attn.bias"):
                    self.files[plain] = (path, name)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor as float32 and forget it. Raises UserError unless it is there with this shape."""
        if name not in self.files:
            raise UserError(f"{self.folder} has no tensor {name}, which config.json asks for: save the model again")
        path, key = self.files.pop(name)
        file = self._open(path)
        found = tuple(file.get_slice(key).get_shape())
        if found != shape:
            wanted = f"config.json asks for {list(shape)}"
            raise UserError(f"{path}: {name} has shape {list(found)}, {wanted}: save the model again")
        return np.asarray(file.get_tensor(key)).astype(np.float32, copy=False)

    def _paths(self) -> list[Path]:
        if (self.folder / _WEIGHTS).exists() or not (self.folder / _INDEX).exists():
            return [self.folder / _WEIGHTS]
        index = read_json(self.folder / _INDEX, "index of the weights", "save the model again")
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise UserError(f"{self.folder / _INDEX} does not map names to files beside it: save the model again")
        return [self.folder / name for name in sorted(set(names.values()))]

    @staticmethod
    def _open(path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="numpy")
        except OSError as error:
            reason = error.strerror or "no such file"
            raise UserError(f"weights {path} cannot be read ({reason}): save the model as safetensors") from None
        except SafetensorError:
            raise UserError(f"weights {path} are not a safetensors file: save the model again") from None


def _read_config(settings: dict, path: Path) -> tuple[Family, ModelConfig]:
    """Return the family and the ModelConfig of a config.json, in the form that `_canonical` gives."""
    family = FAMILIES.get(settings.get("model_type"))
    if family is None:
        raise UserError(f"{path}: model_type is {settings.get('model_type')!r}: take a model of {', '.join(FAMILIES)}")
    settings = _flat(settings, path)
    for key, ours in family.refused:
        if settings.get(key, ours) != ours:
            raise UserError(f"{path}: {key} is {settings[key]!r}, here it is {ours!r}: take another model")
    values = dict(family.fixed)
    kinds = {field.name: type(field.default) for field in dataclasses.fields(ModelConfig)}
    for key, field, default in family.fields:
        if field == "activation":
            values[field] = _activation(settings.get(key, default), key, family, path)
        elif kinds[field] is int:
            values[field] = _number(settings, key, path, default)
        else:
            value = settings.get(key, default)
            if not isinstance(value, (int, float)):
                raise UserError(f"{path}: {key} is {value!r}: it must be a {kinds[field].__name__}")
            values[field] = kinds[field](value)
    if "local_window" in values:
        values |= _locality(settings, values, path)
    config = ModelConfig(**values)
    for rule in model_rules(config):
        raise UserError(f"{path}: {rule}")
    return family, _canonical(config)


def _write_config(config: ModelConfig) -> tuple[Family, dict]:
    """Return the first family that has such a model, and its config.json. Raises UserError when there is none."""
    config = _canonical(config)
    resolved = dataclasses.replace(config, kv_heads=config.groups, head_width=config.head_dim)
    nearest: list[str] = []
    for name, family in FAMILIES.items():
        if config.gated != ("blocks.mlp.gate_up" in family.modules):
            continue
        settings = {"model_type": name, "architectures": [family.architecture]}
        settings |= {key: getattr(resolved, field) for key, field, _ in family.fields}
        key = next(key for key, field, _ in family.fields if field == "activation")
        settings[key] = "silu" if config.gated else config.activation
        if config.positions == "rotary":
            rope = {key: settings[key] for key in ("rope_theta", "partial_rotary_factor") if key in settings}
            settings["rope_parameters"] = {"rope_type": "default", **rope}
        if "window_size" in settings:
            kinds = [["global", "local"][local] for local in config.local_layers]
            settings |= {"attention_types": [[kinds, 1]], "window_size": config.local_window or 256}
        back = _read_config(settings, Path("config.json"))[1]
        if back == config:
            return family, settings
        differ = [f.name for f in dataclasses.fields(config) if getattr(back, f.name) != getattr(config, f.name)]
        nearest = min(nearest or differ, differ, key=len)
    what = ", ".join(f"model.{field} {getattr(config, field)}" for field in nearest)
    raise UserError(f"no family of {', '.join(FAMILIES)} has a model with {what}: change it, or keep the model here")


def _canonical(config: ModelConfig) -> ModelConfig:
    """Return an equal model in which what follows from other fields, or has no effect, is as the defaults have it."""
    own = {"kv_heads": config.groups % config.heads, "mlp_width": config.mlp}
    own["head_width"] = 0 if config.head_dim * config.heads == config.width else config.head_dim
    idle = ("rope_base", "rotary_share") if config.positions == "learned" else ()
    idle += () if config.local_window else ("local_every",)
    return dataclasses.replace(config, **own, **{field: getattr(ModelConfig, field) for field in idle})


def _flat(settings: dict, path: Path) -> dict:
    """Return the settings with those of the rotary positions, old names and new, beside the others."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path} scales its rotary positions: this model does not, take another")
    old = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    named = {new: settings[name] for name, new in old.items() if name in settings}
    return settings | named | {key: rope[key] for key in old.values() if rope.get(key) is not None}


def _activation(theirs: Any, key: str, family: Family, path: Path) -> str:
    ours = _ACTIVATIONS.get(theirs) if isinstance(theirs, str) else None
    if ours is None or (ours == "swiglu") != ("blocks.mlp.gate_up" in family.modules):
        known = [name for name in _ACTIVATIONS if (name == "silu") == ("blocks.mlp.gate_up" in family.modules)]
        raise UserError(f"{path}: {key} is {theirs!r}, here it is one of {', '.join(known)}: take another model")
    return ours


def _locality(settings: dict, values: dict, path: Path) -> dict:
    """Return local_window and local_every of GPT-Neo's attention_types, a list of [kinds, repetitions]."""
    types = settings.get("attention_types") or [[["global", "local"], 12]]
    fits = sum(len(kinds) * times for kinds, times in types) == values["layers"]  # before anything of that length is made
    layers = tuple(kind == "local" for kinds, times in types for _ in range(times) for kind in kinds) if fits else ()
    for every in range(1, len(layers) + 2) if fits else ():
        window = values["local_window"] if any(layers) else 0
        local = {"local_window": window, "local_every": every}
        if ModelConfig(layers=values["layers"], **local).local_layers == layers:
            return local
    raise UserError(f"{path}: attention_types is no regular pattern of {values['layers']} layers: take another model")


def _number(settings: dict, key: str, path: Path, default: int | None = None) -> int:
    """Return a whole number; None in the file, where the family has a default, means that it follows from others: 0."""
    value = settings.get(key, default)
    if value is None and default is not None:
        return 0
    least = 0 if key not in settings else 1
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise UserError(f"{path}: {key} is {value!r}: it must be a whole number of 1 or more, and below 2^31")
    return value
