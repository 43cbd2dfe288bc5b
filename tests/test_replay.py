"""Steps that were left out are noted and can be looked at again; checkpoints by the clock, and of other versions."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import rmft

from rmft_jax.config import load_config, to_yaml
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import init_params
from rmft_jax.training import checkpoints as module
from rmft_jax.training import loop
from rmft_jax.training.checkpoints import Checkpoints, abstract
from rmft_jax.training.loop import train
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.replay import replay
from rmft_jax.training.setup import set_up

JUMPY = ["training.skip_above=1.0005", "training.learning_rate=1e-5", "training.steps=40", "training.log_every=7",
         "checkpoint.count=1", "checkpoint.every_steps=15", "training.steps_per_dispatch=3"]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def jumpy(tiny):
    config = tiny(*JUMPY, "name=jumpy")
    return config, train(config)


def test_every_step_that_is_left_out_is_noted_with_its_blocks(jumpy):
    config, directory = jumpy
    noted = lines(directory / "skipped.jsonl")
    assert len(noted) == int(lines(directory / "metrics.jsonl")[-1]["skipped"]) > 0
    blocks, per_epoch = len(set_up(config).blocks), {}
    for record in noted:
        assert len(record["blocks"]) == 8 and all(0 <= block < blocks for block in record["blocks"])
        assert record["epoch"] == (record["step"] - 1) * 8 // blocks
        per_epoch.setdefault(record["epoch"], []).extend(record["blocks"])
    assert [record["step"] for record in noted] == sorted({record["step"] for record in noted})


def test_a_replay_takes_the_step_again(jumpy, capsys):
    _, directory = jumpy
    last = lines(directory / "skipped.jsonl")[-1]
    found = replay(directory)
    assert found["step"] == last["step"] and found["left_out"] and found["parameters_finite"]
    assert found["from_step"] == 15 * ((last["step"] - 1) // 15)
    assert sorted(row["block"] for row in found["rows"]) == sorted(last["blocks"])
    losses = [row["loss"] for row in found["rows"]]
    assert losses == sorted(losses, reverse=True)
    assert min(losses) < found["loss"] < max(losses)
    assert json.loads((directory / "replay" / f"{last['step']}.json").read_text()) == found
    code, out, _ = rmft("replay", directory, "--step", 7, "--json", capsys=capsys)
    metrics = {record["step"]: record for record in lines(directory / "metrics.jsonl")}
    again = json.loads(out)
    assert code == 0 and again["loss"] == metrics[7]["loss"] and again["gradient_norm"] == metrics[7]["gradient_norm"]


def test_a_row_alone_has_the_loss_and_gradient_of_its_share(tiny):
    """The mean over rows, weighted by targets, is that of the batch."""
    directory = train(tiny("name=rows", "training.steps=4", "checkpoint.count=1", "training.log_every=1"))
    found = replay(directory, 3)
    losses, targets = (np.array([row[name] for row in found["rows"]]) for name in ("loss", "tokens"))
    assert not found["left_out"]
    full = targets == max(targets)
    assert full.sum() >= 4 and abs(losses[full].mean() - found["loss"]) < 0.2
    with pytest.raises(UserError, match="left no step out: name one with --step"):
        replay(directory)
    with pytest.raises(UserError, match="has no step 9: name one of 1 to 4"):
        replay(directory, 9)


def test_a_run_that_gives_up_says_how_to_look(tiny, monkeypatch, capsys):
    monkeypatch.setattr(loop, "_GIVE_UP", 2)
    config = tiny(*JUMPY, "name=given_up", "training.skip_above=1.0001", "training.log_every=1")
    with pytest.raises(UserError, match=r"were left out.*`rmft replay .*given_up` shows what was in them"):
        train(config)
    assert len(lines(config.run_dir / "skipped.jsonl")) >= 2
    code, out, _ = rmft("replay", config.run_dir, capsys=capsys)
    assert code == 0 and "left out again" in out and "gradient norm" in out


def test_checkpoints_by_the_clock(tiny):
    settings = ["training.steps=12", "checkpoint.count=1", "checkpoint.keep_last=3", "checkpoint.every_minutes=1e-6"]
    steps = lambda run: Checkpoints.open(run)[0].steps()  # noqa: E731
    assert steps(train(tiny(*settings, "name=clock"))) == [10, 11, 12]
    assert steps(train(tiny(*settings, "name=clock_kept", "checkpoint.keep_hours=1e-9"))) == list(range(1, 13))
    assert steps(train(tiny(*settings, "name=clock_off", "checkpoint.every_minutes=0"))) == [12]


def test_checkpoints_of_the_first_schema_are_read_and_of_a_later_one_refused(tiny, monkeypatch, capsys, tmp_path):
    config = tiny("training.steps=8", "checkpoint.count=2", "training.log_every=1", "name=schemas")
    expected = train(config)
    run = set_up(config)
    old = tiny("training.steps=8", "checkpoint.count=2", "training.log_every=1", "name=schema_one")
    old.run_dir.mkdir(parents=True)
    (old.run_dir / "config.yaml").write_text(to_yaml(old))
    for name in ("metrics.jsonl", "evaluation.json"):
        (old.run_dir / name).write_text((expected / name).read_text())
    state = Checkpoints.open(expected)[0].restore(4, run.target)
    del state["guard"]["recent"]
    state = before(config.model, state)
    writer = Checkpoints(old.run_dir / "checkpoints")
    writer.save(state)
    writer.close()
    about = old.run_dir / "checkpoints" / "4" / "about"
    kept = (about / "metadata").read_text()
    (about / "metadata").write_text(kept.replace('"schema": 3', '"schema": 9').replace('"schema":3', '"schema":9'))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(old))
    code, _, err = rmft("train", path, capsys=capsys)
    assert code == 2 and "in schema 9" in err and "install that version or a later one" in err
    assert not (old.run_dir / "damaged").exists()
    shutil.rmtree(about)
    train(load_config(path))
    states = [Checkpoints.open(place)[0].restore(8, run.target) for place in (expected, old.run_dir)]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, states), strict=True))
    assert module.SCHEMA == 3


def side_by_side(model, path, leaf):
    """Return a leaf as it lay before schema 3: all queries, keys and values after one another, as gate and up."""
    names = [getattr(key, "key", "") for key in path]
    if "qkv" in names:
        groups = leaf.reshape(*leaf.shape[:-1], model.groups, -1, model.head_dim)
        parts = groups[..., :-2, :], groups[..., -2, :], groups[..., -1, :]
    elif "gate_up" in names:
        pairs = leaf.reshape(*leaf.shape[:-1], math.gcd(model.groups, model.mlp), 2, -1)
        parts = pairs[..., 0, :], pairs[..., 1, :]
    else:
        return leaf
    return jnp.concatenate([part.reshape(*leaf.shape[:-1], -1) for part in parts], axis=-1)


def before(model, tree):
    return jax.tree_util.tree_map_with_path(functools.partial(side_by_side, model), tree)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
@pytest.mark.parametrize("shape", ["width=128", "width=512 mlp_width=176", "width=384"])
def test_what_optimizers_keep_of_columns_is_put_in_order(tmp_path, shape, optimizer):
    """An update of parameters that lie as before, read again, is an update of those in order. Matrices of 384 columns of
    queries, keys and values have fewer rows, more, and as many."""
    model = ["layers=2", "heads=4", "kv_heads=1", "head_width=64", "qkv_bias=true", *shape.split()]
    settings = [*(f"model.{one}" for one in model), f"training.optimizer={optimizer}", f"out={tmp_path}"]
    config = load_config(None, settings)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    params, gradient = (init_params(config.model, 64, jax.random.key(seed)) for seed in (0, 1))
    rule = make_optimizer(config.training, 10)

    def updated(params, gradient):
        state = rule.update(gradient, rule.init(params), params)[1]
        return {"params": params, "optimizer": state, "step": np.int32(1), "seen": np.int32(8)}

    expected = updated(params, gradient)
    writer = Checkpoints(tmp_path / "checkpoints")
    writer.save(updated(before(config.model, params), before(config.model, gradient)))
    writer.close()
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "about")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = abstract(jax.eval_shape(lambda: expected), jax.tree.map(lambda _: here, expected))
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    if shape == "width=384" and optimizer == "adafactor":
        with pytest.raises(UserError, match=r"qkv.kernel can be of rows or of columns, 384 of both: start another run"):
            checkpoints.restore(1, target)
        expected = {"params": params}
        found = {"params": checkpoints.restore_params(1, target["params"])}
    else:
        found = checkpoints.restore(1, target)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9, err_msg=jax.tree_util.keystr(path))
