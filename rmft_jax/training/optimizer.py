"""The optimizers, with warm-up and decay; gradients clipped by norm, weight decay on matrices only."""

from __future__ import annotations

import jax
import optax

from rmft_jax.config import TrainingConfig


def learning_rate_schedule(config: TrainingConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up, then the schedule's decay to the final ratio at `steps`.

    linear and cosine decay from the warm-up on, wsd (Hu et al. 2024, arXiv 2404.06395) linearly over the last
    `decay_share` of the steps.
    """
    warmup = min(config.warmup_steps, max(0, steps - 1))
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_ratio
    parts, borders = [optax.linear_schedule(0.0, peak, max(1, warmup))], [warmup]
    if config.schedule == "wsd":
        stable_until = max(warmup, steps - round(config.decay_share * steps))
        parts, borders = [*parts, optax.constant_schedule(peak)], [warmup, stable_until]
    decay_steps = max(1, steps - borders[-1])
    if config.schedule == "cosine":
        parts.append(optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_learning_rate_ratio))
    else:
        parts.append(optax.linear_schedule(peak, final, decay_steps))
    return optax.join_schedules(parts, borders)


def make_optimizer(config: TrainingConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer that training.optimizer names.

    adamw: Loshchilov & Hutter, arXiv 1711.05101. adafactor: Shazeer & Stern, 1804.04235, its steps relative to the size of
    the parameters. lion: Chen et al., 2302.06675. muon: the matrices of the blocks by orthogonalised momentum (Jordan et al.
    2024), scaled as Liu et al., 2502.16982, so that AdamW's learning rates and weight decay fit; AdamW on the rest.
    """
    rate, decay = learning_rate_schedule(config, steps), config.weight_decay
    if config.optimizer == "adamw":
        rule = optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=decay, mask=_matrices)
    elif config.optimizer == "lion":
        rule = optax.lion(rate, b1=config.beta1, b2=config.beta2, weight_decay=decay, mask=_matrices)
    elif config.optimizer == "adafactor":
        rule = optax.adafactor(rate)
    else:
        betas = {"beta": 0.95, "adam_b1": config.beta1, "adam_b2": config.beta2}
        rule = optax.contrib.muon(rate, **betas, consistent_rms=0.2, muon_weight_dimension_numbers=_stacked_matrices)
    if config.optimizer in ("adafactor", "muon"):  # whose own decay is another, or spares no vector
        rule = optax.chain(rule, optax.add_decayed_weights(lambda step: -decay * rate(step), mask=_matrices))
    clip = [optax.clip_by_global_norm(config.gradient_clip)] if config.gradient_clip else []
    return optax.chain(*clip, rule)


def _matrices(params: dict):
    matrices = ("kernel", "embed", "lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") in matrices, params)


def _stacked_matrices(params: dict):
    """Return muon's dimension numbers: for matrices of blocks [L, inputs, outputs] each layer alone; None elsewhere."""

    def numbers(path, leaf):
        names = [getattr(key, "key", "") for key in path]
        stacked = names[0] == "blocks" and names[-1] in ("kernel", "lora_a", "lora_b")
        return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1) if stacked else None

    return jax.tree_util.tree_map_with_path(numbers, params)
