"""LoRA: matrices of the blocks stay as they are, and what is trained is added to each as a product of two thin ones.

With adapters a parameter tree has one more key, `adapters`: {scale: float32 [], blocks: {attention: {qkv: {lora_a [L, I, R],
lora_b [L, R, O]}, ...}, mlp: {...}}}. `models.gpt` then computes x W + scale (x A) B, so that no gradient of W is made.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1. Where our matrices hold several of theirs side by side (query, key and
value; gate and up), these share A, and each has its own columns of B.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rmft_jax.config import LoraConfig

# What lora.targets calls a matrix -> where it stands in a block, the first that is there.
_MODULES = {
    "qkv": (("attention", "qkv"),),
    "out": (("attention", "out"),),
    "up": (("mlp", "gate_up"), ("mlp", "up")),
    "down": (("mlp", "down"),),
}


def init_adapters(params: dict, config: LoraConfig, key: jax.Array) -> dict:
    """Return adapters for the blocks of `params`, {blocks: ...} of float32 arrays, without the scale.

    A is normal with deviation inputs ** -0.5, B zero, so that nothing changes yet.
    """
    blocks: dict = {}
    for number, target in enumerate(config.targets):
        part, name = next(place for place in _MODULES[target] if place[1] in params["blocks"][place[0]])
        layers, inputs, outputs = params["blocks"][part][name]["kernel"].shape
        draws = jax.random.normal(jax.random.fold_in(key, number), (layers, inputs, config.rank))
        blocks.setdefault(part, {})[name] = {
            "lora_a": draws * inputs**-0.5,
            "lora_b": jnp.zeros((layers, config.rank, outputs)),
        }
    return {"blocks": blocks}


def with_adapters(params: dict, adapters: dict, scale: jax.Array) -> dict:
    """Return the parameters with adapters, as `models.gpt.hidden` computes with them. scale: alpha / rank, float32 []."""
    return params | {"adapters": adapters | {"scale": scale}}


def merge(params: dict) -> dict:
    """Return plain parameters of the same model: W + scale A B in the place of each W that has an adapter."""
    adapters = params.get("adapters")
    if not adapters:
        return params
    blocks = dict(params["blocks"])
    for part, modules in adapters["blocks"].items():
        blocks[part] = dict(blocks[part])
        for name, pair in modules.items():
            product = adapters["scale"] * jnp.einsum("lir,lro->lio", pair["lora_a"], pair["lora_b"])
            blocks[part][name] = blocks[part][name] | {"kernel": blocks[part][name]["kernel"] + product}
    return {name: value for name, value in params.items() if name != "adapters"} | {"blocks": blocks}
