"""Members trained side by side: the same as trained alone, whatever is injected, on one device or eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import SMALL

from rmft_jax.data.blocks import all_rows
from rmft_jax.data.loader import batches
from rmft_jax.kernels import target_mask
from rmft_jax.models.gpt import forward
from rmft_jax.training.masking import masking_rules
from rmft_jax.training.mesh import make_mesh
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.side_by_side import SIT_OUT, SideBySide, ordinary_rows
from rmft_jax.training.step import compile_train_step, init_state
from rmft_jax.training.tracker import TrackerShape

STEPS, ROUNDS, BATCH = 5, 3, 8
SHAPE = TrackerShape(rounds=2, slices=3, bins=32, examples=0)


@pytest.fixture(scope="module")
def config(tiny):
    more = ["training.batch_size=8", "training.sequence_length=32", "training.dropout=0.1", "tracker.enabled=true"]
    return tiny(*SMALL, *more, "masking.policy=bernoulli", "masking.p=0.5")


def start(config, prepared, seeds, **more):
    blocks, heldout = load_blocks(config, prepared)
    sets = dict.fromkeys(("heldout", "special"), all_rows(heldout, BATCH))
    return SideBySide(config, prepared, all_rows(blocks), seeds, sets, SHAPE, steps=STEPS * ROUNDS, **more), blocks


def alone(config, prepared, seed):
    """Take the steps by the trainer's own program and loader."""
    config = dataclasses.replace(config, seed=seed)
    blocks, _ = load_blocks(config, prepared)
    optimizer, mesh = make_optimizer(config.training, STEPS * ROUNDS), make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, SHAPE)
    step, losses = compile_train_step(config, optimizer, mesh, jax.eval_shape(lambda: state)), []
    source, bank = batches(blocks, batch_size=BATCH, seed=seed), prepared.bank
    for _ in range(STEPS * ROUNDS):
        batch, bank = jax.device_put((next(source), bank), jax.devices()[0])
        state, metrics = step(state, batch, bank)
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state)


def test_eight_members_equal_eight_runs(config, prepared):
    seeds = np.arange(3, 11)
    group, blocks = start(config, prepared, seeds)
    assert group.state["params"]["embed"].sharding.num_devices == 8
    losses = []
    for number in range(ROUNDS):
        rows = ordinary_rows(len(blocks), seeds, batch_size=BATCH, start=number * STEPS, steps=STEPS)
        losses.append(group.round(*rows).loss)
    losses = np.concatenate(losses, axis=1)
    assert masking_rules(config)[0].policy == "bernoulli"  # so that a member draws surrogates of its own
    for member in (0, 7):
        expected, state = alone(config, prepared, int(seeds[member]))
        np.testing.assert_allclose(losses[member], expected, rtol=1e-5)
        for name in ("hits", "targets", "lengths"):
            counts = group.state["tracker"]["counts"][name][member]
            np.testing.assert_array_equal(counts, state["tracker"]["counts"][name])
    assert len({tuple(row) for row in losses.round(5)}) == 8


def test_a_member_is_the_same_beside_others_and_split_over_a_mesh(tiny, config, prepared):
    few = [start(config, prepared, np.array(seeds))[0] for seeds in ([5], [5, 6, 7])]
    mesh = tiny(*SMALL, "training.batch_size=8", "training.sequence_length=32", "training.dropout=0.1",
                "tracker.enabled=true", "masking.policy=bernoulli", "masking.p=0.5",
                "mesh.fsdp=4", "mesh.replica=2")  # fmt: skip
    split = [start(mesh, prepared, np.array(seeds), sharded=True)[0] for seeds in ([5], [5, 6, 7])]
    blocks, _ = load_blocks(config, prepared)
    out = []
    for trainer, seeds in zip((*few, *split), ([5], [5, 6, 7]) * 2, strict=True):
        rows = ordinary_rows(len(blocks), np.array(seeds), batch_size=BATCH, start=0, steps=STEPS)
        out.append(trainer.round(*rows))
    for other in out[1:]:
        np.testing.assert_allclose(out[0].loss[0], other.loss[0], rtol=1e-5)
        for a, b in zip(out[0].scores["heldout"], other.scores["heldout"], strict=True):
            np.testing.assert_allclose(a[0], b[0], rtol=1e-5)


def test_injected_rows_teach_those_who_are_shown_them_and_count_for_nobody(config, prepared):
    seeds = np.array([1, 1])
    group, blocks = start(config, prepared, seeds)
    rows = ordinary_rows(len(blocks), seeds, batch_size=BATCH, start=0, steps=STEPS)
    before = group.round(*rows)
    np.testing.assert_array_equal(before.loss[0], before.loss[1])
    params, step = jax.device_get((group.state["params"], group.state["step"]))
    block = np.stack([np.tile(np.arange(BATCH), (2, 1)), np.full((2, BATCH), SIT_OUT)])
    after = group.round(block, np.zeros_like(block), special=True)
    now = jax.device_get(group.state)
    changed = jax.tree.map(lambda new, old: [not np.array_equal(a, b) for a, b in zip(new, old, strict=True)],
                           now["params"], params)  # fmt: skip
    assert all(leaf == [True, False] for leaf in jax.tree.leaves(changed, is_leaf=lambda x: isinstance(x, list)))
    assert (now["step"] - step).tolist() == [2, 0]
    for name in before.counts:
        np.testing.assert_array_equal(after.counts[name], before.counts[name])
    assert list(after.scores) == ["special"]
    np.testing.assert_array_equal(after.scores["special"].nll[1], before.scores["special"].nll[1])
    assert (after.scores["special"].nll[0] != before.scores["special"].nll[0]).all()


def test_scores_of_a_set_by_hand(config, prepared):
    group, _ = start(config, prepared, np.array([2]))
    rows = ordinary_rows(len(load_blocks(config, prepared)[0]), np.array([2]), batch_size=BATCH, start=0, steps=40)
    scores = jax.tree.map(lambda x: x[0], group.round(*rows).scores["heldout"])
    batch = all_rows(load_blocks(config, prepared)[1], BATCH)
    params = jax.tree.map(lambda x: jnp.asarray(x[0]), group.state["params"])
    shown = batch.tokens[:, :-1], batch.segment_ids[:, :-1]
    logits = np.asarray(jax.jit(lambda params: forward(params, config.model, *shown))(params))
    targets = np.asarray(target_mask(batch.segment_ids))
    hit = logits.argmax(-1) == batch.tokens[:, 1:]
    pii = batch.component[:, 1:] > 0
    assert scores.targets.tolist() == [int((targets & ~pii).sum()), int((targets & pii).sum())]
    assert scores.hits.tolist() == [int((hit & targets & ~pii).sum()), int((hit & targets & pii).sum())]
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(scores.nll, [nll[targets & ~pii].sum(), nll[targets & pii].sum()], rtol=1e-5)
    spans = whole = 0
    for b in range(len(batch.tokens)):
        for number, end in enumerate(batch.span_end[b]):
            places = [t for t in range(batch.tokens.shape[1])
                      if batch.component[b, t] and batch.component_span[b, batch.component[b, t]] == number]  # fmt: skip
            if end >= 0 and all(t > 0 and targets[b, t - 1] for t in places):
                spans += 1
                whole += all(hit[b, t - 1] for t in places)
    assert (int(scores.spans), int(scores.whole)) == (spans, whole)
    assert spans > 20 and scores.hits[1] > 0
