"""Greedy decoding of a batch of left-padded prompts, as one compiled program."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rmft_jax.config import ModelConfig
from rmft_jax.models.gpt import decode, prefill, unstack


def make_greedy_decoder(
    config: ModelConfig, *, new_tokens: int, end_id: int, dtype=jnp.float32, read: Callable | None = None
) -> Callable:
    """Return a jitted `(params, tokens, valid, *more) -> int32 [B, new_tokens]`.

    tokens: int32 [B, P], prompts padded at the left, so that what follows a prompt follows its last token.
    valid: bool [B, P], False on padding. After `end_id` a row holds nothing but `end_id`.
    read: (features [B, E], output matrix [E, V], *more) -> [B, V], of which the largest is the next token, such as
      probabilities from a datastore and the weights together; None = the logits, and there is no more.

    Parameters split over a mesh (`training.mesh.shardings_for`) stay so, and the cache is split with them, where the first
    call is made within `training.mesh.placement`; B must then divide by the axes of the batch.
    """

    def generate(params, tokens, valid, *more):
        batch, length = tokens.shape
        params = unstack(params, dtype)
        output = params["output"]["kernel"]
        if read:  # without an output matrix, prefill and decode give the features
            params = params | {"output": {"kernel": jnp.eye(config.width, dtype=dtype)}}
        logits, cache = prefill(params, config, tokens, valid, cache_length=length + new_tokens)
        room = jnp.zeros((batch, new_tokens), bool)
        valid = jnp.concatenate([valid, room], axis=1)

        def pick(found, ended):
            token = jnp.where(ended, end_id, _argmax(read(found, output, *more) if read else found))
            return token, ended | (token == end_id)

        def step(carry, at):
            token, ended, valid, cache = carry
            valid = valid.at[:, at].set(True)
            logits, cache = decode(params, config, token, at, valid, cache)
            following, ended = pick(logits, ended)
            return (following, ended, valid, cache), token

        first, ended = pick(logits, jnp.zeros(batch, bool))
        positions = length + jnp.arange(new_tokens - 1)
        (last, *_), before = jax.lax.scan(step, (first, ended, valid, cache), positions)
        return jnp.concatenate([before.T, last[:, None]], axis=1)

    return jax.jit(generate)


def _argmax(logits):
    """Return the first index of the largest value, int32 [B]; on CPU faster than `jnp.argmax`."""
    number = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.min(jnp.where(logits == logits.max(axis=-1, keepdims=True), number, logits.shape[-1] - 1), axis=-1)
