"""Any mesh: the same losses, each array in parts of equal size, and what does not divide is refused."""

import jax
import numpy as np
import pytest

from rmft_jax.config import MeshConfig
from rmft_jax.data.loader import batches
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import place
from rmft_jax.training.loop import train
from rmft_jax.training.mesh import (
    abstract_mesh,
    batch_sharding,
    make_mesh,
    mesh_sizes,
    placement,
    replicated,
    shardings_for,
)
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import compile_train_step, init_state

MESHES = {
    "1": ["mesh.replica=1"],
    "fsdp 8": ["mesh.replica=1", "mesh.fsdp=8"],
    "fsdp 4 x tensor 2": ["mesh.replica=1", "mesh.fsdp=4", "mesh.tensor=2"],
    "tensor 2": ["mesh.replica=1", "mesh.tensor=2"],
    "replica 2 x fsdp 2 x context 2": ["mesh.replica=2", "mesh.fsdp=2", "mesh.context=2"],
}


def run(config, prepared, steps, devices):
    """Take some steps; return the losses and the last state."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    optimizer = make_optimizer(config.training, 100)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer)
    state = jax.device_put(state, shardings_for(state, mesh))
    blocks, _ = load_blocks(config, prepared)
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)
    bank = jax.device_put(prepared.bank, replicated(mesh))
    step = compile_train_step(config, optimizer, mesh, state)
    losses = []
    for _ in range(steps):
        batch = jax.device_put(next(source), batch_sharding(mesh))
        state, metrics = jax.block_until_ready(step(state, batch, bank))  # see conftest
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    return losses, state


@pytest.fixture(scope="module")
def runs(tiny, prepared):
    devices = {"1": 1, "tensor 2": 2}
    return {name: run(tiny(*mesh), prepared, 20, devices.get(name, 8)) for name, mesh in MESHES.items()}


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_losses_agree_on_every_mesh(runs, mesh):
    losses, expected = runs[mesh][0], runs["1"][0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.5


def test_fsdp_splits_parameters_and_optimizer_state(runs):
    _, state = runs["fsdp 8"]
    leaves = jax.tree.leaves((state["params"], state["optimizer"]))
    total = sum(leaf.nbytes for leaf in leaves)
    for device in jax.devices():
        held = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == device)
        assert held <= 1.1 / 8 * total


def test_context_splits_positions():
    """Each device holds its rows and its positions; without rules, nothing is asked of XLA."""
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, context=2))

    def split(x):
        with placement(mesh):
            return place(x, "batch", "sequence")

    x = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    y = jax.jit(split, in_shardings=batch_sharding(mesh))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(1, 3, 3)} and (np.asarray(y) == x).all()
    assert place(x, "batch", "sequence") is x


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({"replica": 2, "fsdp": -1, "context": 2}, 16, (2, 4, 1, 2)),
        ({"replica": 1, "tensor": 3}, 3, (1, 1, 3, 1)),
        ({"tensor": 3}, 8, None),
        ({"replica": 2}, 8, None),
        ({"replica": 4, "context": 4}, 8, None),
    ],
)
def test_axes_multiply_to_the_devices(mesh, devices, sizes):
    config = MeshConfig(**mesh)
    if sizes is None:
        with pytest.raises(UserError, match=f"does not fit {devices} devices"):
            mesh_sizes(config, devices)
    else:
        assert tuple(mesh_sizes(config, devices).values()) == sizes == tuple(abstract_mesh(config, devices).shape.values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("training.batch_size=12 mesh.fsdp=8", "training.batch_size 12 is not divisible by the 8 .*: use 8 or 16"),
        ("training.batch_size=12 mesh.fsdp=2 mesh.replica=4", "training.batch_size 12 .* mesh.replica x mesh.fsdp"),
        (
            "training.sequence_length=63 mesh.context=2",
            "training.sequence_length 63 .* use 62 or 64, or change",
        ),
        ("mesh.tensor=4", "model.heads 2 is not divisible by the 4 devices of mesh.tensor: use 4, or"),
        ("model.mlp_width=33 mesh.tensor=2", "model.mlp_width. 33 .* use 32 or 34"),
        ("tokenizer.vocab_size=701 mesh.tensor=2", "tokenizer.vocab_size 701 .* use 700 or 702"),
        ("model.width=36 mesh.fsdp=8", "model.width 36 .* use 32 or 40, or change mesh.fsdp"),
    ],
)
def test_a_fixed_mesh_that_does_not_divide_is_refused_with_the_config(tiny, settings, says):
    with pytest.raises(UserError, match=says):
        tiny(*settings.split())


def test_train_refuses_what_the_devices_at_hand_do_not_divide(tiny, monkeypatch):
    """The mesh is only known once the devices are: nothing may be compiled or written before the check."""
    monkeypatch.setattr(jax, "jit", None)
    config = tiny("training.batch_size=4", "name=odd")
    with pytest.raises(UserError, match="training.batch_size 4 is not divisible by the 8 devices of mesh.replica"):
        train(config)
    assert not config.run_dir.exists()
