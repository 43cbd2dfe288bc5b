"""Classifiers trained on partly wrong labels, many at once: cross entropy, early-learning regularization, ELR+, a control.

Source: Liu et al. 2020, arXiv 2007.00151.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rmft_jax.data.images import Images
from rmft_jax.kernels import average_weights, clipped_softmax, elr_loss, elr_update_target, kl_loss, mixup
from rmft_jax.models.classifier import make_classifier
from rmft_jax.progress import track
from rmft_jax.study_config import NoisyLabelsConfig
from rmft_jax.training.members import Members, epoch_orders

_SCORED = 512  # images at once


class Member(NamedTuple):
    """How each member is trained, arrays with a leading axis of members.

    seed: int32. elr, kl: float32, the weights of the two terms, of which one is 0. beta: float32, the targets' momentum.
    given: int32 [members, N], the labels it is trained on.
    """

    seed: np.ndarray
    elr: np.ndarray
    kl: np.ndarray
    beta: np.ndarray
    given: np.ndarray


def wrong_labels(
    labels: np.ndarray, share: float, kind: str, seed: int, *, classes: int, flips: dict[int, int] | None = None
) -> np.ndarray:
    """Return int32 [N]: the labels, a share of them wrong.

    labels: int [N]. kind: symmetric (a share of them is drawn anew, each class as likely) or asymmetric (a share of each
    class in `flips` becomes another class, flips[class]). Source: section 5 and appendix of arXiv 2007.00151.
    """
    rng = np.random.default_rng([seed, 7])
    given = labels.astype(np.int32).copy()
    if kind == "symmetric":
        chosen = rng.permutation(len(labels))[: round(share * len(labels))]
        given[chosen] = rng.integers(classes, size=len(chosen))
        return given
    for before, after in (flips or {}).items():
        of_class = np.flatnonzero(labels == before)
        given[rng.permutation(of_class)[: round(share * len(of_class))]] = after
    return given


def train_on_wrong_labels(config: NoisyLabelsConfig, images: Images, members: Member, *, plus: bool, title: str) -> dict:
    """Train the members; return what they get right after each round of config.score_every epochs.

    plus: ELR+, two networks each, targets from an average of the weights of the other, and mixup.
    Returns arrays [members, rounds]: test (accuracy), and of training images with a right label and a wrong one
    the shares whose likeliest class is the true one (clean, wrong_true) or the given one (wrong_given); and at the end
    suspects: bool [members, N], where the target's largest class is not the given label.
    """
    init, round_ = _programs(config, images, plus)
    group = Members(len(members.seed), together=config.together)
    rows = np.broadcast_to(np.arange(len(images.train)), members.given.shape)
    own, shared = group.own(members), group.shared(tuple(images)[:4])
    state = group.compile(init)((), own, ())
    program, curves, every = group.compile(round_), [], config.score_every
    for start in track(range(0, config.epochs, every), title, -(-config.epochs // every)):
        orders = [epoch_orders(rows, start + n, members.seed, config.batch_size) for n in range(every)]
        order = group.own(np.concatenate(orders, axis=1))
        state, scores = program(state, (own, order), shared)
        curves.append(jax.device_get(scores))
    out = {name: np.stack([scores[name] for scores in curves], axis=1) for name in curves[0]}
    target = np.asarray(state["target"]).mean(2)  # over networks
    return out | {"suspects": target.argmax(-1) != members.given}


def _programs(config: NoisyLabelsConfig, images: Images, plus: bool):
    """Return the functions that make a member's state and that take it through a round."""
    shape, classes, count = images.train.shape[1:], len(images.classes), len(images.train)
    networks, steps = 1 + plus, count // config.batch_size
    make = functools.partial(make_classifier, config.model, shape, classes, config.widths)
    graph = nnx.graphdef(jax.eval_shape(make, jax.random.key(0)))
    drops = {epoch * steps: 1 / config.drop for epoch in config.drop_at}
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(optax.piecewise_constant_schedule(config.learning_rate, drops), momentum=config.momentum),
    )

    def split(key):
        _, params, rest = nnx.split(make(key), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def apply(params, rest, x, train):
        """Return logits and what is not trained, the running statistics."""
        model = nnx.merge(graph, nnx.State(params), nnx.State(rest))
        logits = model(x, train)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    def init(_, member: Member, shared):
        key = jax.random.key(member.seed)
        params, rest = jax.vmap(split)(jax.random.split(key, networks))
        state = {"params": params, "rest": rest, "optimizer": jax.vmap(optimizer.init)(params), "step": jnp.int32(0)}
        state["target"] = jnp.zeros((count, networks, classes))
        return state | ({"average": params} if plus else {})

    def loss(params, rest, member, x, labels, target):
        """target: that of the other network's average under ELR+, else that of the step before."""
        logits, rest = apply(params, rest, x, True)
        if not plus:
            target = elr_update_target(target, clipped_softmax(logits), member.beta)
        losses = jnp.where(
            member.kl > 0, kl_loss(logits, labels, target, member.kl), elr_loss(logits, labels, target, member.elr)
        )
        return jnp.mean(losses), (rest, target)

    def mixed(state, member, x, labels, target, key):
        """Return the images, labels and targets of ELR+, mixed, and the targets as they were before that."""
        teachers = jax.tree.map(lambda a: a[::-1], (state["average"], state["rest"]))
        said = jax.vmap(lambda params, rest: clipped_softmax(apply(params, rest, x, True)[0]), out_axes=1)(*teachers)
        target = elr_update_target(target, said, member.beta)
        share = jax.random.beta(jax.random.fold_in(key, 1), config.mixup, config.mixup)
        partner = jax.random.permutation(jax.random.fold_in(key, 2), len(x))
        return mixup(jnp.maximum(share, 1 - share), partner, x, labels, target), target

    def step(state, rows, member, images):
        key = jax.random.fold_in(jax.random.key(member.seed + 1), state["step"])
        x = augmented(jax.random.fold_in(key, 0), images[rows]) if config.augment else images[rows]
        shown = (x, jax.nn.one_hot(member.given[rows], classes), state["target"][rows])
        if plus:
            shown, unmixed = mixed(state, member, *shown, key)
        gradients, (rest, target) = jax.vmap(
            jax.grad(loss, has_aux=True), in_axes=(0, 0, None, None, None, 1), out_axes=(0, (0, 1))
        )(state["params"], state["rest"], member, *shown)
        updates, memory = jax.vmap(optimizer.update)(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = state | {"params": params, "rest": rest, "optimizer": memory, "step": state["step"] + 1}
        new["target"] = state["target"].at[rows].set(unmixed if plus else target)
        if plus:
            new["average"] = average_weights(state["average"], params, state["step"], config.average_decay)
        return new

    def likeliest(state, x):
        """Return the class with the largest mean probability over the networks, int32 [N]."""

        def of_batch(x):
            logits = jax.vmap(lambda params, rest: apply(params, rest, x, False)[0])(state["params"], state["rest"])
            return jnp.argmax(jnp.mean(jax.nn.softmax(logits), axis=0), axis=-1)

        return jax.lax.map(lambda one: of_batch(one[None])[0], x, batch_size=_SCORED)

    def round_(state, own, shared):
        (member, order), (train, labels, test, test_labels) = own, shared
        state, _ = jax.lax.scan(lambda state, rows: (step(state, rows, member, train), None), state, order)
        found, wrong = likeliest(state, train), member.given != labels
        share = lambda hit, of: jnp.sum(hit & of) / jnp.maximum(jnp.sum(of), 1)  # noqa: E731
        return state, {
            "test": jnp.mean(likeliest(state, test) == test_labels),
            "clean": share(found == labels, ~wrong),
            "wrong_true": share(found == labels, wrong),
            "wrong_given": share(found == member.given, wrong),
        }

    return init, round_


def augmented(key: jax.Array, images: jax.Array) -> jax.Array:
    """Return images [B, H, W, C], each shifted by up to 4 pixels, zeros coming in, and half of them mirrored."""
    shift, mirror = jax.random.split(key)
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    start = jax.random.randint(shift, (count, 2), 0, 9)
    cut = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, channels)))
    moved = cut(padded, start)
    return jnp.where(jax.random.bernoulli(mirror, 0.5, (count, 1, 1, 1)), moved[:, :, ::-1], moved)
