"""AdamW with warm-up and decay."""

from __future__ import annotations

import jax
import optax

from rmft_jax.config import TrainingConfig


def learning_rate_schedule(config: TrainingConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up, then linear or cosine decay to the final ratio at `steps`."""
    warmup = min(config.warmup_steps, max(0, steps - 1))
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_ratio
    decay_steps = max(1, steps - warmup)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_learning_rate_ratio)
    else:
        decay = optax.linear_schedule(peak, final, decay_steps)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), decay], [warmup])


def make_optimizer(config: TrainingConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter, arXiv 1711.05101): weight decay on matrices only, gradients clipped by norm."""
    clip = [optax.clip_by_global_norm(config.gradient_clip)] if config.gradient_clip else []
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "key", "") in ("kernel", "embed"), params
        ),
    )
    return optax.chain(*clip, adamw)
