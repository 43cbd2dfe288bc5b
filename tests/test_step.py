"""What a step may do besides: be left out, come in one dispatch with others, follow another optimizer or schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmft_jax.config import load_config
from rmft_jax.data.loader import batches
from rmft_jax.errors import UserError
from rmft_jax.training.loop import dispatches, put
from rmft_jax.training.mesh import make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import learning_rate_schedule, make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import accept, compile_train_step, init_guard, init_state
from rmft_jax.training.tracker import tracker_shape


def begin(config, prepared, devices=1):
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    optimizer = make_optimizer(config.training, 50)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer)
    state = jax.device_put(state, shardings_for(state, mesh))
    blocks, _ = load_blocks(config, prepared)
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)
    return mesh, optimizer, state, source, jax.device_put(prepared.bank, replicated(mesh))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(tiny, prepared):
    config = tiny("training.warmup_steps=0")
    mesh, optimizer, state, source, bank = begin(config, prepared)
    step = compile_train_step(config, optimizer, mesh, state)
    state, _ = jax.block_until_ready(step(state, put([next(source)], mesh), bank))
    good = jax.tree.map(jnp.copy, state)
    state["params"]["embed"] = state["params"]["embed"].at[:, 0].set(jnp.nan)
    broken = jax.tree.map(jnp.copy, state)
    state, metrics = jax.block_until_ready(step(state, put([next(source)], mesh), bank))
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    assert same(state["optimizer"], broken["optimizer"]) and same(state["seen"], broken["seen"])
    assert np.array_equal(state["params"]["embed"], broken["params"]["embed"], equal_nan=True)
    assert int(state["step"]) == 2 and float(state["guard"]["loss"]) == float(good["guard"]["loss"])
    state["params"] = good["params"]
    state, metrics = jax.block_until_ready(step(state, put([next(source)], mesh), bank))
    assert metrics["skipped"] == 1 and metrics["skipped_in_a_row"] == 0


def test_a_spike_is_left_out_and_a_lasting_change_is_not():
    config = load_config(None, ["training.skip_above=1.5"])
    guard, one = init_guard(), jnp.int32(1)
    take = lambda guard, loss: accept(guard, config, jnp.float32(loss), jnp.float32(1), step=one)  # noqa: E731
    for _ in range(5):
        ok, guard = take(guard, 2.0)
        assert ok
    assert float(guard["loss"]) == pytest.approx(2.0)
    ok, guard = take(guard, 9.0)
    assert not ok and float(guard["loss"]) == pytest.approx(0.98 * 2 + 0.02 * 3) and int(guard["skipped"]) == 1
    assert take(guard, 2.5)[0]
    for _ in range(300):
        ok, guard = take(guard, 9.0)
    assert ok
    assert not accept(guard, config, jnp.float32(2), jnp.float32(jnp.inf), step=one)[0]


@pytest.mark.parametrize("devices", [1, 8])
def test_however_many_steps_a_dispatch_has_they_are_the_same_to_the_last_bit(tiny, prepared, devices):
    config = tiny("tracker.enabled=true", "training.sequence_length=32", "training.log_every=64")
    runs = {}
    for count in (1, 8, 64):
        mesh, optimizer, _, source, _ = begin(config, prepared, devices)
        shape = tracker_shape(config, len(load_blocks(config, prepared)[0]))
        state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, shape)
        state, bank = jax.device_put((state, prepared.bank), (shardings_for(state, mesh), replicated(mesh)))
        step, losses = compile_train_step(config, optimizer, mesh, state, steps=count), []
        for _ in range(64 // count):
            batch = put([next(source) for _ in range(count)], mesh)
            state, metrics = jax.block_until_ready(step(state, batch, bank))
            losses.append(np.ravel(metrics["loss"]))
        runs[count] = jax.device_get({"loss": np.concatenate(losses), "state": state})
    assert runs[1]["loss"][-1] < runs[1]["loss"][0] - 0.5
    assert runs[1]["state"]["tracker"]["counts"]["hits"].sum() > 0
    assert same(runs[1], runs[8]) and same(runs[1], runs[64])


def test_dispatches_stop_where_something_is_done_with_the_state():
    assert list(dispatches(0, 10, 4, {5, 10})) == [(4, 4), (5, 1), (9, 4), (10, 1)]
    assert list(dispatches(3, 7, 2, {5})) == [(5, 2), (7, 2)]
    assert list(dispatches(0, 3, 1, {1})) == [(1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_every_optimizer_learns(tiny, prepared, name):
    rate = {"lion": 1e-3}.get(name, 1e-2)
    config = tiny(f"training.optimizer={name}", f"training.learning_rate={rate}", "training.warmup_steps=0")
    mesh, optimizer, state, source, bank = begin(config, prepared)
    step = compile_train_step(config, optimizer, mesh, state)
    batch, losses = next(source), []
    for _ in range(12):
        state, metrics = jax.block_until_ready(step(state, put([batch], mesh), bank))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5, losses


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_weight_decay_is_the_rate_times_the_weight_on_matrices_only(name):
    settings = [f"training.optimizer={name}", "training.learning_rate=0.1", "training.warmup_steps=0",
                "training.final_learning_rate_ratio=1"]  # fmt: skip
    params = {"blocks": {"out": {"kernel": jnp.full((2, 3, 4), 2.0)}, "norm": {"scale": jnp.full((2, 3), 2.0)}}}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates = []
    for decay in (0.0, 0.5):
        optimizer = make_optimizer(load_config(None, [*settings, f"training.weight_decay={decay}"]).training, 10)
        state = optimizer.init(params)
        _, state = optimizer.update(zero, state, params)  # the first rate of a warm-up of one step is 0
        updates.append(optimizer.update(zero, state, params)[0])
    difference = jax.tree.map(jnp.subtract, updates[1], updates[0])["blocks"]
    np.testing.assert_allclose(difference["out"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-4)
    np.testing.assert_allclose(difference["norm"]["scale"], 0.0, atol=1e-8)


def test_muon_orthogonalises_each_layer_on_its_own():
    """A step on a matrix has nearly equal singular values, however large the other layer's gradient is."""
    settings = ["training.optimizer=muon", "training.weight_decay=0", "training.gradient_clip=0", "training.warmup_steps=0"]
    optimizer = make_optimizer(load_config(None, settings).training, 10)
    gradient = np.random.default_rng(0).normal(size=(2, 8, 6)) * np.array([1.0, 50.0])[:, None, None]
    tree = {"blocks": {"up": {"kernel": jnp.asarray(gradient, jnp.float32)}}}
    state = optimizer.init(tree)
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, tree), state, tree)
    update = optimizer.update(tree, state, tree)[0]["blocks"]["up"]["kernel"]
    for layer in update:
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2  # 5 iterations leave them within about 0.7 and 1.2
    np.testing.assert_allclose(*(np.linalg.norm(layer) for layer in update), rtol=0.2)


def test_wsd_is_flat_and_then_falls_linearly():
    config = load_config(None, ["training.schedule=wsd", "training.warmup_steps=10", "training.learning_rate=1.0"]).training
    rates = np.array([learning_rate_schedule(config, 100)(step) for step in range(101)])
    np.testing.assert_allclose(rates[:10], np.arange(10) / 10, atol=1e-6)
    np.testing.assert_allclose(rates[10:81], 1.0, atol=1e-6)
    np.testing.assert_allclose(rates[80:], np.linspace(1.0, 0.1, 21), atol=1e-5)


def test_settings_that_contradict_each_other_are_refused(tiny):
    with pytest.raises(UserError, match="skip_above is 0.5"):
        tiny("training.skip_above=0.5")
    with pytest.raises(UserError, match="which steps are left out would tell of the data"):
        tiny("training.skip_above=2", "privacy.noise_multiplier=1")


def test_lion_moves_by_the_sign():
    """A first update of Lion is the sign of the gradient times the rate."""
    settings = ["training.optimizer=lion", "training.weight_decay=0", "training.gradient_clip=0", "training.warmup_steps=0",
                "training.final_learning_rate_ratio=1"]  # fmt: skip
    optimizer = make_optimizer(load_config(None, settings).training, 10)
    params = {"kernel": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    moved = optax.apply_updates(params, optimizer.update({"kernel": jnp.array([0.1, -7.0, 0.0])}, state, params)[0])
    np.testing.assert_allclose(moved["kernel"], params["kernel"] - 2e-3 * np.array([1, -1, 0]), atol=1e-6)
