"""Variational autoencoders trained on folds of a set of images, many at once, and what each thinks of every image."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rmft_jax.kernels import importance_weighted_log_likelihood
from rmft_jax.models.vae import elbo, gaussian_log_density, make_vae
from rmft_jax.progress import track
from rmft_jax.study_config import FoldedImagesConfig
from rmft_jax.training.members import Members, epoch_orders

_IMAGES, _SAMPLES = 64, 16  # held at once when likelihoods are estimated


class Runs(NamedTuple):
    """What comes of the runs. log_likelihood: float32 [points in time, runs, N], of every image, in nats;
    images: float32 [runs, samples, H, W, channels], mean images of latents drawn from the prior, at the end."""

    log_likelihood: np.ndarray
    images: np.ndarray


def fold_rows(count: int, folds: int, repetitions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut `count` points into `folds` equal folds at random, `repetitions` times.

    Returns: rows int [R, n], what each of R = repetitions x folds runs trains on, and trained_on bool [R, N], where
    N = count - count % folds: the last points, which do not fill the folds up, are left out.
    """
    size = count // folds
    rows, trained = [], np.ones((repetitions * folds, size * folds), bool)
    for repetition in range(repetitions):
        order = np.random.default_rng([seed, repetition]).permutation(size * folds)
        for fold in range(folds):
            held_out = order[fold * size : (fold + 1) * size]
            trained[len(rows), held_out] = False
            rows.append(np.flatnonzero(trained[len(rows)]))
    return np.stack(rows), trained


class FoldTrainer:
    """VAEs, one for each row of `rows`, and the programs that train and question them."""

    def __init__(
        self, config: FoldedImagesConfig, images: np.ndarray, rows: np.ndarray, seeds: np.ndarray, rates: np.ndarray
    ):
        """images: float32 [N, H, W, channels]. rows: int [R, n], what each run trains on. seeds: int [R], of the initial
        parameters, the order and the noise. rates: float [R], the learning rates of Adam."""
        self._config, self._rows, self._seeds = config, rows, seeds
        self._group = group = Members(len(rows), together=config.together)
        init, *programs = (
            group.compile(program) for program in _programs(config, images.shape[1:], len(images) // config.folds)
        )
        self._train, self._score, self._draw = programs
        self._own = group.own((np.asarray(seeds, np.int32), np.asarray(rates, np.float32)))
        self._images, self._none = group.shared(images), group.shared(np.zeros(0))
        self._state = init((), self._own, self._none)

    def epoch(self, number: int) -> np.ndarray:
        """Take an epoch, the `number`-th; return the loss of each step, float32 [runs, steps]."""
        order = self._group.own(epoch_orders(self._rows, number, self._seeds, self._config.batch_size))
        self._state, losses = self._train(self._state, (self._own, order), self._images)
        return np.asarray(losses)

    def log_likelihood(self) -> np.ndarray:
        """Return log p(x) of every image under each run, float32 [runs, N], in nats."""
        self._state, scores = self._score(self._state, self._own, self._images)
        return np.asarray(scores)

    def draw(self) -> np.ndarray:
        """Return mean images of latents drawn from the prior, float32 [runs, N / folds, H, W, channels]."""
        self._state, drawn = self._draw(self._state, self._own, self._none)
        return np.asarray(drawn)


def train_folds(
    config: FoldedImagesConfig, images: np.ndarray, rows: np.ndarray, seeds: np.ndarray, rates: np.ndarray, *, title: str
) -> Runs:
    """Train the runs of a FoldTrainer; take likelihoods at each epoch of config.score_at, and samples at the end."""
    trainer, found = FoldTrainer(config, images, rows, seeds, rates), []
    for epoch in track(range(config.score_at[-1]), title, config.score_at[-1]):
        trainer.epoch(epoch)
        if epoch + 1 in config.score_at:
            found.append(trainer.log_likelihood())
    return Runs(np.stack(found), trainer.draw())


def _programs(config: FoldedImagesConfig, shape: tuple[int, ...], samples: int):
    """Return the functions of one member: its first state, an epoch, its scores, its samples."""
    make = functools.partial(make_vae, config.model, shape, config.widths, config.latent)
    graph, optimizer = nnx.graphdef(jax.eval_shape(make, jax.random.key(0))), optax.scale_by_adam()
    model_of = lambda params: nnx.merge(graph, nnx.State(params))  # noqa: E731

    def init(_, own, shared):
        params = nnx.to_pure_dict(nnx.state(make(jax.random.key(own[0])), nnx.Param))
        return {"params": params, "optimizer": optimizer.init(params), "step": jnp.int32(0)}

    def train(state, own, images):
        (seed, rate), order = own

        def step(state, rows):
            key = jax.random.fold_in(jax.random.key(seed + 1), state["step"])
            loss = lambda params: -jnp.mean(elbo(model_of(params), images[rows], key))  # noqa: E731
            value, gradient = jax.value_and_grad(loss)(state["params"])
            updates, memory = optimizer.update(gradient, state["optimizer"])
            params = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
            return {"params": params, "optimizer": memory, "step": state["step"] + 1}, value

        return jax.lax.scan(step, state, order)

    def score(state, own, images):
        model, key = model_of(state["params"]), jax.random.fold_in(jax.random.key(own[0] + 2), state["step"])

        def of_images(batch):
            x, number = batch
            return log_likelihood(model, x, jax.random.fold_in(key, number), config.samples)

        count = -(-len(images) // _IMAGES)
        padded = jnp.pad(images, ((0, count * _IMAGES - len(images)), *[(0, 0)] * 3))
        found = jax.lax.map(of_images, (padded.reshape(count, _IMAGES, *shape), jnp.arange(count)))
        return state, found.reshape(-1)[: len(images)]

    def draw(state, own, shared):
        z = jax.random.normal(jax.random.key(own[0] + 3), (samples, config.latent))
        return state, model_of(state["params"]).mean_image(z)

    return init, train, score, draw


def log_likelihood(model: nnx.Module, x: jax.Array, key: jax.Array, samples: int) -> jax.Array:
    """Return the importance-sampled estimate of log p(x), float32 [B], from q(z|x). samples: a multiple of 16, or fewer.

    model: with encode and log_likelihood, as those of `models.vae`. x: [B, H, W, channels].
    """
    mean, log_variance = model.encode(x)
    at_once = min(samples, _SAMPLES)

    def one(key):
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        joint = model.log_likelihood(x, z) + gaussian_log_density(z, jnp.zeros(()), jnp.zeros(()))
        return joint, gaussian_log_density(z, mean, log_variance)

    joint, proposal = jax.lax.map(jax.vmap(one), jax.random.split(key, (samples // at_once, at_once)))
    flat = (a.reshape(-1, len(x)) for a in (joint, proposal))
    return importance_weighted_log_likelihood(*flat)
