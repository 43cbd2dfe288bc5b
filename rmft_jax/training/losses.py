"""What is minimised: the loss of each target token, what it weighs, and their mean over the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rmft_jax.config import Config, LossConfig
from rmft_jax.kernels import MaskedBatch, early_learning_penalty, goldfish_mask, target_mask, token_nll
from rmft_jax.models.gpt import forward

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_DROPOUT = 0x64726F70  # stream of random bits


def dropout_key(seed: int, step: jax.Array) -> jax.Array:
    """Return the key of one step's dropout: the same in a resumed run as in an undisturbed one. step: int []."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _DROPOUT), step)


def token_weights(config: LossConfig, masked: MaskedBatch) -> jax.Array:
    """Return the weight of each next token in the loss, [B, N-1], as bool while the weights of origins are 1, else float32.

    It is 0 where the token is no target at all (`target_mask`) or the goldfish mask, given the tokens that the model is
    shown, drops it; else pii_weight, surrogate_weight or 1, by the token's origin.
    """
    weights = target_mask(masked.segment_ids)
    if config.goldfish != "none":
        kept = goldfish_mask(
            masked.tokens, masked.segment_ids, mode=config.goldfish, k=config.goldfish_k, context=config.goldfish_context
        )
        weights &= kept[:, 1:]
    if (config.pii_weight, config.surrogate_weight) != (1, 1):
        of_origin = jnp.array([1.0, config.pii_weight, config.surrogate_weight], jnp.float32)  # TEXT, PII, SURROGATE
        weights = weights * of_origin[masked.origin[:, 1:]]
    return weights


def token_losses(params: dict, config: Config, masked: MaskedBatch, *, average: dict | None = None, key=None) -> jax.Array:
    """Return the loss of each next token in nats, float32 [B, N-1]: cross entropy, with what loss.elr_weight adds to it.

    average: the average of the weights that early-learning regularization takes its targets from. key: of dropout. Either is
    needed only where it is switched on.
    """
    inputs = masked.tokens[:, :-1], masked.segment_ids[:, :-1]
    dtype = DTYPES[config.training.dtype]
    logits = forward(params, config.model, *inputs, dtype=dtype, dropout=config.training.dropout, key=key)
    losses = token_nll(logits, masked.tokens[:, 1:])
    if config.loss.elr_weight:
        targets = forward(jax.lax.stop_gradient(average), config.model, *inputs, dtype=dtype)
        losses += config.loss.elr_weight * early_learning_penalty(logits, targets)
    return losses


def weighted_mean(losses: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return sum(weights x losses) / sum(weights) over the global batch, 0 where no token weighs anything, and sum(weights).

    losses: float32 [B, T]; weights: bool or float32 [B, T]. Under `jit` the sums run over all devices and hosts.
    """
    total = jnp.sum(weights)
    return jnp.sum(losses * weights) / jnp.where(total > 0, total, 1), total


def loss_and_gradient(params: dict, config: Config, masked: MaskedBatch, *, average=None, key=None) -> tuple[dict, dict]:
    """Return the gradient of the mean loss over the batch, and metrics: loss, targets (the sum of the weights)."""

    def mean_loss(params):
        losses = token_losses(params, config, masked, average=average, key=key)
        return weighted_mean(losses, token_weights(config.loss, masked))

    (loss, targets), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return gradient, {"loss": loss, "targets": targets}
