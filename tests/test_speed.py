"""What keeps a step fast, as far as a test can hold it: the size of the program, the host's work, what is left out."""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmft_jax import cli
from rmft_jax.data.loader import batches
from rmft_jax.kernels import attention, causal_attention, causal_mask
from rmft_jax.training.mesh import batch_sharding, make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import compile_train_step, init_state

SMALL = ("model.width=16", "training.sequence_length=32", "training.batch_size=2")


def build(config, prepared):
    """Return (the jitted step, state, batch, bank) on one device."""
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:1]), make_optimizer(config.training, 50)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer)
    state = jax.device_put(state, shardings_for(state, mesh))
    first = next(batches(load_blocks(config, prepared)[0], batch_size=config.training.batch_size, seed=0))
    batch, bank = jax.device_put(first, batch_sharding(mesh)), jax.device_put(prepared.bank, replicated(mesh))
    return compile_train_step(config, optimizer, mesh, state), state, batch, bank


def test_a_deep_model_is_no_larger_a_program_than_a_shallow_one(tiny, prepared):
    def size(layers):
        step, *inputs = build(tiny(*SMALL, f"model.layers={layers}"), prepared)
        return len(step.lower(*inputs).as_text())

    shallow, deep, deeper = size(6), size(24), size(48)
    assert deep < 1.05 * shallow and deeper < 1.05 * deep


@pytest.mark.slow
def test_compiling_48_layers_takes_no_longer_than_6(tiny, prepared):
    def seconds(layers):
        step, *inputs = build(tiny(*SMALL, f"model.layers={layers}"), prepared)
        lowered = step.lower(*inputs)
        begin = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - begin

    pairs = [(seconds(48), seconds(6)) for _ in range(3)]
    assert np.median([deep / shallow for deep, shallow in pairs]) < 1.3, pairs


def test_the_host_hands_over_a_step_of_24_layers_in_half_a_millisecond(tiny, prepared):
    step, state, batch, bank = build(tiny(*SMALL, "model.layers=24"), prepared)
    spent = []
    for _ in range(40):
        begin = time.perf_counter()
        state, metrics = step(state, batch, bank)
        spent.append(time.perf_counter() - begin)
        jax.block_until_ready((state, metrics))
    assert min(spent) < 0.5e-3, sorted(spent)
    assert step._cache_size() == 1


@pytest.mark.parametrize("length, groups, window", [(16, 4, 0), (16, 2, 0), (16, 4, 3), (14, 4, 0)])
def test_attention_without_the_future_is_the_same(length, groups, window):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (4, groups, groups, 4)
    q, k, v, weights = (jax.random.normal(key, (2, n, length, 8)) for key, n in zip(keys, heads, strict=True))
    segments = jnp.sort(jax.random.randint(keys[0], (2, length), 1, 4), axis=1).at[0, -2:].set(0)
    mask = causal_mask(segments, window)
    text = (segments > 0)[:, None, :, None]  # what padding attends to means nothing

    def total(function, q, k, v):
        return jnp.sum(jnp.where(text, weights * function(q, k, v, mask), 0))

    both = (causal_attention, attention)
    ours, plain = (jax.value_and_grad(lambda *x, f=f: total(f, *x), (0, 1, 2))(q, k, v) for f in both)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_large_pages_are_asked_for_once_and_only_by_the_command_itself(monkeypatch, tmp_path):
    pages, started = tmp_path / "enabled", []
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(cli, "_PAGES", pages)
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["/bin/rmft", "train", "x.yaml"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    cli._use_large_pages()  # Python was started with other arguments: this is a program that calls `main`
    assert not started
    monkeypatch.setattr(sys, "orig_argv", ["python3", *sys.argv])
    cli._use_large_pages()
    assert started == [[sys.executable, "/bin/rmft", "train", "x.yaml"]]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    cli._use_large_pages()
    pages.write_text("[always] madvise never\n")
    monkeypatch.delenv("GLIBC_TUNABLES")
    cli._use_large_pages()
    assert len(started) == 1
