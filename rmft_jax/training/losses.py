"""What is minimised: the loss of each target token, what it weighs, and their mean over the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec as P

from rmft_jax.config import Config, LossConfig
from rmft_jax.kernels import (
    SURROGATE,
    CrossEntropy,
    MaskedBatch,
    TopTargets,
    cross_entropy,
    early_learning_penalty,
    goldfish_mask,
    target_mask,
    top_penalty,
    update_top_targets,
)
from rmft_jax.models.gpt import forward, hidden, output_matrix
from rmft_jax.models.lora import with_adapters
from rmft_jax.training.attention import fused_name

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_DROPOUT = 0x64726F70  # stream of random bits


def dropout_key(seed: int, step: jax.Array) -> jax.Array:
    """Return the key of one step's dropout: the same in a resumed run as in an undisturbed one. step: int []."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _DROPOUT), step)


def asked_targets(masked: MaskedBatch) -> jax.Array:
    """Return which next tokens the model is to predict, bool [B, N-1]: those of `target_mask`, of a masked language model
    only those that are asked for."""
    targets = target_mask(masked.segment_ids)
    return targets if masked.asked is None else targets & masked.asked[:, 1:]


def token_weights(config: LossConfig, masked: MaskedBatch) -> jax.Array:
    """Return the weight of each next token in the loss, [B, N-1], as bool while the weights of origins are 1, else float32.

    It is 0 where the token is no target at all (`asked_targets`) or the goldfish mask, given the tokens that the model is
    shown, drops it; else pii_weight, surrogate_weight or 1, by the token's origin.
    """
    weights = asked_targets(masked)
    if config.goldfish != "none":
        kept = goldfish_mask(
            masked.tokens, masked.segment_ids, mode=config.goldfish, k=config.goldfish_k, context=config.goldfish_context
        )
        weights &= kept[:, 1:]
    if (config.pii_weight, config.surrogate_weight) != (1, 1):
        of_origin = jnp.array([1.0, config.pii_weight, config.surrogate_weight], jnp.float32)  # TEXT, PII, SURROGATE
        weights = weights * of_origin[masked.origin[:, 1:]]
    return weights


def whole(config: Config, trained: dict, frozen: dict | None) -> dict:
    """Return the parameters to compute with: `trained`, or under LoRA `frozen` with `trained` as its adapters."""
    return trained if frozen is None else with_adapters(frozen, trained, jnp.float32(config.lora.alpha / config.lora.rank))


def weighted_loss(
    params: dict, config: Config, masked: MaskedBatch, weights: jax.Array, *,
    average: dict | TopTargets | None = None, key=None,
) -> tuple[jax.Array, tuple[CrossEntropy, TopTargets | None]]:
    """Return the sum over next tokens of weight x loss in nats, float32 [], and the CrossEntropy of each, [B, N-1], with the
    new targets of early-learning regularization, [B, N-1, K], where the old ones were given.

    The loss is cross entropy, with what training.z_loss and loss.elr_weight add to it.

    weights: bool or float32 [B, N-1], as from `token_weights`. average: the average of the weights that early-learning
    regularization takes its targets from or, with loss.elr_top, the targets so far.
    key: of dropout. Either is needed only where it is switched on.
    """
    training, dtype = config.training, DTYPES[config.training.dtype]
    inputs, targets = shown_tokens(params, masked), masked.tokens[:, 1:]
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    how = {"remat": training.remat, "fused": fused_name(config), "causal": masked.asked is None}
    features = hidden(cast, config.model, *inputs, dropout=training.dropout, key=key, **how)
    total, scores = spread_cross_entropy(features, output_matrix(cast), targets, weights, config)
    new = None
    if config.loss.elr_weight and config.loss.elr_top:
        probabilities = jax.nn.softmax((features @ output_matrix(cast)).astype(jnp.float32))
        new = update_top_targets(average, probabilities, config.loss.elr_beta)
        true = masked.origin[:, 1:] != SURROGATE  # nothing is known of a surrogate from epochs before
        total += config.loss.elr_weight * jnp.sum(weights * true * top_penalty(probabilities, new))
    elif config.loss.elr_weight:
        logits = features @ output_matrix(cast)
        earlier = forward(jax.lax.stop_gradient(average), config.model, *inputs, dtype=dtype)
        total += config.loss.elr_weight * jnp.sum(weights * early_learning_penalty(logits, earlier))
    return total, (scores, new)


def ask(masked: MaskedBatch, config: Config, key: jax.Array) -> MaskedBatch:
    """Return the batch with the tokens that a masked language model is to guess, drawn with training.mask_share."""
    return masked._replace(asked=jax.random.bernoulli(key, config.training.mask_share, masked.tokens.shape))


def shown_tokens(params: dict, masked: MaskedBatch) -> tuple[jax.Array, jax.Array]:
    """Return tokens and segment_ids, int32 [B, N-1], of which the model computes what stands at targets [:, 1:].

    Those before the targets or, for a masked language model, the targets themselves with the last row of the embedding in
    the place of each token that is asked for.
    """
    if masked.asked is None:
        return masked.tokens[:, :-1], masked.segment_ids[:, :-1]
    hide = len(params["embed"]) - 1
    return jnp.where(masked.asked, hide, masked.tokens)[:, 1:], masked.segment_ids[:, 1:]


def spread_cross_entropy(features, output, targets, weights, config: Config) -> tuple[jax.Array, CrossEntropy]:
    """Return `kernels.cross_entropy` of rows, [B, T], each device taking its own tokens, training.loss_chunk at a time.

    features: [B, T, E]; output: [E, V]; targets, weights: [B, T]. Within `placement` rows, positions and vocabulary stay
    where they are; the gradients of `output` and `features` are summed over the devices once, not once a chunk.
    """
    rules, sizes = dict(get_logical_axis_rules()), jax.sharding.get_abstract_mesh().shape
    axes = (*rules["batch"], rules["sequence"], rules["vocab"]) if rules.get("batch") else ()
    split = rules["vocab"] if axes and sizes[rules["vocab"]] > 1 else ""

    def of_rows(features, output, targets, weights):
        flat = (features.reshape(-1, features.shape[-1]), output, targets.reshape(-1), weights.reshape(-1))
        total, scores = cross_entropy(*flat, config.training.loss_chunk, config.training.z_loss, split)
        return total[None], jax.tree.map(lambda x: x.reshape(targets.shape), scores)

    if any(sizes[axis] > 1 for axis in axes):  # XLA refuses sums over axes of one device where others are split
        tokens = P(rules["batch"], rules["sequence"])
        of_rows = jax.shard_map(
            of_rows,
            in_specs=(tokens, P(None, rules["vocab"]), tokens, tokens),
            out_specs=(P(axes), tokens),
            axis_names=set(axes),
            check_vma=False,
        )
    totals, scores = of_rows(features, output, targets, weights)
    return jnp.sum(totals), scores


def loss_and_gradient(
    trained: dict, config: Config, masked: MaskedBatch, *, frozen: dict | None = None, average=None, key=None
) -> tuple[dict, dict]:
    """Return the gradient of the mean loss over the batch, and metrics: loss, targets (the sum of the weights), hit; and
    under loss.elr_top new_targets, those of early-learning regularization.

    trained, frozen: as `whole` has them; the gradient is that of `trained`, of which `average` is the average.
    The mean is sum(weights x losses) / sum(weights) over the global batch, 0 where no token weighs anything. Under `jit` the
    sums run over all devices and hosts. hit: bool [B, N-1], whether each next token is the likeliest one.
    With training.accumulation A the rows pass through the model in A microbatches, one after the other. What is divided by
    is the weight of the whole batch, so that the result does not depend on which targets lie in which microbatch.
    """
    weights, count = token_weights(config.loss, masked), config.training.accumulation
    targets = jnp.sum(weights)
    total = jnp.where(targets > 0, targets, 1).astype(jnp.float32)

    def of_rows(masked, weights, key):
        def share(trained):
            plain = average is None or isinstance(average, TopTargets)
            earlier = average if plain else whole(config, average, frozen)
            params = whole(config, trained, frozen)
            loss, (scores, new) = weighted_loss(params, config, masked, weights, average=earlier, key=key)
            return loss / total, (scores.hit, new)

        return jax.value_and_grad(share, has_aux=True)(trained)

    if count == 1:
        (loss, (hit, new)), gradient = of_rows(masked, weights, key)
        return gradient, {"loss": loss, "targets": targets, "hit": hit} | ({} if new is None else {"new_targets": new})

    def add(sums, inputs):
        number, rows, weights = inputs
        (loss, (hit, _)), gradient = of_rows(rows, weights, None if key is None else jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, sums, (loss, gradient)), hit

    microbatches = jax.tree.map(lambda x: _deal(x, count), (masked, weights))
    start = jnp.zeros((), jnp.float32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    (loss, gradient), hit = jax.lax.scan(add, start, (jnp.arange(count), *microbatches))
    return gradient, {"loss": loss, "targets": targets, "hit": hit.swapaxes(0, 1).reshape(weights.shape)}


def _deal(x: jax.Array, count: int) -> jax.Array:
    """Return [count, B / count, ...]: row r goes to microbatch r % count, so that devices keep the rows they hold."""
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
