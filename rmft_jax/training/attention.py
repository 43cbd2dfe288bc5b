"""Which attention a run computes with, decided once before anything is compiled."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from rmft_jax.config import Config
from rmft_jax.errors import UserError
from rmft_jax.kernels import FUSED_ATTENTION, why_not_fused
from rmft_jax.progress import say


def choose_attention(config: Config, mesh: Mesh) -> Config:
    """Return the config with training.attention as a name: a fused kernel's, or xla.

    auto takes the kernel of this platform where it can serve, and else says why it does not. Raises UserError, with the
    reason, where a kernel was named that cannot serve.
    """
    wanted, platform = config.training.attention, jax.default_backend()
    if wanted in FUSED_ATTENTION and (reason := _why_not(config, mesh, wanted, platform)):
        raise UserError(f"training.attention {wanted} cannot serve here: {reason}; use auto or xla")
    if wanted == "auto":
        wanted = next((name for name, its in FUSED_ATTENTION.items() if its == platform), "xla")
        if wanted != "xla" and (reason := _why_not(config, mesh, wanted, platform)):
            say(f"attention: xla and not {wanted}, since {reason}; the scores of all pairs of tokens will be in memory")
            wanted = "xla"
    return dataclasses.replace(config, training=dataclasses.replace(config.training, attention=wanted))


def fused_name(config: Config) -> str:
    """Return the fused kernel that a config names, "" = plain XLA, which `auto` means where nothing was chosen."""
    return config.training.attention if config.training.attention in FUSED_ATTENTION else ""


def _why_not(config: Config, mesh: Mesh, name: str, platform: str) -> str:
    if mesh.shape["context"] > 1:
        return f"mesh.context is {mesh.shape['context']}, and the kernel needs whole rows"
    if config.privacy.on:
        return "DP-SGD takes the gradient of each row alone"
    if config.training.objective == "masked":
        return "a masked language model reads in both directions"
    model, length = config.model, config.training.sequence_length
    shape = {"head_dim": model.head_dim, "length": length, "local_window": model.local_window}
    return why_not_fused(name, platform=platform, **shape)
