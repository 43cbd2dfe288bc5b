"""The compiled step: what goes in, how often it compiles, what it learns from, and that a resumed run is the same run."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmft_jax.config import load_config
from rmft_jax.data.loader import batches
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import forward, init_params
from rmft_jax.training import loop
from rmft_jax.training.checkpoints import Checkpoints
from rmft_jax.training.evaluation import evaluate
from rmft_jax.training.loop import train
from rmft_jax.training.mesh import batch_sharding, make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import learning_rate_schedule, make_optimizer
from rmft_jax.training.setup import load_blocks, make_plan
from rmft_jax.training.step import compile_eval_step, compile_train_step, init_state, train_step


def start(config, prepared, devices=None):
    """Return everything a step needs."""
    mesh = make_mesh(config.mesh, devices)
    optimizer = make_optimizer(config.training, 100)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer)
    state = jax.device_put(state, shardings_for(state, mesh))
    blocks, heldout = load_blocks(config, prepared)
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)
    return compile_train_step(config, optimizer, mesh, state), state, source, blocks, heldout


def test_the_step_takes_unmasked_arrays_and_compiles_once(tiny, prepared):
    config = tiny()
    step, state, source, _, _ = start(config, prepared)
    first = next(source)
    assert (first.span_rank > 0).any()  # spans to replace, still unreplaced: the tokens are those of the data set
    bank = jax.device_put(prepared.bank, replicated(make_mesh(config.mesh)))
    lowered = step.lower(state, first, bank)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(lowered.in_avals[0][1])]
    assert shapes == [(x.shape, x.dtype) for x in first]
    assert "threefry" in lowered.as_text()  # the draws are in the program
    spans = set()
    sharding = batch_sharding(make_mesh(config.mesh))
    for _ in range(50):
        batch = next(source)
        spans.add(int((batch.span_rank > 0).sum()))
        state, metrics = jax.block_until_ready(step(state, jax.device_put(batch, sharding), bank))
    assert len(spans) > 5  # the number of spans kept changing
    assert step._cache_size() == 1
    assert int(state["step"]) == 50 and np.isfinite(float(metrics["loss"]))


def test_the_inputs_are_the_corpus_as_it_is(tiny, prepared):
    config = tiny()
    blocks, _ = load_blocks(config, prepared)
    stream = blocks.corpus.tokens
    for batch, _ in zip(batches(blocks, batch_size=8, seed=0), range(5), strict=False):
        for row, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            text = row[segments > 0]
            starts = np.flatnonzero(stream[: len(stream) - len(text) + 1] == text[0])
            assert any((stream[s : s + len(text)] == text).all() for s in starts)


def test_seen_is_what_was_shown_once_an_epoch(tiny, prepared):
    config = tiny("training.epochs=1")
    step, state, source, blocks, _ = start(config, prepared)
    bank = jax.device_put(prepared.bank)
    for _ in range(-(-len(blocks) // config.training.batch_size)):
        state, _ = jax.block_until_ready(step(state, next(source), bank))  # see conftest
    shown = np.zeros(prepared.identities, bool)
    for index in range(len(blocks)):
        row = blocks[index]
        whole = (row["span_end"] >= 0) & (row["span_rank"] == 0)
        shown[row["span_identity"][whole]] = True
    seen = np.asarray(state["seen"])
    assert (seen <= shown).all()
    assert seen.sum() > 0.9 * shown.sum() > 60  # but for what surrogates pushed out of a block


def test_causality_and_document_isolation_by_gradient(tiny, prepared):
    config = tiny()
    params = init_params(config.model, 50, jax.random.key(1))
    segments = jnp.array([[1] * 5 + [2] * 6 + [0]])

    def logits(embedded):  # embeddings in place of ids, to differentiate by them
        table = {**params, "embed": embedded}
        return forward(table, config.model, jnp.arange(12)[None], segments)[0, :, 45]

    jacobian = np.abs(np.asarray(jax.jacobian(logits)(params["embed"]))[:, :12]).sum(-1)  # [T out, T in]
    segment = np.asarray(segments[0])
    allowed = (np.tril(np.ones((12, 12))) > 0) & (segment[:, None] == segment[None]) & (segment > 0)
    real = segment > 0
    assert (jacobian[real][:, real][~allowed[real][:, real]] == 0).all()
    assert (jacobian[allowed] > 0).all()


def test_loss_is_the_mean_over_targets_and_agrees_on_any_mesh(tiny, prepared):
    losses = {}
    meshes = {"1": {}, "8 fsdp": {"fsdp": 8, "replica": 1}, "mixed": {"replica": 2, "fsdp": 2, "tensor": 2}}
    for name, mesh in meshes.items():
        settings = [f"mesh.{key}={value}" for key, value in mesh.items()]
        variant = tiny("training.batch_size=8", *settings)
        step, state, source, *_ = start(variant, prepared, jax.devices()[: 8 if mesh else 1])
        bank = prepared.bank
        losses[name] = []
        for _ in range(5):
            state, metrics = jax.block_until_ready(step(state, next(source), bank))
            losses[name].append(float(metrics["loss"]))
    for name in losses:
        np.testing.assert_allclose(losses[name], losses["1"], rtol=1e-5, err_msg=name)
    assert losses["1"][-1] < losses["1"][0]


def test_evaluation_counts_every_target_once(tiny, prepared):
    config = tiny()
    _, heldout = load_blocks(config, prepared)
    params = init_params(config.model, prepared.tokenizer.vocab_size, jax.random.key(0))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    scores = evaluate(compile_eval_step(config, mesh), params, heldout, batch_size=8, sharding=batch_sharding(mesh))
    assert sum(scores["document_tokens"]) == len(heldout.corpus.tokens) - (heldout.corpus.document.max() + 1)
    share = (heldout.corpus.component > 0).mean()
    combined = np.log(scores["perplexity_pii"]) * share + np.log(scores["perplexity_other"]) * (1 - share)
    assert combined == pytest.approx(np.log(scores["perplexity"]), rel=0.01)


def same_tree(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def newest(run):
    checkpoints, step = Checkpoints.open(run)
    return step, checkpoints._manager.restore(step)


def test_a_resumed_run_is_bit_identical(tiny, tmp_path, monkeypatch):
    settings = ["training.steps=24", "checkpoint.count=2", "checkpoint.every_steps=5", "checkpoint.keep_last=2"]
    whole = train(tiny(*settings, "name=whole"))
    config = tiny(*settings, "name=whole", f"out={tmp_path}", f"data={tiny().data_dir}")

    original = loop.MetricsLog.add

    def dies_at_18(self, step, count, metrics):
        if step == 18:
            raise KeyboardInterrupt
        original(self, step, count, metrics)

    monkeypatch.setattr(loop.MetricsLog, "add", dies_at_18)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert sorted(Checkpoints.open(config.run_dir)[0].steps())[-1] == 15
    resumed = train(config)

    (step_a, a), (step_b, b) = newest(whole), newest(resumed)
    assert step_a == step_b == 24
    for item in ("params", "optimizer", "progress"):
        assert same_tree(a[item], b[item]), item
    timed = ("tokens_per_second", "input_wait_pct", "goodput_pct")

    def keep(path):
        records = map(json.loads, path.read_text().splitlines())
        return [{name: value for name, value in record.items() if name not in timed} for record in records]

    assert keep(whole / "metrics.jsonl") == keep(resumed / "metrics.jsonl")
    assert json.loads((whole / "evaluation.json").read_text()) == json.loads((resumed / "evaluation.json").read_text())
    again = (whole / "metrics.jsonl").read_bytes()
    train(tiny(*settings, "name=whole"))  # finished: nothing happens
    assert (whole / "metrics.jsonl").read_bytes() == again


def test_init_from_starts_with_those_parameters_and_refuses_other_shapes(tiny):
    base = train(tiny("training.steps=4", "name=base"))
    child = train(tiny("training.steps=2", "name=child", f"training.init_from={base}", "training.learning_rate=0"))
    assert same_tree(newest(base)[1]["params"], newest(child)[1]["params"])
    with pytest.raises(UserError, match=r"kernel has shape \[2, 32, 32\], the config needs \[2, 64, 64\]"):
        train(tiny("training.steps=2", "name=wide", "model.width=64", f"training.init_from={base}"))
    with pytest.raises(UserError, match="is not a checkpoint"):
        train(tiny("training.steps=2", "name=lost", f"training.init_from={base}/tensorboard"))
    assert not (base.parent / "lost").exists() and not (base.parent / "wide").exists()  # nothing half-written


def test_another_config_may_not_take_over_a_run(tiny):
    run = train(tiny("training.steps=2", "name=mine"))
    with pytest.raises(UserError, match="another training"):
        train(tiny("training.steps=3", "name=mine"))
    shutil.rmtree(run)


def test_checkpoints_are_evenly_spaced():
    config = load_config(None, ["training.steps=100", "checkpoint.count=30"])
    steps = make_plan(config, 50).checkpoint_steps
    assert len(steps) == 30 and steps[-1] == 100 and set(np.diff(steps)) <= {3, 4}
    with pytest.raises(UserError, match="checkpoint.count 30"):
        make_plan(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=20)), 50)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_warms_up_and_ends_where_it_should(schedule):
    config = load_config(None, [f"training.schedule={schedule}", "training.warmup_steps=10"]).training
    rate = learning_rate_schedule(config, 100)
    values = np.array([float(rate(step)) for step in range(101)])
    assert values[0] == 0 and values[10] == pytest.approx(config.learning_rate) == values.max()
    assert values[100] == pytest.approx(0.1 * config.learning_rate, rel=1e-5)
    assert (np.diff(values[10:]) <= 1e-12).all()


def test_train_step_is_a_plain_function(tiny, prepared):
    """Other people's loops may call it without our compile helper."""
    config = tiny()
    optimizer = make_optimizer(config.training, 10)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer)
    blocks, _ = load_blocks(config, prepared)
    batch = next(batches(blocks, batch_size=8, seed=0))
    new, metrics = train_step(state, batch, prepared.bank, config=config, optimizer=optimizer)
    assert int(new["step"]) == 1 and float(metrics["loss"]) == pytest.approx(np.log(prepared.tokenizer.vocab_size), rel=0.1)
