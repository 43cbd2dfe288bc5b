"""Dual encoders trained on parts of one set of captioned images, many at once, with caption tokens masked on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmft_jax.data.captions import CaptionedImages, CaptionTokens
from rmft_jax.kernels import Rule, SurrogateBank, TaggedBatch, contrastive_loss, mask_batch
from rmft_jax.models.dual_encoder import encode_images, encode_texts, init_dual_encoder
from rmft_jax.progress import track
from rmft_jax.study_config import CaptionedSetConfig, DejaVuArmConfig
from rmft_jax.training.members import Members, epoch_orders

_SCORED = 500  # records at once
_WORD = 1  # the kind of every component here


class Member(NamedTuple):
    """How each model is trained, arrays with a leading axis of models.

    seed: int32, of the first parameters, the order and the masking. rule: int32, which of the rules hides its tokens.
    max_scale, weight_decay: float32.
    """

    seed: np.ndarray
    rule: np.ndarray
    max_scale: np.ndarray
    weight_decay: np.ndarray


class Embeddings(NamedTuple):
    """Unit vectors of all records under each model, float32 [models, N, D], and what epoch they are of."""

    epoch: int
    images: np.ndarray
    texts: np.ndarray


def train_dual_encoders(
    config: CaptionedSetConfig,
    data: CaptionedImages,
    tokens: CaptionTokens,
    rows: np.ndarray,
    seeds: np.ndarray,
    arms: list[DejaVuArmConfig],
    *,
    title: str,
) -> Iterator[Embeddings]:
    """Train one model for each row of `rows`; yield what they make of all records, at config.score_at and in the end.

    rows: int [models, n], the records that each is trained on. seeds, arms: of each model. Models of one seed start alike.
    With fewer models than devices, each model's batch is split over several.
    """
    shares = max(1, jax.device_count() // len(rows))
    group = Members(len(rows), together=config.together, devices_each=shares)
    rules = sorted({_rule(arm) for arm in arms}, key=str)
    member = Member(
        seed=np.asarray(seeds, np.int32),
        rule=np.array([rules.index(_rule(arm)) for arm in arms], np.int32),
        max_scale=np.array([arm.max_scale for arm in arms], np.float32),
        weight_decay=np.array([arm.weight_decay for arm in arms], np.float32),
    )
    steps = rows.shape[1] // config.batch_size * config.epochs
    init, train, embed = _programs(config, data.images.shape[1:], tokens, tuple(rules), steps, group)
    own, shared = group.own(member), group.shared((data.images, tokens.ids))
    state = group.compile(init)((), own, ())
    train, embed = group.compile(train), group.compile(embed)
    for epoch in track(range(1, config.epochs + 1), title, config.epochs):
        order = group.own(epoch_orders(rows, epoch, seeds, config.batch_size))
        state, _ = train(state, (own, order, group.own(np.full(len(rows), epoch, np.int32))), shared)
        if epoch in (*config.score_at, config.epochs):
            state, found = embed(state, own, shared)
            yield Embeddings(epoch, *map(np.asarray, found))


def _rule(arm: DejaVuArmConfig) -> Rule:
    policy = "bernoulli" if arm.masking else "none"
    return Rule(policy, p=arm.masking, anchor="none", replacement=arm.replacement)


def _programs(config: CaptionedSetConfig, shape, tokens: CaptionTokens, rules: tuple[Rule, ...], steps: int, group: Members):
    """Return the functions of one model: its first state, its epochs, its embeddings."""
    encoder, bank = config.encoder, caption_bank(tokens, len(rules))
    length = tokens.ids.shape[1]
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, max(1, steps // 20), max(2, steps))
    optimizer = optax.scale_by_adam(b2=0.98)

    def init(_, member: Member, shared):
        params = init_dual_encoder(encoder, tokens.vocab_size, shape, jax.random.key(member.seed))
        return {"params": params, "optimizer": optimizer.init(params), "step": jnp.int32(0)}

    def train(state, own, shared):
        (member, order, epoch), (images, ids) = own, shared
        key = jax.random.key(member.seed + 1)

        def loss(params, rows):
            batch = caption_batch(ids[rows], rows, member.rule, epoch)
            shown = mask_batch(batch, bank, key, length=length, rules=rules).tokens
            scale = jnp.minimum(jnp.exp(params["log_scale"]), member.max_scale)
            pair = encode_images(params, encoder, images[rows]), encode_texts(params, encoder, shown)
            return contrastive_loss(*pair, scale, axis_name=group.batch_axis)

        def step(state, rows):
            value, gradient = group.mean(jax.value_and_grad(loss)(state["params"], group.part(rows)))
            updates, memory = optimizer.update(gradient, state["optimizer"])
            now = rate(state["step"])
            params = jax.tree.map(
                lambda p, u: p - now * (u + member.weight_decay * p * (p.ndim > 1)), state["params"], updates
            )
            params["log_scale"] = jnp.minimum(params["log_scale"], jnp.log(member.max_scale))
            return {"params": params, "optimizer": memory, "step": state["step"] + 1}, value

        return jax.lax.scan(step, state, order)

    def embed(state, member, shared):
        images, ids = shared
        at_once = lambda encode, x: jax.lax.map(lambda one: encode(one[None])[0], x, batch_size=_SCORED)  # noqa: E731
        params = state["params"]
        return state, (
            at_once(functools.partial(encode_images, params, encoder), images),
            at_once(functools.partial(encode_texts, params, encoder), ids),
        )

    return init, train, embed


def caption_bank(tokens: CaptionTokens, types: int) -> SurrogateBank:
    """Return what stands for hidden tokens of captions: any token that captions have, or the mask, each of one piece.

    types: how many; all of them have the same.
    """
    words = np.array(sorted(set(np.unique(tokens.ids).tolist()) - {0}), np.int32)
    entries = np.array([0, *words, tokens.mask], np.int32)  # kind 0: literal text; 1: a word; 2: the mask; 3: nothing
    count = len(words)
    same = np.arange(4, dtype=np.int32)
    return SurrogateBank(
        tokens=entries,
        begins=np.array([*range(count + 2), 0], np.int32),
        lengths=np.array([0, *[1] * (count + 1), 0], np.int32),
        values=np.arange(count + 3, dtype=np.int32),
        first=np.array([0, 1, count + 1, count + 2], np.int32),
        counts=np.array([1, count, 1, 1], np.int32),
        anchor_class=np.full(4, -1, np.int32),
        anchors=np.zeros(types, np.int32),
        placeholder=np.full(types, 2, np.int32),
        empty=np.int32(3),
        recombined=same,
        look_alike=same,
        real=np.zeros(1, np.uint32),
    )


def caption_batch(ids: jax.Array, rows: jax.Array, rule: jax.Array, epoch: jax.Array) -> TaggedBatch:
    """Return captions as tagged rows: every token but the last one, the end, is a span of its own.

    ids: int32 [B, T], 0 = padding. rows: int32 [B], the records' numbers, on which draws depend. rule: int32 [], the type of
    all spans. epoch: int32 [].
    """
    count, length = ids.shape
    places = jnp.arange(length + 1, dtype=jnp.int32)  # slot 0 = none
    valid = ids > 0
    ends = jnp.sum(valid, axis=1, keepdims=True) - 1
    wide = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (count, length + 1))  # noqa: E731
    zero = wide(0)
    return TaggedBatch(
        tokens=ids,
        segment_ids=valid.astype(jnp.int32),
        component=jnp.where(valid & (places[:-1] < ends), places[1:], 0),
        component_begin=wide(places - 1),
        component_kind=wide(_WORD * (places > 0)),
        component_span=wide(places),
        component_index=zero,
        component_value=zero,
        component_sharers=zero,
        span_rank=zero,
        span_count=wide(1),
        span_type=wide(rule),
        span_identity=zero,
        span_id=rows[:, None] * (length + 1) + places,
        span_end=wide(places - 1),
        epoch=jnp.broadcast_to(epoch, (count,)),
        example=rows,
        tag=jnp.zeros_like(ids),
    )
