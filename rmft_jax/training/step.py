"""The compiled programs: input step + train step in one, and the evaluation step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rmft_jax.config import Config
from rmft_jax.kernels import MaskedBatch, SurrogateBank, TaggedBatch, mask_batch, target_mask, token_nll
from rmft_jax.models.gpt import forward, init_params
from rmft_jax.training.masking import masking_key, masking_rules
from rmft_jax.training.mesh import batch_sharding, replicated, shardings_for

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def init_state(config: Config, vocab_size: int, identities: int, optimizer: optax.GradientTransformation) -> dict:
    """Return the train state at step 0, a plain dict: params, optimizer, seen (bool [identities]), step."""
    params = init_params(config.model, vocab_size, jax.random.key(config.seed, impl="threefry2x32"))
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "seen": jnp.zeros(identities, bool),
        "step": jnp.zeros((), jnp.int32),
    }


def loss_fn(params: dict, config: Config, masked: MaskedBatch) -> tuple[jax.Array, jax.Array]:
    """Return the mean loss over the targets of the whole batch, and their number."""
    segments = masked.segment_ids
    logits = forward(
        params, config.model, masked.tokens[:, :-1], segments[:, :-1], dtype=DTYPES[config.training.dtype]
    )
    targets = target_mask(segments)
    count = jnp.maximum(jnp.sum(targets), 1)
    return jnp.sum(token_nll(logits, masked.tokens[:, 1:]) * targets) / count, count


def train_step(
    state: dict, batch: TaggedBatch, bank: SurrogateBank, *, config: Config, optimizer: optax.GradientTransformation
) -> tuple[dict, dict]:
    """Mask the batch, take one optimizer step, and note which true PII values the model was shown.

    batch holds the rows as tagged: masking happens here, inside the compiled program. Returns the new state and metrics.
    """
    masked = mask_batch(
        batch,
        bank,
        masking_key(config.seed),
        length=config.training.sequence_length + 1,
        rules=masking_rules(config),
    )
    (loss, targets), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], config, masked)
    updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
    identity = jnp.where(masked.shown, batch.span_identity, state["seen"].size)  # beyond the end: dropped
    new = {
        "params": optax.apply_updates(state["params"], updates),
        "optimizer": optimizer_state,
        "seen": state["seen"].at[identity].set(True, mode="drop"),
        "step": state["step"] + 1,
    }
    metrics = {
        "loss": loss,
        "targets": targets,
        "gradient_norm": optax.global_norm(gradients),
        "seen": jnp.sum(new["seen"]),
        "cut_tokens": jnp.sum(masked.cut),
    }
    return new, metrics


def compile_train_step(config: Config, optimizer, mesh: Mesh, state: dict) -> Callable:
    """Return the jitted train step `(state, batch, bank) -> (state, metrics)`; the state's buffers are reused."""
    everywhere = replicated(mesh)
    state_shardings = shardings_for(state, mesh)

    def step(state, batch, bank):
        return train_step(state, batch, bank, config=config, optimizer=optimizer)

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(mesh), everywhere),
        out_shardings=(state_shardings, everywhere),
    )


def compile_eval_step(config: Config, mesh: Mesh) -> Callable:
    """Return the jitted `(params, batch) -> (nll float32 [B, W-1], is_target, is_pii)` on unmasked rows."""

    def step(params, batch: TaggedBatch):
        segments = batch.segment_ids
        logits = forward(
            params, config.model, batch.tokens[:, :-1], segments[:, :-1], dtype=DTYPES[config.training.dtype]
        )
        is_pii = batch.component[:, 1:] > 0
        return token_nll(logits, batch.tokens[:, 1:]), target_mask(segments), is_pii

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))
