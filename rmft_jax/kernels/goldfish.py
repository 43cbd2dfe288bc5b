"""Goldfish loss: which tokens are left out of the loss.

Source: Hans et al. 2024, arXiv 2406.10209, section 3: L = -sum_i G_i log p(x_i | x_<i) / sum_i G_i, with G_i = 0 for one
token in k. What the model was never trained on it has to guess, and a wrong guess leads it away from the text. The authors'
code looks a product of token ids up in a table, so that one id 0 drops (or keeps) every window that holds it; here the
window goes through MurmurHash3 instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

GOLDFISH = ("none", "static", "hash")


def goldfish_mask(tokens: jax.Array, segment_ids: jax.Array, *, mode: str, k: int, context: int = 13) -> jax.Array:
    """Return bool [B, N]: G_i, False for the tokens that must not be targets, one in k.

    mode: static drops the k-th, 2k-th, ... token of each row, counted from 1, whatever they are. hash drops a token iff the
      hash of the `context` tokens before it falls under 1 / k, so that repeated text drops the same tokens wherever it
      stands, and what one copy hides no other copy shows.
    tokens, segment_ids: int32 [B, N], segment 0 = padding. k: 2 or more.

    Raises: KeyError for an unknown mode.
    """
    kept = {
        "none": lambda: jnp.ones_like(tokens, bool),
        "static": lambda: jnp.broadcast_to(jnp.arange(1, tokens.shape[1] + 1) % k != 0, tokens.shape),
        "hash": lambda: window_hash(tokens, segment_ids, context) >= jnp.uint32(2**32 // k),
    }
    return kept[mode]()


def window_hash(tokens: jax.Array, segment_ids: jax.Array, context: int) -> jax.Array:
    """Return uint32 [B, N]: MurmurHash3 (x86, 32 bits, seed 0) of the up to `context` tokens before each one.

    tokens, segment_ids: int32 [B, N]; each token counts as four bytes, little-endian. Of a window that reaches over the
    start of the document (or row) the tokens inside are hashed. The other choice, to drop nothing there, would keep the
    headers of mail, full of addresses, in the loss of every copy.
    """
    length = tokens.shape[1]
    state = jnp.zeros(tokens.shape, jnp.uint32)
    count = jnp.zeros(tokens.shape, jnp.uint32)
    for back in range(min(context, length - 1), 0, -1):
        earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, :length]
        inside = jnp.pad(segment_ids, ((0, 0), (back, 0)), constant_values=-1)[:, :length] == segment_ids
        state = jnp.where(inside, _mix(state, earlier.astype(jnp.uint32)), state)
        count += inside
    return _finish(state ^ (4 * count))


def _rotate(x, left: int):
    return (x << left) | (x >> (32 - left))


def _mix(state, word):
    word = _rotate(word * jnp.uint32(0xCC9E2D51), 15) * jnp.uint32(0x1B873593)
    return _rotate(state ^ word, 13) * jnp.uint32(5) + jnp.uint32(0xE6546B64)


def _finish(x):
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
