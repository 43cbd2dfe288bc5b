"""Fused attention against the plain one: values, gradients, several devices; and who is told what cannot serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmft_jax.config import load_config
from rmft_jax.errors import UserError
from rmft_jax.kernels import FUSED_ATTENTION, attention, causal_mask, fused_attention, rotary, rotary_angles, why_not_fused
from rmft_jax.models.gpt import hidden, init_params
from rmft_jax.training import attention as choice
from rmft_jax.training.mesh import batch_sharding, make_mesh, placement, shardings_for

LENGTH = 128


def rows(seed, *, heads=2, groups=2, width=64, length=LENGTH, dtype=jnp.float32):
    """Return q, k, v, weights of the output, and segment ids of packed documents with odd borders and padding."""
    keys = jax.random.split(jax.random.key(seed), 5)
    counts = (heads, groups, groups, heads)
    arrays = [jax.random.normal(key, (2, n, length, width), dtype) for key, n in zip(keys, counts, strict=False)]
    segments = jnp.sort(jax.random.randint(keys[4], (2, length), 1, 5), axis=1).at[0, -17:].set(0)
    return *arrays, segments


def value_and_gradients(function, q, k, v, weights, segments):
    """Return the weighted sum of the outputs of text and its gradients. What padding attends to means nothing."""
    text = (segments > 0)[:, None, :, None]

    def total(q, k, v):
        out = function(q, k, v, segments).astype(jnp.float32)
        return jnp.sum(jnp.where(text, weights * out, 0)), out * text

    return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)


def plain(q, k, v, segments, scale=0.0):
    return attention(q, k, v, causal_mask(segments), scale)


@pytest.mark.parametrize("name", FUSED_ATTENTION)
@pytest.mark.parametrize(
    "case", [{}, {"groups": 1}, {"heads": 4, "groups": 2, "length": 256}, {"scale": 0.3}, {"width": 128}], ids=str
)
def test_equals_plain_attention(name, case):
    scale = case.get("scale", 0.0)
    inputs = rows(1, **{key: value for key, value in case.items() if key != "scale"})
    fused = functools.partial(fused_attention, scale=scale, name=name, interpret=True)
    ours = value_and_gradients(fused, *inputs)
    expected = value_and_gradients(functools.partial(plain, scale=scale), *inputs)
    np.testing.assert_allclose(ours[0][1], expected[0][1], atol=3e-6)
    for a, b in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_a_kernel_that_forgot_documents_would_be_seen(name):
    inputs = rows(2)
    fused = functools.partial(fused_attention, name=name, interpret=True)
    leaking = value_and_gradients(lambda q, k, v, _: fused(q, k, v, jnp.ones((2, LENGTH), jnp.int32)), *inputs)
    expected = value_and_gradients(plain, *inputs)
    assert float(jnp.abs(leaking[0][1] - expected[0][1]).max()) > 0.1


@pytest.mark.parametrize("name", FUSED_ATTENTION)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [64, 128])
def test_compiles_for_its_platform(name, dtype, width):
    """As far as that can be known without the device: the kernels, forward and backward, lower for it."""
    shape = lambda heads: jax.ShapeDtypeStruct((2, heads, 1024, width), dtype)  # noqa: E731
    segments = jnp.ones((2, 1024), jnp.int32)
    total = lambda q, k, v: jnp.sum(fused_attention(q, k, v, segments, name=name).astype(jnp.float32))  # noqa: E731
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(shape(4), shape(2), shape(2))
    platform = {"triton": "cuda", "splash": "tpu"}[name]
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("custom_call") >= 3  # forward, dq, dk and dv


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_on_a_mesh_each_device_runs_its_own_rows_and_heads(name):
    config = load_config(None, ["model.layers=2", "model.width=256", "model.heads=4", "model.kv_heads=2", "mesh.replica=1",
                                "mesh.fsdp=4", "mesh.tensor=2"])  # fmt: skip
    params = init_params(config.model, 64, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, LENGTH), 0, 64)
    segments = jnp.sort(jax.random.randint(jax.random.key(2), (8, LENGTH), 1, 4), axis=1)
    mesh = make_mesh(config.mesh)
    expected = jax.jit(lambda p: hidden(p, config.model, tokens, segments))(params)

    def spread(params, tokens, segments):
        with placement(mesh):
            return hidden(params, config.model, tokens, segments, fused=name, interpret=True)

    split = batch_sharding(mesh)
    program = jax.jit(spread, in_shardings=(shardings_for(params, mesh), split, split))
    np.testing.assert_allclose(program(params, tokens, segments), expected, atol=2e-5)


def choose(monkeypatch, platform, *overrides, devices=1):
    monkeypatch.setattr(choice.jax, "default_backend", lambda: platform)
    config = load_config(None, ["model.width=256", *overrides])
    return choice.choose_attention(config, make_mesh(config.mesh, jax.devices()[:devices])).training.attention


def test_auto_takes_what_serves_and_says_what_does_not(monkeypatch, capsys):
    assert choose(monkeypatch, "gpu") == "triton" and choose(monkeypatch, "tpu") == "splash"
    assert choose(monkeypatch, "cpu") == "xla" and not capsys.readouterr().err
    assert choose(monkeypatch, "gpu", "training.sequence_length=100") == "xla"
    assert "xla and not triton, since rows of 100 tokens are no multiple of 64" in capsys.readouterr().err
    assert choose(monkeypatch, "gpu", "training.attention=xla") == "xla"


@pytest.mark.parametrize(
    "platform, overrides, reason",
    [
        ("cpu", ["training.attention=triton"], "it runs on GPU, not on CPU"),
        ("tpu", ["training.attention=triton"], "it runs on GPU, not on TPU"),
        ("gpu", ["training.attention=triton", "model.local_window=8"], "it has no local layers"),
        ("tpu", ["training.attention=splash", "training.sequence_length=192"], "192 tokens are no multiple of 128"),
        ("tpu", ["training.attention=splash", "model.width=128"], "a head width of 32 is no multiple of 64"),
        ("gpu", ["training.attention=triton", "privacy.noise_multiplier=1"], "DP-SGD"),
    ],
)
def test_a_kernel_that_was_named_and_cannot_serve_is_refused(monkeypatch, platform, overrides, reason):
    with pytest.raises(UserError, match=reason):
        choose(monkeypatch, platform, *overrides)


def test_a_context_axis_is_refused(monkeypatch):
    with pytest.raises(UserError, match="mesh.context is 2, and the kernel needs whole rows"):
        choose(monkeypatch, "gpu", "training.attention=triton", "mesh.context=2", devices=2)
    assert not why_not_fused("triton", platform="gpu", head_dim=64, length=1024)


def test_rotary_is_a_product_with_complex_numbers():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 40]], np.int32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[0, :, None] * 100.0 ** (-np.arange(4) / 4))
    ours = rotary(jnp.asarray(x), *rotary_angles(jnp.asarray(positions), 8, 100.0))
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)
