"""Several models of one shape trained side by side: one program steps them all, each with its own seed and its own text.

Members share the config and the data, which lie on the device as a whole; what a member is shown, and when, is a table of
block numbers. So ordinary training, a batch injected on the way and the control without it are the same program.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rmft_jax.config import Config
from rmft_jax.data.loader import shuffled
from rmft_jax.data.prepare import Prepared
from rmft_jax.kernels import TaggedBatch
from rmft_jax.models.gpt import count_params, flops_per_token
from rmft_jax.training.attention import choose_attention
from rmft_jax.training.mesh import make_mesh, placement, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.step import init_state, model_of, score_unmasked, train_step
from rmft_jax.training.tracker import TrackerShape

SIT_OUT = -1  # in the place of a block's number
ENOUGH = 3e8  # floating-point operations of a step that keep the cores of a CPU busy


class SetScores(NamedTuple):
    """What a model makes of a set of rows as they stand, teacher forced. Leading axis: members.

    nll float32 [2], hits and targets int32 [2]: sums over next tokens outside PII and within. spans, whole: int32 [], PII
    values that lie in a row as a whole, and those of them whose every token is the likeliest one.
    """

    nll: jax.Array
    hits: jax.Array
    targets: jax.Array
    spans: jax.Array
    whole: jax.Array


class Round(NamedTuple):
    """What comes of a round, numpy. loss: float32 [members, steps], of a step that was sat out that of its stand-in.

    counts: the tracker's counts after the round, as `training.tracker` has them, with a leading axis of members; hits,
    targets: uint32 [members, steps], the same summed over true tokens after each step. scores: of each set that is scored.
    """

    loss: np.ndarray
    counts: dict
    hits: np.ndarray
    targets: np.ndarray
    scores: dict[str, SetScores]


class SideBySide:
    """The members' train states, and the programs that step them."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        data: TaggedBatch,
        seeds: np.ndarray,
        sets: dict[str, TaggedBatch],
        tracker: TrackerShape,
        *,
        steps: int,
        more_pieces: int = 0,
        sharded: bool = False,
    ):
        """data: all rows that members can be shown, numpy; seeds: int32 [members], in the place of config.seed.

        sets: rows that each member is scored on after each round. steps: of the learning rate's schedule. more_pieces: by
        how many the vocabulary is larger than the tokenizer's. sharded: each member is split over config.mesh, and
        they take their rounds one after the other; else members are split over as many devices as share them equally.
        """
        self._config, self._members = config, len(seeds)
        self._optimizer = make_optimizer(config.training, steps)
        sizes = prepared.tokenizer.vocab_size + more_pieces, prepared.identities, self._optimizer, tracker
        first = lambda seed: init_state(config, *sizes, seed=seed, blocks=len(data.tokens))  # noqa: E731
        init = jax.vmap(first)
        if sharded:
            self._mesh = make_mesh(config.mesh)
            self._config = choose_attention(config, self._mesh)
            one = jax.eval_shape(first, jnp.int32(0))
            of_members = jax.tree.map(
                lambda split: jax.NamedSharding(self._mesh, P(None, *split.spec)), shardings_for(one, self._mesh)
            )
            self._split, whole = of_members, replicated(self._mesh)
        else:
            count = max(n for n in range(1, jax.device_count() + 1) if len(seeds) % n == 0)
            self._mesh = Mesh(np.array(jax.devices()[:count]), ("member",))
            self._split, whole = None, jax.NamedSharding(self._mesh, P())
            of_members = jax.NamedSharding(self._mesh, P("member"))
        self.state = jax.jit(init, out_shardings=of_members)(jnp.asarray(seeds, jnp.int32))
        self._seeds = jnp.asarray(seeds, jnp.int32)
        self._fixed = jax.device_put((data, prepared.bank, sets), whole)
        self._programs = {special: self._compile(special) for special in (False, True)}

    @property
    def parameters(self) -> int:
        """Return the parameters of one member."""
        return count_params(self.state["params"]) // self._members

    def round(self, block: np.ndarray, epoch: np.ndarray, *, special: bool = False) -> Round:
        """Take the steps of a round and score the sets.

        block, epoch: int32 [members, steps, B], the rows that each member is shown at each step. special: what is shown is
        no part of the training text: the tracker does not count it, a member whose blocks are SIT_OUT stays as it is, and
        of the sets only the one called "special" is scored.
        """
        rows = jnp.asarray(block, jnp.int32), jnp.asarray(epoch, jnp.int32)
        self.state, results = self._programs[special](self.state, rows, self._seeds, *self._fixed)
        return Round(*jax.device_get(results))

    def _compile(self, special: bool):
        member = functools.partial(_member, config=self._config, optimizer=self._optimizer, special=special)
        if self._split is not None:

            def in_turn(*each_and_fixed):
                each, fixed = each_and_fixed[:3], each_and_fixed[3:]
                with placement(self._mesh):
                    if self._members > 1:
                        return jax.lax.map(lambda one: member(*one, *fixed), each)
                    out = member(*jax.tree.map(lambda x: x[0], each), *fixed)  # without a second copy of the state
                return jax.tree.map(lambda x: x[None], out)

            whole = replicated(self._mesh)
            shardings = {"in_shardings": (self._split, *[whole] * 5), "out_shardings": (self._split, whole)}
            return jax.jit(in_turn, donate_argnums=0, **shardings)
        split = P("member")

        def together(state, rows, seeds, *fixed):
            return jax.vmap(member, in_axes=(0, 0, 0, None, None, None))(state, rows, seeds, *fixed)

        specs = {"in_specs": (split, split, split, P(), P(), P()), "out_specs": split}
        return jax.jit(jax.shard_map(together, mesh=self._mesh, check_vma=False, **specs), donate_argnums=0)


def fills_devices(config: Config, vocab_size: int) -> bool:
    """Return whether one member is enough work for the devices, so that members had better be `sharded`.

    On accelerators it is the user who knows. On CPU, from about 3e8 operations a step on, waiting costs less than what
    batched matrix products lose.
    """
    training, devices = config.training, jax.device_count()
    fits = training.batch_size // training.accumulation % devices == 0
    flops = flops_per_token(config.model, vocab_size, training.sequence_length)
    tokens = training.batch_size * training.sequence_length
    return jax.default_backend() == "cpu" and fits and flops * tokens >= ENOUGH


def _member(state, rows, seed, data, bank, sets, *, config, optimizer, special: bool) -> tuple[dict, tuple]:
    """Take the steps of a round for one member; return its state and the fields of a Round."""

    def step(state, row):
        block, epoch = row
        batch = jax.tree.map(lambda x: x[jnp.maximum(block, 0)], data)._replace(epoch=epoch)
        new, metrics = train_step(state, batch, bank, config=config, optimizer=optimizer, seed=seed)
        if special:
            new = jax.tree.map(lambda n, o: jnp.where(block[0] == SIT_OUT, o, n), new, state)
            new["tracker"] = state["tracker"]
        counts = new["tracker"]["counts"]
        seen = [jnp.sum(counts[name][:, :2]) for name in ("hits", "targets")]  # text, pii
        return new, (metrics["loss"], *seen)

    state, (loss, hits, targets) = jax.lax.scan(step, state, rows)
    params = model_of(state)
    scored = [name for name in sets if name == "special" or not special]
    scores = {name: score_set(params, sets[name], config) for name in scored}
    return state, (loss, state["tracker"]["counts"], hits, targets, scores)


def score_set(params: dict, rows: TaggedBatch, config: Config) -> SetScores:
    """Score rows as they stand, `training.batch_size` at a time; their number must be a multiple of that."""
    size = config.training.batch_size
    batches = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
    sums = jax.lax.map(lambda batch: _score_batch(params, batch, config), batches)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def _score_batch(params: dict, batch: TaggedBatch, config: Config) -> SetScores:
    scores, targets = score_unmasked(params, batch, config)
    is_pii = batch.component[:, 1:] > 0
    apart = jnp.stack([targets & ~is_pii, targets & is_pii])
    right = jnp.pad(scores.hit & targets, ((0, 0), (1, 0)))
    judged = jnp.pad(targets, ((0, 0), (1, 0)))
    rows = jnp.arange(len(batch.tokens))[:, None]
    span = jnp.take_along_axis(batch.component_span, batch.component, axis=1)  # of each token
    missed, unjudged = (jnp.zeros_like(batch.span_end, bool).at[rows, span].max(~x) for x in (right, judged))
    spans = (batch.span_end >= 0) & ~unjudged
    return SetScores(
        nll=jnp.sum(jnp.where(apart, scores.nll, 0), axis=(1, 2)),
        hits=jnp.sum(apart & scores.hit, axis=(1, 2), dtype=jnp.int32),
        targets=jnp.sum(apart, axis=(1, 2), dtype=jnp.int32),
        spans=jnp.sum(spans, dtype=jnp.int32),
        whole=jnp.sum(spans & ~missed, dtype=jnp.int32),
    )


def ordinary_rows(
    blocks: int, seeds: np.ndarray, *, batch_size: int, start: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks and epochs, int32 [members, steps, B] each, that runs of these seeds are shown from step `start` on:
    the ones that `data.loader.batches` yields."""
    begin, end = start * batch_size, (start + steps) * batch_size
    of_seed = {}
    for seed in set(map(int, seeds)):
        order = shuffled(blocks, seed)
        of_seed[seed] = np.array([order[index] for index in range(begin, end)], np.int32)
    pairs = np.stack([of_seed[int(seed)] for seed in seeds]).reshape(len(seeds), steps, batch_size, 2)
    return pairs[..., 0], pairs[..., 1]
