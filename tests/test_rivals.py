"""The rival defences: each by its own definition, each off unless switched on, each in the one train step."""

import dataclasses
import importlib.util
import json
import math
import struct

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from documents import small_batch, small_config
from scipy import stats

from rmft_jax.config import METHODS, load_config
from rmft_jax.data.loader import batches
from rmft_jax.errors import UserError
from rmft_jax.kernels import (
    MaskedBatch,
    average_weights,
    early_learning_penalty,
    goldfish_mask,
    mask_batch,
    target_mask,
    token_nll,
    window_hash,
)
from rmft_jax.memorization import compare
from rmft_jax.models import gpt
from rmft_jax.training import loop, privacy, setup
from rmft_jax.training.checkpoints import Checkpoints, abstract
from rmft_jax.training.evaluation import early_stopping
from rmft_jax.training.losses import loss_and_gradient, token_weights, weighted_loss
from rmft_jax.training.masking import masking_key, masking_rules
from rmft_jax.training.mesh import make_mesh, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.step import compile_train_step, init_state

# ---- goldfish loss


def murmur3(words):
    """MurmurHash3 x86 32, seed 0, of whole 32-bit words, in plain Python."""
    mask, h = 0xFFFFFFFF, 0
    for word in words:
        k = (word & mask) * 0xCC9E2D51 & mask
        k = (k << 15 | k >> 17) & mask
        h ^= k * 0x1B873593 & mask
        h = (h << 13 | h >> 19) & mask
        h = h * 5 + 0xE6546B64 & mask
    h ^= 4 * len(words)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> shift) * factor & mask
    return h ^ h >> 16


def packed_rows(seed, rows=6, width=40, vocabulary=5):
    """Random tokens, zeros among them, in rows of documents of random lengths with padding at the end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, width)).astype(np.int32)
    segments = 1 + np.cumsum(rng.random((rows, width)) < 0.08, axis=1).astype(np.int32)
    segments[-1, width // 2 :] = 0
    return tokens, segments


def test_the_hash_is_murmur3_by_its_published_vectors():
    text = struct.unpack("<I", b"test")[0]
    words = {0xFFFFFFFF: 0x76293B50, 0x87654321: 0xF55B516B, 0: 0x2362F9DE, text: 0xBA6BD213}
    tokens = np.array([[word, 7] for word in words], np.uint32).astype(np.int32)
    assert window_hash(tokens, np.ones_like(tokens), 1)[:, 1].tolist() == list(words.values())
    assert [murmur3([word]) for word in words] == list(words.values())


@pytest.mark.parametrize("context", [1, 13, 64])
def test_hashed_drops_agree_with_plain_python(context):
    tokens, segments = packed_rows(context)
    kept = np.asarray(goldfish_mask(tokens, segments, mode="hash", k=3, context=context))
    for row, segment, got in zip(tokens.tolist(), segments.tolist(), kept, strict=True):
        for i in range(len(row)):
            window = [row[j] for j in range(max(0, i - context), i) if segment[j] == segment[i]]
            assert got[i] == (murmur3(window) >= 2**32 // 3), (i, window)


def test_static_drops_every_kth_token_of_a_row():
    tokens = np.zeros((2, 10), np.int32)
    kept = goldfish_mask(tokens, np.ones_like(tokens), mode="static", k=4)
    assert np.asarray(kept).tolist() == [[True, True, True, False] * 2 + [True, True]] * 2
    assert np.asarray(goldfish_mask(tokens, tokens, mode="none", k=4)).all()


@pytest.mark.parametrize("k", [2, 4, 50])
@pytest.mark.parametrize("zeros", [False, True])
def test_one_token_in_k_is_dropped_even_where_every_window_holds_id_0(k, zeros):
    rng = np.random.default_rng(k)
    tokens = rng.integers(1, 30_000, (64, 512)).astype(np.int32)
    if zeros:
        tokens[:, ::5] = 0
    kept = np.asarray(goldfish_mask(tokens, np.ones_like(tokens), mode="hash", k=k))[:, 1:]
    assert stats.binomtest(int((~kept).sum()), kept.size, 1 / k).pvalue > 1e-4


def test_repeated_text_drops_the_same_tokens_wherever_it_stands():
    rng = np.random.default_rng(3)
    passage = rng.integers(0, 900, 60).astype(np.int32)
    tokens = rng.integers(0, 900, (40, 128)).astype(np.int32)
    inside, own = np.ones_like(tokens), np.ones_like(tokens)
    starts = rng.integers(0, 128 - 60, 40)
    for row, start in enumerate(starts):
        tokens[row, start : start + 60] = passage
        own[row, start:] += 1  # here the passage is a document of its own
        own[row, start + 60 :] += 1
    for segments, first in ((inside, 13), (own, 0)):
        kept = np.asarray(goldfish_mask(tokens, segments, mode="hash", k=4))
        copies = np.stack([kept[row, start + first : start + 60] for row, start in enumerate(starts)])
        assert (copies == copies[0]).all() and 0 < (~copies[0]).mean() < 0.5
    other = np.asarray(goldfish_mask(tokens, inside, mode="hash", k=4))[:, :13]
    assert (other != other[0]).any()


# ---- early-learning regularization


def test_early_learning_gradient_is_the_closed_form():
    rng = np.random.default_rng(0)
    z, zt, y, weight = rng.normal(0, 2, (5, 7)), rng.normal(0, 2, (5, 7)), rng.integers(0, 7, 5), 3.0

    def loss(z, zt):
        return jnp.sum(token_nll(z, jnp.asarray(y)) + weight * early_learning_penalty(z, zt))

    gradient, to_target = jax.grad(loss, argnums=(0, 1))(jnp.asarray(z, jnp.float32), jnp.asarray(zt, jnp.float32))
    p, t = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (z, zt))
    for n in range(5):
        for c in range(7):
            g = p[n, c] / (1 - p[n] @ t[n]) * sum((t[n, k] - t[n, c]) * p[n, k] for k in range(7))
            assert gradient[n, c] == pytest.approx(p[n, c] - (y[n] == c) + weight * g, abs=2e-6)
    assert (to_target == 0).all()


def test_early_learning_penalty_is_finite_where_both_are_certain():
    certain = jnp.zeros((1, 50_000)).at[0, 3].set(80.0)
    value, gradient = jax.value_and_grad(lambda z: early_learning_penalty(z, certain).sum())(certain)
    assert float(value) == pytest.approx(math.log(1e-4), rel=1e-3) and bool(jnp.isfinite(gradient).all())
    apart = jnp.zeros((1, 50_000)).at[0, 4].set(80.0)
    assert float(early_learning_penalty(apart, certain)[0]) == pytest.approx(math.log1p(-1e-4), rel=1e-3)


def test_average_of_weights_by_hand():
    average, params = {"a": jnp.zeros(2)}, {"a": jnp.array([1.0, 2.0])}
    first = average_weights(average, params, jnp.int32(0), 0.9)  # decay 1 / 10
    late = average_weights(average, params, jnp.int32(10_000), 0.9)
    np.testing.assert_allclose(first["a"], [0.9, 1.8], rtol=1e-6)
    np.testing.assert_allclose(late["a"], [0.1, 0.2], rtol=1e-6)


# ---- weights of tokens


def masked_row(tokens, segments, origin):
    row = lambda x: jnp.asarray(x, jnp.int32)[None]  # noqa: E731
    zero = jnp.zeros(1, jnp.int32)
    return MaskedBatch(row(tokens), row(segments), row(origin), row(tokens), jnp.zeros((1, 1), bool), zero)


def test_weights_by_origin_by_hand():
    masked = masked_row([5, 6, 7, 8, 9, 1, 2, 3], [1, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 0, 2, 2, 0, 0])
    weigh = lambda *settings: token_weights(load_config(None, list(settings)).loss, masked)[0].tolist()  # noqa: E731
    assert weigh() == [1, 1, 1, 0, 1, 1, 0]  # not across documents, not padding
    assert weigh("loss.pii_weight=0") == [0, 0, 1, 0, 1, 1, 0]
    assert weigh("loss.surrogate_weight=0.25") == [1, 1, 1, 0, 0.25, 1, 0]
    assert weigh("loss.surrogate_weight=0", "loss.pii_weight=0.5") == [0.5, 0.5, 1, 0, 0, 1, 0]
    assert weigh("loss.goldfish=static", "loss.goldfish_k=3") == [1, 0, 1, 0, 0, 1, 0]
    assert weigh("loss.goldfish=static", "loss.goldfish_k=2", "loss.pii_weight=0") == [0, 0, 0, 0, 0, 1, 0]


def test_a_batch_of_nothing_but_padding_teaches_nothing(tiny, prepared):
    config, masked, params = small_batch(tiny, prepared)
    empty = masked._replace(segment_ids=jnp.zeros_like(masked.segment_ids))
    gradient, metrics = jax.jit(lambda params: loss_and_gradient(params, config, empty))(params)
    assert float(metrics["loss"]) == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_a_token_without_weight_teaches_nothing(tiny, prepared):
    config, masked, params = small_batch(tiny, prepared, "loss.pii_weight=0")
    _, metrics = jax.jit(lambda params: loss_and_gradient(params, config, masked))(params)
    forward = jax.jit(lambda params: gpt.forward(params, config.model, masked.tokens[:, :-1], masked.segment_ids[:, :-1]))
    logits = forward(params)
    nll = np.asarray(-jax.nn.log_softmax(logits), np.float64)
    picked = np.take_along_axis(nll, np.asarray(masked.tokens)[:, 1:, None], -1)[..., 0]
    counts = np.asarray(target_mask(masked.segment_ids)) & (np.asarray(masked.origin)[:, 1:] != 1)
    assert counts.sum() < np.asarray(target_mask(masked.segment_ids)).sum()
    assert float(metrics["loss"]) == pytest.approx(picked[counts].mean(), rel=1e-6)
    assert float(metrics["targets"]) == counts.sum()


# ---- the train step


def start(config, prepared):
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.training, 100)
    blocks, _ = setup.load_blocks(config, prepared)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, blocks=len(blocks))
    state = jax.device_put(state, shardings_for(state, mesh))
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)
    return compile_train_step(config, optimizer, mesh, state), state, source, optimizer


def same_tree(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_without_a_rival_the_parameters_are_those_of_plain_training(tiny, prepared):
    config = tiny("model.layers=1", "model.width=16", "model.heads=1")  # the default defence
    step, state, source, optimizer = start(config, prepared)
    assert set(state) == {"params", "optimizer", "seen", "step", "guard"}
    plain = jax.tree.map(jnp.copy, (state["params"], state["optimizer"]))

    @jax.jit
    def plain_step(params, optimizer_state, batch):
        length, key = config.training.sequence_length + 1, masking_key(config.seed)
        masked = mask_batch(batch, prepared.bank, key, length=length, rules=masking_rules(config))

        def loss(params):
            logits = gpt.forward(params, config.model, masked.tokens[:, :-1], masked.segment_ids[:, :-1])
            targets = target_mask(masked.segment_ids)
            return jnp.sum(token_nll(logits, masked.tokens[:, 1:]) * targets) / jnp.maximum(jnp.sum(targets), 1)

        updates, optimizer_state = optimizer.update(jax.grad(loss)(params), optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state

    for _ in range(5):
        batch = next(source)
        state, _ = jax.block_until_ready(step(state, batch, prepared.bank))
        plain = plain_step(*plain, batch)
    for ours, expected in zip(*map(jax.tree.leaves, ((state["params"], state["optimizer"]), plain)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-6)


RIVALS = {
    "goldfish": ["loss.goldfish=hash"],
    "pii_loss": ["loss.pii_weight=0"],
    "elr": ["loss.elr_weight=1"],
    "elr_top": ["loss.elr_weight=1", "loss.elr_top=4"],
    "dropout": ["training.dropout=0.2"],
    "dp": ["privacy.noise_multiplier=1", "training.dropout=0.2"],
}


@pytest.fixture(scope="module")
def undefended(tiny, prepared):
    """Return the parameters after a few steps without a defence."""
    step, state, source, _ = start(small_config(tiny), prepared)
    for _ in range(12):
        state, _ = jax.block_until_ready(step(state, next(source), prepared.bank))
    return state["params"]


@pytest.mark.parametrize("name", RIVALS)
def test_each_rival_changes_training_compiles_once_and_goes_on_from_a_checkpoint(tiny, prepared, undefended, name, tmp_path):
    config = small_config(tiny, *RIVALS[name])
    step, state, source, _ = start(config, prepared)
    shapes = abstract(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    for number in range(12):
        if number == 9:
            saved = Checkpoints(tmp_path)
            saved.save(state)
            saved.close()
            rest = []
        batch = next(source)
        if number >= 9:
            rest.append(batch)
        state, metrics = jax.block_until_ready(step(state, batch, prepared.bank))
    assert step._cache_size() == 1 and np.isfinite(float(metrics["loss"]))
    assert not same_tree(state["params"], undefended)
    resumed = Checkpoints(tmp_path).restore(9, shapes)
    for batch in rest:
        resumed, _ = jax.block_until_ready(step(resumed, batch, prepared.bank))
    assert set(resumed) == set(state) and same_tree(resumed, state)
    assert ("average" in state) == (name == "elr")


def test_dropout_is_drawn_only_where_it_is_switched_on(tiny, prepared):
    config, masked, params = small_batch(tiny, prepared)
    inputs = masked.tokens[:, :-1], masked.segment_ids[:, :-1]
    program = lambda **more: str(  # noqa: E731
        jax.make_jaxpr(lambda params: gpt.forward(params, config.model, *inputs, **more))(params)
    )
    assert program() == program(dropout=0.0, key=jax.random.key(0)) and "random_bits" not in program()
    forward = jax.jit(lambda key: gpt.forward(params, config.model, *inputs, dropout=0.3, key=key))
    drops = [forward(jax.random.key(n)) for n in (0, 0, 1)]
    assert (drops[0] == drops[1]).all() and (drops[0] != drops[2]).any()
    x = jnp.ones((100, 1000))
    dropped = np.asarray(gpt._drop(x, 0.3, jax.random.key(5), 0))
    assert set(np.unique(dropped)) == {0, np.float32(1) / np.float32(0.7)}
    assert stats.binomtest(int((dropped == 0).sum()), x.size, 0.3).pvalue > 1e-4
    assert (dropped != np.asarray(gpt._drop(x, 0.3, jax.random.key(5), 1))).any()


# ---- early stopping


def test_early_stopping_by_hand():
    entries = lambda *values: [{"step": 10 * n, "perplexity": v} for n, v in enumerate(values, 1)]  # noqa: E731
    assert early_stopping(entries(5, 4, 6, 7), 0) is None and early_stopping([], 2) is None
    says = lambda patience, *values: tuple(early_stopping(entries(*values), patience).values())[1:]  # noqa: E731
    assert says(2, 5.0, 4.0, 6.0) == (30, 20, False)
    assert says(2, 5.0, 4.0, 6.0, 4.0) == (40, 20, True)  # as good is not better
    assert says(1, 5.0, 4.0, 3.0) == (30, 30, False)
    assert says(1, None, 4.0, float("inf")) == (30, 20, True)


def test_a_run_stops_hands_over_its_best_checkpoint_and_says_so(tiny, tmp_path, monkeypatch, capsys):
    """With DP-SGD, so that the privacy spent is that of the steps taken."""
    settings = [f"out={tmp_path}", f"data={tiny().data_dir}", "name=stops", "training.steps=12", "checkpoint.count=6",
                "privacy.sampling=shuffled"]  # fmt: skip
    config = small_config(tiny, *settings, "training.early_stopping=2", "privacy.noise_multiplier=1")
    values = iter([9.0, 7.0, 7.5, 7.0, 1.0, 1.0])
    scores = lambda *a, **k: {"perplexity": next(values), "perplexity_pii": 1.0, "perplexity_other": None}  # noqa: E731
    monkeypatch.setattr(loop, "evaluate", scores)
    monkeypatch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    run = loop.train(config)
    about, evaluation = (json.loads((run / name).read_text()) for name in ("run.json", "evaluation.json"))
    stop = {"patience": 2, "step": 8, "best_step": 4, "stopped": True}
    assert about["early_stopping"] == evaluation["early_stopping"] == stop
    assert Checkpoints.open(run)[0].steps() == [2, 4, 6, 8]

    accountant = privacy.resolve_privacy(config, len(setup.load_blocks(config, setup.load_prepared(config))[0]), 12)[1]
    assert about["privacy"] == accountant.describe(8) and about["privacy"]["steps"] == 8
    assert about["privacy"]["epsilon_by_sampling"]["poisson"] > accountant.epsilon(2, "poisson")
    assert "block" in about["privacy"]["unit"] and about["method"] == "early_stopping+dp"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"]: r["epsilon"] for r in records if "epsilon" in r} == {s: accountant.epsilon(s) for s in (2, 4, 6, 8)}

    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    loop.train(config)  # finished: nothing happens
    assert "already trained, 8 steps, stopped early out of 12" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before

    entries = compare._handed_over(run, evaluation["checkpoints"])
    assert [(e["step"], e["perplexity"], e.get("model_step")) for e in entries] == [
        (2, 9.0, None), (4, 7.0, None), (6, 7.0, 4), (8, 7.0, 4), (10, 7.0, 4), (12, 7.0, 4)]  # fmt: skip
    assert entries[-1]["epoch"] == pytest.approx(6 * evaluation["checkpoints"][0]["epoch"])
    with pytest.raises(UserError, match="audit it again"):
        compare._handed_over(run, evaluation["checkpoints"][:1])


# ---- DP-SGD


@pytest.fixture(scope="module")
def private(tiny, prepared):
    """Return a config whose clip norm lies amid the blocks' norms, a batch, parameters, and what a plain loop gives."""
    config, masked, params = small_batch(tiny, prepared, "privacy.noise_multiplier=1.5", "loss.goldfish=hash")

    @jax.jit
    def block_gradient(block):
        def loss(params):
            return weighted_loss(params, config, block, token_weights(config.loss, block))[0] / 64

        return jax.grad(loss)(params)

    def flat(tree):
        return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])

    gradients = [flat(block_gradient(jax.tree.map(lambda x, n=n: x[n : n + 1], masked))) for n in range(4)]
    clip = float(np.median([np.linalg.norm(g) for g in gradients]))
    config = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, clip_norm=clip))
    clipped = [g * min(1, clip / np.linalg.norm(g)) for g in gradients]
    of = jax.jit(lambda masked, step: privacy.private_gradient(params, config, masked, step=step))
    return config, masked, clipped, lambda masked, step: (lambda g, m: (flat(g), m))(*of(masked, jnp.int32(step)))


def test_private_gradient_is_a_mean_of_clipped_ones_and_noise(private):
    config, masked, clipped, gradient = private
    norms = [np.linalg.norm(g) for g in clipped]
    assert max(norms) <= config.privacy.clip_norm * (1 + 1e-6) and min(norms) < config.privacy.clip_norm * 0.999
    value, metrics = gradient(masked, 3)
    noise = value - np.mean(clipped, axis=0)
    wanted = 1.5 * config.privacy.clip_norm / 4
    assert stats.kstest(noise / wanted, "norm").pvalue > 1e-4
    assert noise.std() == pytest.approx(wanted, rel=5 / math.sqrt(2 * noise.size))
    assert float(metrics["clipped_share"]) == 0.5
    again = gradient(masked, 3)[0]
    other = gradient(masked, 4)[0] - np.mean(clipped, axis=0)
    assert (again == value).all() and abs(np.corrcoef(noise, other)[0, 1]) < 5 / math.sqrt(noise.size)


def test_one_block_moves_the_private_gradient_by_no_more_than_its_share(private):
    config, masked, clipped, gradient = private
    value = gradient(masked, 3)[0]
    for n in range(4):
        without = jax.tree.map(jnp.copy, masked)
        without = without._replace(segment_ids=masked.segment_ids.at[n].set(0))
        moved = np.linalg.norm(value - gradient(without, 3)[0])
        assert moved == pytest.approx(np.linalg.norm(clipped[n]) / 4, rel=1e-3)
        assert moved <= config.privacy.clip_norm / 4 * (1 + 1e-3)


@pytest.mark.parametrize(("noise", "steps", "blocks", "batch"), [(1.0, 300, 900, 16), (0.7, 40, 1000, 50)])
def test_epsilon_is_that_of_dp_accounting(noise, steps, blocks, batch):
    settings = load_config(None, [f"privacy.noise_multiplier={noise}"]).privacy
    accountant = privacy.Accountant(settings, blocks, batch)
    gaussian = dp_accounting.GaussianDpEvent(noise)
    direct = dp_accounting.pld.PLDAccountant().compose(dp_accounting.PoissonSampledDpEvent(batch / blocks, gaussian), steps)
    assert accountant.delta == 1 / blocks
    assert accountant.epsilon(steps) == pytest.approx(direct.get_epsilon(1 / blocks), rel=1e-6)
    shares = 2 if (noise, steps) == (0.7, 40) else 4 * 3  # 2 whole epochs; 5.33 epochs, any two neighbours in one step
    shuffled = dp_accounting.pld.PLDAccountant().compose(gaussian, shares)
    assert accountant.epsilon(steps, "shuffled") == pytest.approx(shuffled.get_epsilon(1 / blocks), rel=1e-3)
    assert accountant.epsilon(steps, "shuffled") > accountant.epsilon(steps)
    assert accountant.describe(steps)["epsilon_by_sampling"]["poisson"] == accountant.epsilon(steps)


@pytest.mark.parametrize(("blocks", "batch", "steps"), [(10, 4, 9), (8, 4, 9), (7, 3, 2), (9, 4, 30), (5, 5, 7)])
def test_shuffled_sensitivity_bounds_every_order_of_the_data(blocks, batch, steps):
    bound = privacy._squared_sensitivity(steps, blocks, batch)
    worst = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(blocks) for _ in range(-(-steps * batch // blocks))])[: steps * batch]
        shares = np.stack([np.bincount(taken, minlength=blocks) for taken in order.reshape(steps, batch)])
        worst = max(worst, int((shares**2).sum(0).max()))
    assert worst <= bound <= 2 * worst


@pytest.mark.parametrize("sampling", ["poisson", "shuffled"])
def test_noise_is_computed_from_a_target_epsilon(sampling):
    config = load_config(None, ["privacy.epsilon=1", "privacy.delta=1e-3", f"privacy.sampling={sampling}"])
    resolved, accountant = privacy.resolve_privacy(config, 800, 100)
    assert 0.985 < accountant.epsilon(100) <= 1
    assert resolved.privacy.noise_multiplier == accountant.privacy.noise_multiplier and resolved.privacy.epsilon == 0
    if sampling == "shuffled":  # two whole epochs
        exact = dp_accounting.get_sigma_gaussian(1, 1e-3) * math.sqrt(2)
        assert exact <= resolved.privacy.noise_multiplier <= exact * 1.003


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["privacy.noise_multiplier=1", "loss.elr_weight=1"], "do not work together"),
        (["privacy.noise_multiplier=1", "privacy.epsilon=1"], "both set"),
        (["privacy.noise_multiplier=0.01"], "gives no privacy"),
        (["privacy.epsilon=1", "privacy.microbatch=3"], "not divisible by privacy.microbatch 3"),
        (["loss.goldfish_k=1"], "loss.goldfish_k is 1"),
        (["loss.goldfish=hashed"], "did you mean hash?"),
        (["training.dropout=1"], "training.dropout is 1"),
    ],
)
def test_what_cannot_be_served_is_refused(settings, says):
    with pytest.raises(UserError, match=says) as error:
        load_config(None, settings)
    assert "\n" not in str(error.value)


def test_dp_is_refused_where_it_would_not_hold(tiny, prepared, monkeypatch):
    config = small_config(tiny, "privacy.epsilon=2")
    step, state, source, _ = start(config, prepared)
    with pytest.raises(UserError, match="not resolved"):
        step(state, next(source), prepared.bank)
    with pytest.raises(UserError, match="more than the 3 blocks"):
        privacy.resolve_privacy(config, 3, 10)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rmft-jax\[dp\]'"):
        privacy.resolve_privacy(config, 100, 10)


# ---- names


def test_a_run_is_named_after_what_is_switched_on():
    method = lambda *settings: load_config(None, ["masking.policy=none", *settings]).method  # noqa: E731
    assert method() == "none"
    assert method("loss.goldfish=hash", "dedup.policy=near") == "dedup+goldfish"
    assert method("loss.pii_weight=0") == "pii_loss" and method("loss.elr_weight=2") == "elr"
    assert method("training.weight_decay=0.01", "training.dropout=0") == "none"
    assert method("training.weight_decay=0.1", "training.dropout=0.1") == "weight_decay+dropout"
    assert method("training.early_stopping=3", "privacy.epsilon=2") == "early_stopping+dp"
    assert load_config(None, ["masking.policy=all", "loss.surrogate_weight=0"]).method == "rmft+surrogate_loss"
    assert load_config(None, ["masking.policy=all", "masking.replacement=placeholder"]).method == "redaction"
    assert load_config(None, ["masking.stock=recombined", "masking.types.email.stock=recombined"]).method == "recombination"
    assert method("masking.types.email.policy=all") == "rmft"


def test_every_method_is_described():
    assert set(METHODS) | {"none"} <= set(compare.DESCRIPTIONS)
    assert compare._describe_method("dedup+elr") == "deduplication; early-learning regularization"
