"""The compiled programs: input step + train step in one, and the evaluation step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rmft_jax.config import Config
from rmft_jax.kernels import (
    SURROGATE,
    CrossEntropy,
    MaskedBatch,
    SurrogateBank,
    TaggedBatch,
    TopTargets,
    average_weights,
    mask_batch,
    top_targets,
)
from rmft_jax.models.gpt import hidden, init_params, output_matrix, place
from rmft_jax.models.lora import init_adapters, with_adapters
from rmft_jax.training.attention import fused_name
from rmft_jax.training.losses import (
    DTYPES,
    ask,
    asked_targets,
    dropout_key,
    loss_and_gradient,
    shown_tokens,
    spread_cross_entropy,
)
from rmft_jax.training.masking import masking_key, masking_rules
from rmft_jax.training.mesh import batch_sharding, placement, replicated, shardings_for
from rmft_jax.training.privacy import private_gradient
from rmft_jax.training.tracker import TrackerShape, init_tracker, update_tracker

_LORA, _ASK = 0x6C6F7261, 0x61736B  # streams of random bits
_REMEMBERED = 32  # steps left out, by number


def init_state(
    config: Config,
    vocab_size: int,
    identities: int,
    optimizer: optax.GradientTransformation,
    tracker: TrackerShape | None = None,
    *,
    seed: jax.Array | None = None,
    blocks: int = 0,
) -> dict:
    """Return the train state at step 0, a plain dict: params, optimizer, seen (bool [identities], at least 1), step, guard.

    guard: what `accept` needs to know of earlier steps. Under LoRA also adapters, which are what is trained then, and
    adapter_scale; with early-learning regularization also average, the average of what is trained, or elr (the
    targets of each token of the training blocks, `blocks` of them, with loss.elr_top); with the sizes of a
    tracker also tracker (`training.tracker`). seed: int [], in the place of config.seed.
    """
    key = jax.random.key(config.seed if seed is None else seed, impl="threefry2x32")
    hide = config.training.objective == "masked"  # the token that stands for a hidden one
    params, adapters = init_params(config.model, vocab_size + hide, key), {}
    if config.lora.rank:
        adapters["adapters"] = init_adapters(params, config.lora, jax.random.fold_in(key, _LORA))
        adapters["adapter_scale"] = jnp.float32(config.lora.alpha / config.lora.rank)
    trained = adapters.get("adapters", params)
    state = {
        "params": params,
        **adapters,
        "optimizer": optimizer.init(trained),
        "seen": jnp.zeros(max(1, identities), bool),  # orbax saves no empty array
        "step": jnp.zeros((), jnp.int32),
        "guard": init_guard(),
    }
    if tracker:
        state["tracker"] = init_tracker(tracker)
    if config.loss.elr_weight and config.loss.elr_top:
        width = config.training.sequence_length - config.masking.margin + 1
        return state | {"elr": top_targets((blocks, width, config.loss.elr_top))._asdict()}
    return state | ({"average": jax.tree.map(jnp.copy, trained)} if config.loss.elr_weight else {})


def init_guard() -> dict:
    """Return what `accept` knows at step 0: loss, the running average; skipped, in_a_row, how many steps were left out;
    recent, int32 [32], the numbers of the newest of those."""
    counts = {name: jnp.zeros((), jnp.int32) for name in ("skipped", "in_a_row")}  # two arrays: the step takes both over
    return {"loss": jnp.zeros(()), **counts, "recent": jnp.zeros(_REMEMBERED, jnp.int32)}


def model_of(state: dict) -> dict:
    """Return the parameters to compute with, of a train state: params, with adapters if there are any."""
    if "adapters" not in state:
        return state["params"]
    return with_adapters(state["params"], state["adapters"], state["adapter_scale"])


def train_step(
    state: dict,
    batch: TaggedBatch,
    bank: SurrogateBank,
    *,
    config: Config,
    optimizer: optax.GradientTransformation,
    seed: jax.Array | None = None,
) -> tuple[dict, dict]:
    """Mask the batch, take one optimizer step, and note which true PII values the model was shown.

    batch holds the rows as tagged: masking happens here, inside the compiled program. seed: int [], in the place of
    config.seed. Returns the new state and metrics, scalars but for the counts of a tracker.
    """
    seed = config.seed if seed is None else seed
    masked = masked_rows(state["step"], batch, bank, config=config, seed=seed)
    masked = jax.tree.map(lambda x: place(x, "batch"), masked)  # whole rows: surrogates move tokens across any cut
    key = dropout_key(seed, state["step"]) if config.training.dropout else None
    part = "adapters" if config.lora.rank else "params"
    frozen = {"frozen": state["params"]} if config.lora.rank else {}
    if config.privacy.on:
        gradients, scores = private_gradient(state[part], config, masked, step=state["step"], key=key, **frozen)
    else:
        average = _targets_so_far(state["elr"], batch, masked) if "elr" in state else state.get("average")
        gradients, scores = loss_and_gradient(state[part], config, masked, average=average, key=key, **frozen)
        hit = scores.pop("hit")
    norm = optax.global_norm(gradients)
    ok, guard = accept(state["guard"], config, scores["loss"], norm, step=state["step"] + 1)
    updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state[part])
    identity = jnp.where(masked.shown, batch.span_identity, state["seen"].size)  # beyond the end: dropped
    new = {
        part: optax.apply_updates(state[part], updates),
        "optimizer": optimizer_state,
        "seen": state["seen"].at[identity].set(True, mode="drop"),
    }
    if "average" in state:
        new["average"] = average_weights(state["average"], new[part], state["step"], config.loss.elr_decay)
    targets = _note_targets(state["elr"], batch, masked, scores.pop("new_targets"), ok) if "elr" in state else None
    new = {name: jax.tree.map(lambda n, o: jnp.where(ok, n, o), value, state[name]) for name, value in new.items()}
    new = state | new | {"step": state["step"] + 1, "guard": guard}
    metrics = {
        **scores,
        "gradient_norm": norm,
        "seen": jnp.sum(new["seen"]),
        "cut_tokens": jnp.sum(masked.cut),
        "skipped": guard["skipped"],
        "skipped_in_a_row": guard["in_a_row"],
        "skipped_steps": guard["recent"],
    }
    if targets is not None:
        new["elr"] = targets
    if "tracker" in state:
        new["tracker"] = update_tracker(state["tracker"], batch, masked, hit, new["step"])
        metrics["tracker"] = new["tracker"]["counts"]
    return new, metrics


def masked_rows(step: jax.Array, batch: TaggedBatch, bank: SurrogateBank, *, config: Config, seed) -> MaskedBatch:
    """Return the rows as the model is shown them in a step, the input step: PII replaced and, for a masked language model,
    tokens hidden. step: int [], taken so far."""
    length, rules = config.training.sequence_length + 1, masking_rules(config)
    masked = mask_batch(batch, bank, masking_key(seed), length=length, rules=rules)
    if config.training.objective == "masked":
        masked = ask(masked, config, jax.random.fold_in(dropout_key(seed, step), _ASK))
    return masked


def _targets_so_far(elr: dict, batch: TaggedBatch, masked: MaskedBatch) -> TopTargets:
    """Return what early-learning regularization knows of each next token that the model is shown, [B, N-1, K]."""
    place = jnp.minimum(masked.source[:, 1:], batch.tokens.shape[1] - 1)[..., None]
    return TopTargets(**{name: jnp.take_along_axis(values[batch.example], place, axis=1) for name, values in elr.items()})


def _note_targets(elr: dict, batch: TaggedBatch, masked: MaskedBatch, new: TopTargets, ok: jax.Array) -> dict:
    """Return the targets of all tokens, those of the true ones that the model was shown being new, if the step counts."""
    noted = asked_targets(masked) & (masked.origin[:, 1:] != SURROGATE) & ok
    row = jnp.broadcast_to(batch.example[:, None], noted.shape)
    place = jnp.where(noted, masked.source[:, 1:], batch.tokens.shape[1])  # beyond the end: dropped
    return {name: elr[name].at[row, place].set(values, mode="drop") for name, values in new._asdict().items()}


def accept(
    guard: dict, config: Config, loss: jax.Array, gradient_norm: jax.Array, *, step: jax.Array
) -> tuple[jax.Array, dict]:
    """Return whether a step counts, bool [], and the new guard. One that does not changes nothing but the step's number
    and what a tracker has counted, which is of the model as it was before. step: its number, from 1.

    A step counts where loss and gradient are finite and, with training.skip_above, the loss is at most so many times the
    running average of the losses. A loss above that moves the average as one at the limit, so that a lasting change is
    accepted in the end. Under DP-SGD only the noised gradient decides, which tells nothing more of the data.
    """
    training, average = config.training, guard["loss"]
    ok = jnp.isfinite(gradient_norm) & (config.privacy.on | jnp.isfinite(loss))
    limit = jnp.inf
    if training.skip_above:
        limit = jnp.where(average > 0, training.skip_above * average, jnp.inf)
    spike = loss > limit
    loss = jnp.where(jnp.isfinite(loss), jnp.minimum(loss, limit), average)
    ok &= ~spike
    place = guard["skipped"] % _REMEMBERED
    return ok, {
        "loss": jnp.where(average > 0, 0.98 * average + 0.02 * loss, loss),
        "skipped": guard["skipped"] + ~ok,
        "in_a_row": jnp.where(ok, 0, guard["in_a_row"] + 1),
        "recent": guard["recent"].at[place].set(jnp.where(ok, guard["recent"][place], step)),
    }


def compile_train_step(config: Config, optimizer, mesh: Mesh, state: dict, *, steps: int = 1) -> Callable:
    """Return the jitted train step `(state, batch, bank) -> (state, metrics)`; the state's buffers are reused.

    steps: how many it takes; if more than 1, each array of batch and metrics has a leading axis of that length.
    """
    everywhere = replicated(mesh)
    state_shardings = shardings_for(state, mesh)

    def step(state, batch, bank):
        with placement(mesh, batch=not config.privacy.on):
            return train_step(state, batch, bank, config=config, optimizer=optimizer)

    def dispatch(state, batches, bank):
        return jax.lax.scan(lambda state, batch: step(state, batch, bank), state, batches)

    return jax.jit(
        step if steps == 1 else dispatch,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(mesh, stacked=steps > 1), everywhere),
        out_shardings=(state_shardings, everywhere),
    )


def compile_eval_step(config: Config, mesh: Mesh) -> Callable:
    """Return the jitted `(params, batch) -> (nll float32 [B, W-1], is_target, is_pii)` on unmasked rows."""

    def step(params, batch: TaggedBatch):
        with placement(mesh):
            scores, targets = score_unmasked(params, batch, config)
        return scores.nll, targets, batch.component[:, 1:] > 0

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))


def score_unmasked(params: dict, batch: TaggedBatch, config: Config) -> tuple[CrossEntropy, jax.Array]:
    """Return the CrossEntropy of each next token of the rows as they stand, [B, W-1], and which are targets, bool.

    Of a masked language model those are targets that one draw, always the same, asks for.
    """
    nothing = jnp.zeros_like(batch.tokens)
    rows = MaskedBatch(batch.tokens, batch.segment_ids, nothing, nothing, nothing, nothing)
    if config.training.objective == "masked":
        rows = ask(rows, config, jax.random.key(_ASK))
    return score_masked(params, rows, config)


def score_masked(params: dict, rows: MaskedBatch, config: Config) -> tuple[CrossEntropy, jax.Array]:
    """Return the CrossEntropy of each next token of the rows as a model is shown them, [B, N-1], and which are targets."""
    targets = asked_targets(rows)
    params = jax.tree.map(lambda x: x.astype(DTYPES[config.training.dtype]), params)
    shown = shown_tokens(params, rows)
    features = hidden(params, config.model, *shown, fused=fused_name(config), causal=rows.asked is None)
    _, scores = spread_cross_entropy(features, output_matrix(params), rows.tokens[:, 1:], targets, config)
    return scores, targets
