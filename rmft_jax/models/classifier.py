"""Classifiers of small images for the studies: an MLP, a small convolutional net, and pre-activation ResNets."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

KINDS = ("mlp", "conv", "resnet18", "resnet34")
_RESNET = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class MLP(nnx.Module):
    """Fully connected layers with ReLU between them. Takes [B, ...], gives logits [B, classes]."""

    def __init__(self, features: int, widths: tuple[int, ...], classes: int, *, rngs: nnx.Rngs):
        sizes = (features, *widths, classes)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False)])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits. train: without effect here."""
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class ConvNet(nnx.Module):
    """3 x 3 convolutions that each halve the image, with ReLU; the mean over places; a linear layer.

    Written as matrix products: XLA's convolutions on CPU take 15 times as long inside a loop, and batched ones too.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], classes: int, *, rngs: nnx.Rngs):
        sizes = (channels, *widths)
        self.layers = nnx.List([nnx.Linear(9 * a, b, rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False)])
        self.out = nnx.Linear(sizes[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, [B, classes], of x [B, H, W, channels]. train: without effect here."""
        for layer in self.layers:
            x = nnx.relu(layer(_patches(x)))
        return self.out(jnp.mean(x, axis=(1, 2)))


def _patches(x: jax.Array) -> jax.Array:
    """Return the 3 x 3 surroundings of every second pixel, [B, H/2, W/2, 9 C], zeros beyond the edge."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)], axis=-1)


class _Block(nnx.Module):
    """Normalise, ReLU, convolve, twice; added to the input. Source: He et al. 2016, arXiv 1603.05027."""

    def __init__(self, before: int, width: int, stride: int, *, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in (before, width)])
        self.convs = nnx.List([conv(before, width, (3, 3), strides=stride), conv(width, width, (3, 3))])
        self.shortcut = conv(before, width, (1, 1), strides=stride) if stride > 1 or before != width else None

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nnx.relu(self.norms[0](x, use_running_average=not train))
        skip = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        return skip + self.convs[1](nnx.relu(self.norms[1](y, use_running_average=not train)))


class ResNet(nnx.Module):
    """A pre-activation ResNet for 32 x 32 images: widths 64 to 512 in four stages, the last three halving the image."""

    def __init__(self, channels: int, blocks: tuple[int, ...], classes: int, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(channels, 64, (3, 3), use_bias=False, rngs=rngs)
        stages = [64 * 2**n for n, count in enumerate(blocks) for _ in range(count)]
        before = [64, *stages[:-1]]
        self.blocks = nnx.List([_Block(a, b, 2 if a != b else 1, rngs=rngs) for a, b in zip(before, stages, strict=True)])
        self.norm = nnx.BatchNorm(stages[-1], momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(stages[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, [B, classes], of x [B, H, W, channels]. train: normalise by the batch's own statistics."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x, train)
        x = nnx.relu(self.norm(x, use_running_average=not train))
        return self.out(jnp.mean(x, axis=(1, 2)))


def make_classifier(kind: str, shape: tuple[int, ...], classes: int, widths: tuple[int, ...], key: jax.Array) -> nnx.Module:
    """Return one of KINDS for images of a shape (H, W, channels). widths: of the layers of an mlp or a conv."""
    rngs = nnx.Rngs(params=key)
    if kind == "mlp":
        return MLP(shape[0] * shape[1] * shape[2], widths, classes, rngs=rngs)
    if kind == "conv":
        return ConvNet(shape[2], widths, classes, rngs=rngs)
    return ResNet(shape[2], _RESNET[kind], classes, rngs=rngs)
