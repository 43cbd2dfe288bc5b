"""The contrastive loss of dual encoders, on one device or over a batch that is split over several."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def contrastive_loss(image: jax.Array, text: jax.Array, scale: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Return the mean cross entropy of finding each image's text, and each text's image, among all of the batch.

    image, text: float32 [B, D], row n of one belongs to row n of the other. scale: float32 [], of the inner products.
    axis_name: of the mesh axis over which the batch is split, inside `jax.shard_map`: image and text are this device's rows,
      and the loss is theirs; its mean over devices is that of the whole batch. No device holds more than [B, B of all]
      logits. Under `check_vma=False` take the gradient of this loss, then the mean of both over devices.

    Source: Radford et al. 2021, arXiv 2103.00020, figure 3.
    """
    every_image, every_text, first = image, text, jnp.int32(0)
    if axis_name is not None:
        every_image, every_text = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (image, text))
        first = jax.lax.axis_index(axis_name) * len(image)
    of_text = -_log_share(scale * image @ every_text.T, first)
    of_image = -_log_share(scale * text @ every_image.T, first)
    return 0.5 * jnp.mean(of_text + of_image)


def _log_share(logits: jax.Array, first) -> jax.Array:
    """Return the log softmax of each row's own column, [B]: row n belongs to column first + n."""
    own = jnp.take_along_axis(logits, first + jnp.arange(len(logits))[:, None], axis=1)[:, 0]
    return own - jax.nn.logsumexp(logits, axis=1)
