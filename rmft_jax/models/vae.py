"""Variational autoencoders of the memorization study: a Bernoulli one of dense layers, a Gaussian one of convolutions.

Source: van den Burg & Williams 2021, arXiv 2106.03216, appendix on architectures; Kingma & Welling 2013, arXiv 1312.6114.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

KINDS = ("mlp", "conv")
_LOG_2PI = math.log(2 * math.pi)


def gaussian_log_density(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Return the log density of a diagonal Gaussian, summed over the last axis. All float [..., D]."""
    return -0.5 * jnp.sum(_LOG_2PI + log_variance + (x - mean) ** 2 * jnp.exp(-log_variance), axis=-1)


class DenseVAE(nnx.Module):
    """Dense layers with ReLU around `latent` latent variables; every pixel a Bernoulli variable."""

    def __init__(self, shape: tuple[int, ...], widths: tuple[int, ...], latent: int, *, rngs: nnx.Rngs):
        sizes = (math.prod(shape), *widths)
        pairs = list(zip(sizes, sizes[1:], strict=False))
        self.shape, self.latent = shape, latent
        self.encoder = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
        self.to_latent = nnx.Linear(sizes[-1], 2 * latent, rngs=rngs)
        self.from_latent = nnx.Linear(latent, sizes[-1], rngs=rngs)
        self.decoder = nnx.List([nnx.Linear(b, a, rngs=rngs) for a, b in reversed(pairs)])

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and log variance of q(z|x), [B, latent] each, of images [B, H, W, channels]."""
        h = x.reshape(len(x), -1)
        for layer in self.encoder:
            h = nnx.relu(layer(h))
        return tuple(jnp.split(self.to_latent(h), 2, axis=-1))

    def _logits(self, z: jax.Array) -> jax.Array:
        h = nnx.relu(self.from_latent(z))
        for layer in self.decoder[:-1]:
            h = nnx.relu(layer(h))
        return self.decoder[-1](h)

    def log_likelihood(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Return log p(x|z), [B], of images of zeros and ones."""
        logits, pixels = self._logits(z), x.reshape(len(x), -1)
        return jnp.sum(pixels * logits - jax.nn.softplus(logits), axis=-1)

    def mean_image(self, z: jax.Array) -> jax.Array:
        """Return E[x|z], [B, H, W, channels]."""
        return jax.nn.sigmoid(self._logits(z)).reshape(-1, *self.shape)


class ConvVAE(nnx.Module):
    """4 x 4 convolutions that halve the image, and their mirror; every pixel a Gaussian with a variance of its own."""

    def __init__(self, shape: tuple[int, ...], widths: tuple[int, ...], latent: int, *, rngs: nnx.Rngs):
        sizes, pairs = (shape[2], *widths), list(zip((shape[2], *widths), widths, strict=False))
        self.latent = latent
        self.inner = (*(side // 2 ** len(widths) for side in shape[:2]), widths[-1])
        self.encoder = nnx.List([nnx.Conv(a, b, (4, 4), strides=2, rngs=rngs) for a, b in pairs])
        self.to_latent = nnx.Linear(math.prod(self.inner), 2 * latent, rngs=rngs)
        self.from_latent = nnx.Linear(latent, math.prod(self.inner), rngs=rngs)
        back = [(b, a) for a, b in reversed(pairs)]
        back[-1] = (back[-1][0], 2 * sizes[0])  # a mean and a log variance of each channel
        self.decoder = nnx.List([nnx.ConvTranspose(a, b, (4, 4), strides=2, rngs=rngs) for a, b in back])

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and log variance of q(z|x), [B, latent] each, of images [B, H, W, channels]."""
        for layer in self.encoder:
            x = nnx.relu(layer(x))
        return tuple(jnp.split(self.to_latent(x.reshape(len(x), -1)), 2, axis=-1))

    def _pixels(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = nnx.relu(self.from_latent(z)).reshape(-1, *self.inner)
        for layer in self.decoder[:-1]:
            h = nnx.relu(layer(h))
        mean, log_variance = jnp.split(self.decoder[-1](h), 2, axis=-1)
        return mean, jnp.maximum(log_variance, -6.0)  # a pixel that never varies would have an unbounded density

    def log_likelihood(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Return log p(x|z), [B], a density of pixels in [0, 1]."""
        flat = (a.reshape(len(x), -1) for a in (x, *self._pixels(z)))
        return gaussian_log_density(*flat)

    def mean_image(self, z: jax.Array) -> jax.Array:
        """Return E[x|z], [B, H, W, channels]."""
        return self._pixels(z)[0]


def make_vae(kind: str, shape: tuple[int, ...], widths: tuple[int, ...], latent: int, key: jax.Array) -> nnx.Module:
    """Return one of KINDS for images of a shape (H, W, channels)."""
    rngs = nnx.Rngs(params=key)
    return {"mlp": DenseVAE, "conv": ConvVAE}[kind](shape, widths, latent, rngs=rngs)


def elbo(model: nnx.Module, x: jax.Array, key: jax.Array) -> jax.Array:
    """Return the evidence lower bound of each image, [B], from one sample of q(z|x) and the exact divergence from p(z)."""
    mean, log_variance = model.encode(x)
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    divergence = 0.5 * jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1)
    return model.log_likelihood(x, z) - divergence
