"""DP-SGD: what one step does to gradients, and what privacy the whole run has.

Source: Abadi et al. 2016, arXiv 1607.00133. Clipping and noise are those of jax-privacy, accounting that of dp-accounting.

The privacy unit is one block of packed text: the guarantee bounds what the parameters tell about any one block; of a value
that stands in n blocks it says less, the more the larger n is. Neighbouring data sets differ in that one block counts for
nothing. What `prepare` makes of the corpus as a whole (tokenizer, ranks of occurrences, flagged duplicates) is taken as
given; the metrics and the list of values seen, which a run writes beside its parameters, are not covered. The noise follows
from the seed, so that a resumed run is the same run: whoever knows the seed can take it off again.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp

from rmft_jax.config import Config, PrivacyConfig
from rmft_jax.errors import UserError
from rmft_jax.kernels import MaskedBatch
from rmft_jax.training.losses import token_weights, weighted_loss, whole

_NOISE = 0x6E6F6973  # stream of random bits
UNIT = "one block of packed text; neighbouring data sets differ in that one block counts for nothing"
SAMPLING = {
    "poisson": "each block is in each step by an independent coin (the loader shuffles epochs instead: an estimate)",
    "shuffled": "each block is in one step of each epoch, as the loader has it; no amplification by sampling",
}


@dataclasses.dataclass(frozen=True)
class Accountant:
    """The privacy of a run: after how many steps how much epsilon is spent.

    blocks: of the training data. batch_size: blocks of a step. privacy: with noise_multiplier, epsilon 0.
    """

    privacy: PrivacyConfig
    blocks: int
    batch_size: int

    @property
    def delta(self) -> float:
        """Return delta, 1 / number of blocks unless it is set."""
        return self.privacy.delta or 1 / self.blocks

    def epsilon(self, steps: int, sampling: str = "") -> float:
        """Return epsilon after `steps` steps, under privacy.sampling or the other assumption."""
        return _epsilon(
            sampling or self.privacy.sampling,
            self.privacy.noise_multiplier,
            steps,
            self.blocks,
            self.batch_size,
            self.delta,
        )

    def describe(self, steps: int) -> dict:
        """Return what run.json says about the privacy after `steps` steps."""
        return {
            "epsilon": self.epsilon(steps),
            "delta": self.delta,
            "unit": UNIT,
            "sampling": self.privacy.sampling,
            "sampling_means": SAMPLING[self.privacy.sampling],
            "epsilon_by_sampling": {name: self.epsilon(steps, name) for name in SAMPLING},
            "noise_multiplier": self.privacy.noise_multiplier,
            "clip_norm": self.privacy.clip_norm,
            "steps": steps,
        }


def resolve_privacy(config: Config, blocks: int, steps: int) -> tuple[Config, Accountant | None]:
    """Return the config with privacy.noise_multiplier in place of a target epsilon, and the accountant (None: DP is off).

    Raises UserError without the extra [dp], and when a step takes more blocks than there are.
    """
    privacy, batch_size = config.privacy, config.training.batch_size
    if not privacy.on:
        return config, None
    for module in ("jax_privacy", "dp_accounting"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"privacy (DP-SGD) needs {module.replace('_', '-')}: pip install 'rmft-jax[dp]'")
    if batch_size > blocks:
        raise UserError(f"training.batch_size {batch_size} is more than the {blocks} blocks of the data: lower it")
    if privacy.epsilon:
        noise = _calibrate(Accountant(privacy, blocks, batch_size), steps)
        privacy = dataclasses.replace(privacy, epsilon=0.0, noise_multiplier=noise)
    return dataclasses.replace(config, privacy=privacy), Accountant(privacy, blocks, batch_size)


def private_gradient(
    trained: dict, config: Config, masked: MaskedBatch, *, step: jax.Array, frozen: dict | None = None, key=None
) -> tuple[dict, dict]:
    """Return a noised mean of clipped gradients, one gradient a block, and metrics. trained, frozen: as `whole` has them.

    (sum_b clip(gradient of block b) + noise) / B, where the norm of each summand is at most clip_norm and the noise has the
    standard deviation noise_multiplier x clip_norm. The loss of a block is the sum of its weighted token losses over the
    sequence length: dividing by the batch's number of targets would let one block change the gradients of the others.

    step: int [], which the noise depends on, besides config.seed. key: of dropout.
    Metrics: loss, targets as without privacy; clipped_share, of the blocks whose gradient was clipped.
    Raises UserError when privacy.epsilon is not resolved to a noise multiplier: the result would not be private.
    """
    from jax_privacy import clipped_grad
    from jax_privacy.noise_addition import gaussian_privatizer

    privacy, size = config.privacy, masked.tokens.shape[0]
    if privacy.epsilon or not privacy.noise_multiplier:
        raise UserError("privacy.epsilon is not resolved: call resolve_privacy before compiling the train step")

    def block_loss(trained, block: MaskedBatch, key):
        weights = token_weights(config.loss, block)
        params, key = whole(config, trained, frozen), None if key is None else key[0]
        weighted, _ = weighted_loss(params, config, block, weights, key=key)
        return weighted / config.training.sequence_length, (weighted, jnp.sum(weights))

    gradient_of = clipped_grad(
        block_loss,
        has_aux=True,
        l2_clip_norm=privacy.clip_norm,
        normalize_by=size,
        batch_argnums=(1, 2),
        return_grad_norms=True,
        microbatch_size=privacy.microbatch or None,
    )
    gradient, more = gradient_of(trained, masked, None if key is None else jax.random.split(key, size))
    noise = gaussian_privatizer(
        stddev=privacy.noise_multiplier * privacy.clip_norm / size, prng_key=noise_key(config.seed, step)
    )
    gradient, _ = noise.update(gradient, noise.init(gradient))
    losses, weights = (jnp.sum(values) for values in more.aux)
    return gradient, {
        "loss": losses / jnp.where(weights > 0, weights, 1),
        "targets": weights,
        "clipped_share": jnp.mean(more.grad_norms > privacy.clip_norm),
    }


def noise_key(seed: int, step: jax.Array) -> jax.Array:
    """Return the key of one step's noise. step: int []."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _NOISE), step)


def _epsilon(sampling: str, noise: float, steps: int, blocks: int, batch_size: int, delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian

    if not steps:
        return 0.0
    if sampling == "shuffled":
        return get_epsilon_gaussian(noise / math.sqrt(_squared_sensitivity(steps, blocks, batch_size)), delta)
    return float(_privacy_loss_of_a_step(noise, batch_size / blocks).self_compose(steps).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=1)
def _privacy_loss_of_a_step(noise: float, probability: float):
    """Return the privacy loss distribution (Koskela et al. 2020, arXiv 1906.03049) of one step with Poisson sampling."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(noise, sampling_prob=probability)


def _squared_sensitivity(steps: int, blocks: int, batch_size: int) -> int:
    """Return the most that the squares of one block's shares in all steps add up to, in units of clip_norm squared.

    Gaussian mechanisms with these sensitivities compose to one (Dong et al. 2022, arXiv 1905.02383, corollary 2): one share
    an epoch, but two in one step where the step reaches over the end of an epoch.
    """
    epochs = -(-steps * batch_size // blocks)
    return epochs if blocks % batch_size == 0 else 4 * (epochs // 2) + epochs % 2


def _calibrate(accountant: Accountant, steps: int) -> float:
    """Return the least noise multiplier (to 0.2%) that keeps epsilon after `steps` within privacy.epsilon."""
    target = accountant.privacy.epsilon

    def enough(noise: float) -> bool:
        privacy = dataclasses.replace(accountant.privacy, noise_multiplier=noise, epsilon=0.0)
        return dataclasses.replace(accountant, privacy=privacy).epsilon(steps) <= target

    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 2 * high
        if high > 1e4:
            raise UserError(f"privacy.epsilon {target} is out of reach at delta {accountant.delta:g}: raise it")
    while high - low > 2e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
