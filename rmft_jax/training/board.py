"""Where scalars of a run are drawn: TensorBoard on a disk, Weights & Biases if a project is named."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rmft_jax.config import Config
from rmft_jax.errors import UserError
from rmft_jax.paths import is_remote


class Board:
    """Scalars by name and step, sent to each service in use."""

    def __init__(self, directory: Path, config: Config, begin: int):
        """directory: of the run. begin: the step to go on from; what TensorBoard has after it goes.

        What leaves the machine for Weights & Biases are the scalars, the model's shape and the settings of training: no
        text, no paths, no vocabulary. Raises UserError where `training.wandb` names a project and wandb is not installed.
        """
        self._writer: Any = None
        self._wandb: Any = None
        if not is_remote(directory):  # whose files cannot grow
            import tensorboardX

            self._writer = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=begin)
        if config.training.wandb:
            wandb = load_wandb()
            names = ("model", "training", "loss", "dedup", "privacy")
            sections = {name: dict(vars(getattr(config, name))) for name in names}
            sections["training"].pop("init_from")
            about = {"project": config.training.wandb, "name": config.run_name, "config": sections}
            place = {} if is_remote(directory) else {"dir": str(directory)}
            self._wandb = wandb.init(**place, **about)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Draw one value."""
        if self._writer:
            self._writer.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({name: value, "step": step})

    def close(self) -> None:
        """Send what is left."""
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()


def load_wandb() -> Any:
    """Return the module, or say how to get it."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError("training.wandb needs wandb: pip install 'rmft-jax[wandb]', or leave it empty") from None
