"""A dual encoder as CLIP has it: an image tower and a text tower that meet in one space of unit vectors.

The text tower is the project's own GPT, read at the token that ends the caption; a vision transformer is made of the same
blocks, without the causal mask. Source: Radford et al. 2021, arXiv 2103.00020, section 2.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from rmft_jax.config import ModelConfig
from rmft_jax.kernels import attention
from rmft_jax.models import classifier, gpt
from rmft_jax.study_config import DualEncoderConfig

KINDS = (*classifier.KINDS[:2], "vit")
FIRST_SCALE = 1 / 0.07  # of the logits: one over the temperature


class VisionTransformer(nnx.Module):
    """Blocks of the GPT over patches of an image, which all see each other; the mean over patches; a linear layer.

    Source: Dosovitskiy et al. 2020, arXiv 2010.11929.
    """

    def __init__(self, config: ModelConfig, shape: tuple[int, ...], patch: int, outputs: int, *, rngs: nnx.Rngs):
        self.patch, self.scale = patch, config.attention_scale
        count = (shape[0] // patch) * (shape[1] // patch)
        self.into = nnx.Linear(patch * patch * shape[2], config.width, rngs=rngs)
        self.positions = nnx.Param(config.width**-0.5 * jax.random.normal(rngs.params(), (count, config.width)))
        self.blocks = nnx.List([gpt.Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, use_fast_variance=False, rngs=rngs)
        self.out = nnx.Linear(config.width, outputs, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return [B, outputs] of images [B, H, W, channels]. train: without effect here."""
        batch, height, width, channels = x.shape
        p = self.patch
        patches = x.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
        x = self.into(patches.reshape(batch, -1, p * p * channels)) + self.positions[...]
        mask = jnp.ones((batch, x.shape[1], x.shape[1]), bool)
        for block in self.blocks:
            x, _ = block(x, None, lambda q, k, v: (attention(q, k, v, mask, self.scale), None))
        return self.out(jnp.mean(self.norm(x), axis=1))


def _make_image_tower(config: DualEncoderConfig, shape: tuple[int, ...], key: jax.Array) -> nnx.Module:
    if config.image == "vit":
        return VisionTransformer(_text_config(config, rotary=False), shape, config.patch, config.dimensions,
                                 rngs=nnx.Rngs(params=key))  # fmt: skip
    return classifier.make_classifier(config.image, shape, config.dimensions, config.widths, key)


def _text_config(config: DualEncoderConfig, *, rotary: bool = True) -> ModelConfig:
    more = {} if rotary else {"positions": "learned"}
    return ModelConfig(layers=config.layers, width=config.width, heads=config.heads, **more)


@functools.cache
def _image_graph(config: DualEncoderConfig, shape: tuple[int, ...]):
    return nnx.graphdef(nnx.eval_shape(functools.partial(_make_image_tower, config, shape), jax.random.key(0)))


def init_dual_encoder(config: DualEncoderConfig, vocab_size: int, shape: tuple[int, ...], key: jax.Array) -> dict:
    """Return float32 parameters: image, text, projection [E, D], and log_scale [], of the logits.

    shape: (H, W, channels) of the images.
    """
    image_key, text_key, out_key = jax.random.split(key, 3)
    image = nnx.to_pure_dict(nnx.state(_make_image_tower(config, shape, image_key), nnx.Param))
    return {
        "image": image,
        "text": gpt.init_params(_text_config(config), vocab_size, text_key),
        "projection": config.width**-0.5 * jax.random.normal(out_key, (config.width, config.dimensions)),
        "log_scale": jnp.float32(math.log(FIRST_SCALE)),
    }


def encode_images(params: dict, config: DualEncoderConfig, images: jax.Array) -> jax.Array:
    """Return unit vectors, float32 [B, D], of images float32 [B, H, W, channels]."""
    tower = nnx.merge(_image_graph(config, images.shape[1:]), nnx.State(params["image"]))
    return _unit(tower(images, True))


def encode_texts(params: dict, config: DualEncoderConfig, tokens: jax.Array) -> jax.Array:
    """Return unit vectors, float32 [B, D], of captions int32 [B, T], 0 after their last token, at which they are read."""
    valid = tokens > 0
    hidden = gpt.hidden(params["text"], _text_config(config), tokens, valid.astype(jnp.int32))
    last = jnp.maximum(jnp.sum(valid, axis=1) - 1, 0)
    return _unit(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0] @ params["projection"])


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
