"""The loss in chunks is the plain loss, in value and gradient, at a fraction of its memory; microbatches change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from documents import small_batch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rmft_jax.kernels import cross_entropy
from rmft_jax.models.gpt import init_params
from rmft_jax.training.losses import loss_and_gradient


def drawn(tokens=37, width=16, vocabulary=101, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden, output = rng.normal(0, 1, (tokens, width)), rng.normal(0, 0.5, (width, vocabulary))
    targets, weights = rng.integers(0, vocabulary, tokens), rng.choice([0.0, 0.5, 1.0], tokens)
    return jnp.asarray(hidden, dtype), jnp.asarray(output, dtype), jnp.asarray(targets), jnp.asarray(weights, jnp.float32)


def plain(hidden, output, targets, weights, z_loss=0.0):
    """Return the loss as optax has it."""
    logits = (hidden @ output).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(weights * (nll + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2)), (nll, logits.argmax(-1) == targets)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [0, 1, 5, 36, 37, 1000])
def test_chunks_change_nothing(chunk, z_loss):
    inputs = drawn()
    ours = lambda h, w: cross_entropy(h, w, *inputs[2:], chunk, z_loss)  # noqa: E731
    expected = lambda h, w: plain(h, w, *inputs[2:], z_loss)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        (value, scores), gradient = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(*inputs[:2])
        (wanted, (nll, hit)), wanted_gradient = jax.value_and_grad(expected, argnums=(0, 1), has_aux=True)(*inputs[:2])
        undifferentiated, alone = jax.jit(ours)(*inputs[:2])
    assert value == pytest.approx(float(wanted), rel=1e-6) == pytest.approx(float(undifferentiated), rel=1e-6)
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(scores.hit, hit)
    np.testing.assert_array_equal(alone.hit, hit)
    for one, other in zip(gradient, wanted_gradient, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 10])
def test_a_vocabulary_in_parts_is_the_whole_one(chunk):
    """Four devices with a quarter of the columns each: the shares add up, and so do the gradients."""
    hidden, output, targets, weights = drawn(vocabulary=100)

    def ours(hidden, output):
        share = lambda h, w: jax.tree.map(lambda x: x[None], cross_entropy(h, w, targets, weights, chunk, 1e-2, "d"))  # noqa: E731
        specs = {"in_specs": (P(), P(None, "d")), "out_specs": P("d"), "check_vma": False}
        specs["mesh"] = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
        shares, scores = jax.shard_map(share, **specs)(hidden, output)
        return jnp.sum(shares), scores

    with jax.default_matmul_precision("highest"):
        (value, scores), gradient = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(hidden, output)
        expected = lambda h, w: plain(h, w, targets, weights, 1e-2)  # noqa: E731
        (wanted, (nll, hit)), wanted_gradient = jax.value_and_grad(expected, argnums=(0, 1), has_aux=True)(hidden, output)
    assert value == pytest.approx(float(wanted), rel=1e-6)
    for device in range(4):
        np.testing.assert_allclose(scores.nll[device], nll, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(scores.hit[device], hit)
    for one, other in zip(gradient, wanted_gradient, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 50])
def test_of_equally_likely_tokens_the_first_is_the_hit(chunk):
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 2, (400, 9)).astype(np.float32)  # several of the highest in nearly every row
    targets = rng.integers(0, 9, 400)
    _, scores = cross_entropy(jnp.eye(400), jnp.asarray(logits), jnp.asarray(targets), jnp.ones(400), chunk)
    np.testing.assert_array_equal(scores.hit, logits.argmax(-1) == targets)


def test_the_gradient_scales_with_what_follows():
    inputs = drawn()
    times = lambda factor: jax.grad(lambda h: factor * cross_entropy(h, *inputs[1:], 7)[0] ** 2)(inputs[0])  # noqa: E731
    twice = 2 * 3 * float(cross_entropy(*inputs)[0]) * jax.grad(lambda h: cross_entropy(h, *inputs[1:], 7)[0])(inputs[0])
    np.testing.assert_allclose(times(3.0), twice, rtol=1e-5, atol=1e-5)


def test_bfloat16_sums_the_gradient_of_the_output_in_float32():
    inputs = drawn(tokens=4096, width=8, vocabulary=16, dtype=jnp.bfloat16)
    exact = jax.grad(lambda w: plain(inputs[0].astype(jnp.float32), w, *inputs[2:])[0])(inputs[1].astype(jnp.float32))
    ours = jax.grad(lambda w: cross_entropy(inputs[0], w, *inputs[2:], 16)[0])(inputs[1])
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=0.02, atol=0.5)


def test_memory_is_below_a_quarter_at_50257_ids_and_8192_tokens():
    shapes = [(8192, 64), (64, 50257)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    inputs += [jax.ShapeDtypeStruct((8192,), kind) for kind in (jnp.int32, jnp.float32)]

    def peak(function):
        compiled = jax.jit(jax.grad(function, argnums=(0, 1))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = peak(lambda *inputs: plain(*inputs)[0])
    assert whole > 8192 * 50257 * 4
    assert peak(lambda *inputs: cross_entropy(*inputs, 1024)[0]) < whole / 4


SAVING = (
    "training.accumulation=4",
    "training.loss_chunk=50",
    "training.remat=full",
    "training.remat=dots",
    "training.accumulation=2 training.loss_chunk=33",
)


@pytest.mark.parametrize("settings", SAVING)
def test_what_saves_memory_changes_no_number(tiny, prepared, settings):
    """The rows of small_batch have different numbers of targets, so that a mean of means would differ."""
    config, masked, _ = small_batch(tiny, prepared, "loss.pii_weight=0.25", "training.z_loss=1e-3")
    saving = small_batch(tiny, prepared, "loss.pii_weight=0.25", "training.z_loss=1e-3", *settings.split())[0]
    assert saving != config
    cut = masked._replace(segment_ids=masked.segment_ids.at[0, 9:].set(0))
    params = init_params(config.model, prepared.tokenizer.vocab_size, jax.random.key(3))
    run = lambda config: jax.jit(lambda params: loss_and_gradient(params, config, cut))(params)  # noqa: E731
    (gradient, metrics), (expected, wanted) = run(saving), run(config)
    assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-6)
    np.testing.assert_array_equal(metrics["hit"], wanted["hit"])
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
