"""Early-learning regularization: kernels against closed forms, training against a plain reference, the study as a whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from rmft_jax.config import load_config
from rmft_jax.data.images import Images
from rmft_jax.data.loader import batches
from rmft_jax.errors import UserError
from rmft_jax.kernels import (
    SURROGATE,
    clipped_softmax,
    elr_loss,
    elr_update_target,
    kl_loss,
    mask_batch,
    mixup,
    target_mask,
    top_penalty,
    top_targets,
    update_top_targets,
)
from rmft_jax.models.gpt import forward
from rmft_jax.report.html import claims_table, render, text_table
from rmft_jax.studies import run_study
from rmft_jax.study_config import LinearNoiseConfig, NoisyLabelsConfig
from rmft_jax.training.linear_noise import descend, noisy_clouds
from rmft_jax.training.masking import masking_key, masking_rules
from rmft_jax.training.members import Members, epoch_orders
from rmft_jax.training.noisy_labels import Member, augmented, train_on_wrong_labels, wrong_labels
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import init_state, train_step


def drawn(seed=0, examples=6, classes=5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(examples, classes)).astype(np.float32)
    labels = np.eye(classes, dtype=np.float32)[rng.integers(classes, size=examples)]
    target = (0.9 * softmax(2 * rng.normal(size=(examples, classes)), axis=-1)).astype(np.float32)
    return logits, labels, target


def test_elr_gradient_is_the_closed_form():
    logits, labels, target = drawn()
    gradient = jax.grad(lambda z: jnp.sum(elr_loss(z, labels, target, 3.0)))(jnp.asarray(logits))
    p = softmax(logits.astype(float), axis=-1)
    pull = np.stack([sum((target[:, k] - target[:, c]) * p[:, k] for k in range(5)) for c in range(5)], axis=-1)
    closed = p - labels + 3.0 * p / (1 - np.sum(p * target, axis=-1, keepdims=True)) * pull
    np.testing.assert_allclose(gradient, closed, rtol=2e-5, atol=1e-6)
    value = -np.sum(labels * log_softmax(logits, axis=-1), -1) + 3 * np.log(1 - np.sum(p * target, -1))
    np.testing.assert_allclose(elr_loss(logits, labels, target, 3.0), value, rtol=1e-5)


def test_kl_gradient_is_the_closed_form():
    logits, labels, target = drawn(1)
    gradient = jax.grad(lambda z: jnp.sum(kl_loss(z, labels, target, 2.0)))(jnp.asarray(logits))
    p = softmax(logits.astype(float), axis=-1)
    np.testing.assert_allclose(gradient, p - labels + 2 * (p * target.sum(-1, keepdims=True) - target), rtol=2e-5, atol=1e-6)


def test_targets_are_constant_for_the_gradient_and_finite_where_both_are_certain():
    logits, labels, target = drawn(2)
    for loss in (elr_loss, kl_loss):
        assert not jax.grad(lambda t: jnp.sum(loss(logits, labels, t, 3.0)))(jnp.asarray(target)).any()  # noqa: B023
    assert not jax.grad(lambda z: jnp.sum(elr_update_target(target, clipped_softmax(z), 0.7)))(jnp.asarray(logits)).any()
    certain = jnp.array([[200.0, 0.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda z: elr_loss(z, labels[:1, :3], jnp.array([[1.0, 0, 0]]), 3.0)[0])(certain)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_target_is_the_exponential_average_of_what_was_said():
    said = softmax(np.random.default_rng(3).normal(size=(6, 2, 4)), axis=-1)
    target = np.zeros((2, 4))
    for p in said:
        target = elr_update_target(target, p, 0.7)
    np.testing.assert_allclose(target, sum(0.3 * 0.7 ** (5 - n) * p for n, p in enumerate(said)), rtol=1e-5)


def test_top_targets_are_the_whole_ones_where_nothing_is_left_out_and_their_largest_else():
    rng = np.random.default_rng(4)
    whole, most, few = np.zeros((3, 6)), top_targets((3, 6)), top_targets((3, 2))
    brute = [dict.fromkeys(range(2), 0.0) for _ in range(3)]
    for _ in range(5):
        p = softmax(2 * rng.normal(size=(3, 6)), axis=-1).astype(np.float32)
        whole = 0.7 * whole + 0.3 * p
        most, few = update_top_targets(most, p, 0.7), update_top_targets(few, p, 0.7)
        np.testing.assert_allclose(np.take_along_axis(whole, np.asarray(most.ids), -1), most.probabilities, rtol=1e-5)
        for row, known in enumerate(brute):
            values = {c: 0.7 * known.get(c, 0) + 0.3 * p[row, c] for c in {*known, *np.argsort(p[row])[-2:].tolist()}}
            brute[row] = dict(sorted(values.items(), key=lambda item: -item[1])[:2])
            found = dict(zip(few.ids[row].tolist(), few.probabilities[row].tolist(), strict=True))
            assert found == pytest.approx(brute[row])
    logits = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    penalty = lambda z, t: jnp.sum(top_penalty(jax.nn.softmax(z), t))  # noqa: E731
    full = lambda z: jnp.sum(jnp.log1p(-jnp.sum(jax.nn.softmax(z) * whole, -1)))  # noqa: E731
    np.testing.assert_allclose(jax.grad(penalty)(logits, most), jax.grad(full)(logits), rtol=1e-4, atol=1e-6)


def test_targets_of_tokens_are_what_the_model_said_of_them_and_nothing_of_surrogates(tiny, prepared):
    config = tiny("model.layers=1", "model.width=16", "model.heads=1", "masking.policy=keep_first", "training.batch_size=8",
                  "loss.elr_weight=1", "loss.elr_top=3", "loss.elr_beta=0.6")  # fmt: skip
    blocks, _ = load_blocks(config, prepared)
    optimizer = make_optimizer(config.training, 10)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, blocks=len(blocks))
    batch = next(batches(blocks, batch_size=8, seed=0))
    step = jax.jit(lambda state, batch: train_step(state, batch, prepared.bank, config=config, optimizer=optimizer))
    new, _ = step(state, batch)
    masked = mask_batch(batch, prepared.bank, masking_key(config.seed), length=config.training.sequence_length + 1,
                        rules=masking_rules(config))  # fmt: skip
    logits = forward(state["params"], config.model, masked.tokens[:, :-1], masked.segment_ids[:, :-1])
    said = np.asarray(jax.nn.softmax(logits))
    true = np.asarray(target_mask(masked.segment_ids) & (masked.origin[:, 1:] != SURROGATE))
    source, known = np.asarray(masked.source[:, 1:]), np.asarray(new["elr"]["probabilities"])
    assert (np.asarray(masked.origin) == SURROGATE).any()
    for row in range(8):
        noted = set(source[row][true[row]].tolist())
        of_row = known[batch.example[row]]
        assert {int(n) for n in np.flatnonzero(of_row.sum(-1))} == noted
        for place in np.flatnonzero(true[row])[:5]:
            expected = 0.4 * np.sort(said[row, place])[::-1][:3]
            np.testing.assert_allclose(of_row[source[row, place]], expected, rtol=1e-4)
    others = np.setdiff1d(np.arange(len(blocks)), batch.example)
    assert not known[others].any()


def test_mixup_mixes_everything_alike():
    x, y = np.arange(6.0).reshape(3, 2), np.eye(3)
    mixed_x, mixed_y = mixup(0.75, np.array([2, 0, 1]), x, y)
    np.testing.assert_allclose(mixed_x, 0.75 * x + 0.25 * x[[2, 0, 1]])
    np.testing.assert_allclose(mixed_x, mixed_y @ x)


def test_wrong_labels():
    labels = np.random.default_rng(0).integers(10, size=2000)
    given = wrong_labels(labels, 0.4, "symmetric", 1, classes=10)
    assert np.mean(given != labels) == pytest.approx(0.36, abs=0.02)  # a tenth of those drawn anew are right
    assert np.bincount(given[given != labels], minlength=10).min() > 40
    given = wrong_labels(labels, 0.4, "asymmetric", 1, classes=10, flips={7: 1, 3: 8})
    assert set(zip(labels[given != labels], given[given != labels], strict=True)) == {(7, 1), (3, 8)}
    assert np.mean(given[labels == 7] == 1) == pytest.approx(0.4, abs=0.01)


def toy_images(count=64, seed=0) -> Images:
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count).astype(np.int32)
    x = (np.eye(3)[labels] @ rng.normal(size=(3, 16)) + 0.3 * rng.normal(size=(count, 16))).astype(np.float32)
    x = x.reshape(count, 4, 4, 1)
    return Images(x, labels, x[:16], labels[:16], ("a", "b", "c"))


def members(images: Images, seeds, elr, kl, beta) -> Member:
    given = np.stack([wrong_labels(images.train_labels, 0.5, "symmetric", seed, classes=3) for seed in seeds])
    arrays = (np.array(values, np.float32) for values in (elr, kl, beta))
    return Member(np.array(seeds, np.int32), *arrays, given)


def small(**more) -> NoisyLabelsConfig:
    return NoisyLabelsConfig(
        **{"widths": (8,), "epochs": 2, "score_every": 1, "batch_size": 16, "learning_rate": 0.1} | more
    )


def test_training_is_gradient_descent_on_the_formulas():
    """Softmax regression in numpy, with targets and momentum, from the same start: the last accuracies and targets agree."""
    images = toy_images()
    who = members(images, [5], [3.0], [0.0], [0.7])
    config = small(widths=(), epochs=3, weight_decay=0.01)
    found = train_on_wrong_labels(config, images, who, plus=False, title="toy")

    from flax import nnx

    from rmft_jax.models.classifier import make_classifier

    model = make_classifier("mlp", (4, 4, 1), 3, (), jax.random.split(jax.random.key(5), 1)[0])
    params = [np.asarray(x, float) for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))]  # bias, kernel
    x, y, target = images.train.reshape(64, 16).astype(float), np.eye(3)[who.given[0]], np.zeros((64, 3))
    momentum = [np.zeros_like(p) for p in params]
    curves = []
    for epoch in range(3):
        for rows in epoch_orders(np.arange(64)[None], epoch, who.seed, 16)[0]:
            p = softmax(x[rows] @ params[1] + params[0], axis=-1)
            t = target[rows] = 0.7 * target[rows] + 0.3 * np.clip(p, 1e-4, 1 - 1e-4)
            pull = p * ((t * p).sum(-1, keepdims=True) - t)  # p_c sum_k (t_k - t_c) p_k
            g = (p - y[rows] + 3 * pull / (1 - (p * t).sum(-1, keepdims=True))) / 16
            gradients = [g.sum(0), x[rows].T @ g]
            momentum = [0.9 * m + d + 0.01 * q for m, d, q in zip(momentum, gradients, params, strict=True)]
            params = [q - 0.1 * m for q, m in zip(params, momentum, strict=True)]
        found_class = (x @ params[1] + params[0]).argmax(-1)
        wrong = who.given[0] != images.train_labels
        curves.append([np.mean(found_class[:16] == images.test_labels), np.mean((found_class == who.given[0])[wrong])])
    np.testing.assert_allclose(found["test"][0], [row[0] for row in curves], atol=1e-6)
    np.testing.assert_allclose(found["wrong_given"][0], [row[1] for row in curves], atol=1e-6)
    np.testing.assert_array_equal(found["suspects"][0], target.argmax(-1) != who.given[0])


def test_members_side_by_side_are_what_each_is_alone():
    images = toy_images(seed=1)
    seeds, elr, kl, beta = [0, 1, 0, 3], [0, 3, 0, 1], [0, 0, 2, 0], [0.5, 0.7, 0.9, 0.9]
    many = train_on_wrong_labels(
        small(), images, members(images, seeds, elr, kl, beta), plus=False, title=""
    )
    for n in (1, 2):
        one = members(images, seeds[n : n + 1], elr[n : n + 1], kl[n : n + 1], beta[n : n + 1])
        alone = train_on_wrong_labels(small(), images, one, plus=False, title="")
        for name in alone:
            np.testing.assert_allclose(many[name][n], alone[name][0], rtol=1e-4, err_msg=name)


def test_a_convolutional_classifier_learns():
    rng = np.random.default_rng(0)
    labels = np.arange(32, dtype=np.int32) % 2
    x = (rng.normal(size=(32, 8, 8, 3)) * 0.1 + labels[:, None, None, None]).astype(np.float32)
    images = Images(x, labels, x, labels, ("dark", "bright"))
    plain = members(images, [0], [1], [0], [0.7])._replace(given=labels[None])
    config = small(model="conv", widths=(4, 8), together=False, augment=True, epochs=6, score_every=6, learning_rate=0.05)
    assert train_on_wrong_labels(config, images, plain, plus=False, title="")["test"][0, -1] >= 0.9


def test_resnet34_is_the_published_one_and_keeps_running_statistics():
    from flax import nnx

    from rmft_jax.models.classifier import ResNet, make_classifier

    shapes = nnx.eval_shape(lambda: make_classifier("resnet34", (32, 32, 3), 10, (), jax.random.key(0)))
    size = sum(np.prod(x.shape) for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    ours = 21_797_672 - 990 * 513 - 64 * 3 * (49 - 9)  # torchvision's, with 10 classes and a 3 x 3 stem
    moved = (
        2 * (512 - 64) - 2 * (64 + 128 + 256) - 2 * (128 + 256 + 512)
    )  # norms stand before convolutions, none on shortcuts
    assert size == ours + moved
    block = ResNet(3, (1,), 10, rngs=nnx.Rngs(params=jax.random.key(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (4, 8, 8, 3)).astype(np.float32))
    y = np.asarray(block.first(x))
    seen = block(x, True)
    np.testing.assert_allclose(block.blocks[0].norms[0].mean[...], 0.1 * y.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    assert not np.allclose(block(x, False), seen)


def test_augmentation_moves_and_mirrors_whole_images():
    images = np.random.default_rng(0).uniform(1, 2, (8, 6, 6, 2)).astype(np.float32)
    moved = np.asarray(augmented(jax.random.key(1), jnp.asarray(images)))
    kinds = set()
    for image, new in zip(images, moved, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        found = [(dy, dx, flip) for dy in range(9) for dx in range(9) for flip in (False, True)
                 if np.array_equal(padded[dy : dy + 6, dx : dx + 6][:, :: -1 if flip else 1], new)]  # fmt: skip
        assert found
        kinds.add(found[0])
    assert len(kinds) > 4


def test_an_epoch_shows_each_member_its_own_rows_once():
    rows = np.stack([np.arange(10), np.arange(10, 20)])
    order = epoch_orders(rows, 3, np.array([1, 1]), 3)
    assert order.shape == (2, 3, 3) and (order[1] == order[0] + 10).all()
    assert len(np.unique(order[0])) == 9 and (epoch_orders(rows, 4, np.array([1, 1]), 3) != order).any()
    with pytest.raises(ValueError, match="do not fill"):
        epoch_orders(rows, 0, np.array([1, 1]), 11)


def test_theorem_1_holds_on_a_small_model():
    config = LinearNoiseConfig(points=200, features=400, steps=1500)
    data = noisy_clouds(config, jax.random.key(0))
    assert (
        float(jnp.linalg.norm(data["theta"])) == pytest.approx(2, rel=1e-5) and abs(float(data["theta"] @ data["v"])) < 1e-5
    )
    assert float(jnp.mean(data["true"] != data["given"])) == pytest.approx(0.25, abs=0.07)
    plain, kept = (jax.device_get(descend(config, data, jnp.float32(weight))) for weight in (0.0, 3.0))
    early = int(np.argmax(plain["along"] >= 0.1))
    assert plain["correlation"][:early].min() >= 1 / 6
    assert plain["residual_clean"][early] < plain["residual_clean"][0] - 0.05
    assert plain["residual_wrong"][early] > plain["residual_wrong"][0] + 0.05
    assert plain["wrong_true"].max() > 0.9 and plain["wrong_given"][-1] > 0.99 and kept["wrong_given"][-1] < 0.1


def test_members_lie_on_as_many_devices_as_share_them():
    group = Members(4)
    double = group.compile(lambda state, own, shared: (state + own * shared, own))
    state, result = double(group.own(np.zeros(4)), group.own(np.arange(4.0)), group.shared(np.float32(2)))
    np.testing.assert_array_equal(state, [0, 2, 4, 6])
    assert len(state.sharding.device_set) == 4 and len(Members(5)._mesh.devices) == 5


ARMS = {"ce": {"share": 0.4}, "elr": {"share": 0.4, "method": "elr"}, "plus": {"share": 0.4, "method": "elr_plus"}}


def study_settings(out, **more):
    digits = {
        "limit": 64,
        "test_limit": 32,
        "widths": [8],
        "epochs": 2,
        "score_every": 1,
        "batch_size": 16,
        "arms": ARMS,
    } | more
    linear = {"points": 40, "features": 50, "steps": 30}
    return [
        f"out={out}",
        "study.seeds=2",
        f"study.early_learning={json.dumps({'linear': linear, 'sets': {'digits': digits}})}",
    ]


def test_study_runs_resumes_and_is_shown(tmp_path):
    config = load_config(None, study_settings(tmp_path))
    assert config.study.early_learning.sets["digits"].arms["elr"].method == "elr"
    results = run_study("early-learning", config, command="x")
    assert results == json.loads((tmp_path / "results.json").read_text()) and results["study"]["parts"] == 3
    assert list(results["findings"]["digits"]["arms"]) == list(ARMS)
    ids = {claim["id"] for claim in results["claims"]}
    assert {"linear-elr", "digits-ce-final", "digits-symmetric-0.4-elr", "digits-symmetric-0.4-elr_plus-memorized"} <= ids
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    (tmp_path / "parts" / "digits.json").unlink()
    again = run_study("early-learning", config, command="x")
    drop = lambda found: {k: v for k, v in found["findings"]["digits"].items() if k != "seconds"}  # noqa: E731
    assert drop(again) == drop(results) and again["claims"] == results["claims"]
    assert sum(path.stat().st_mtime_ns != times[path] for path in times) == 1
    page = render(results)
    assert "digits, 40% symmetric noise" in page and "plot-digits-wrong_given" in page and "NaN" not in page
    assert text_table(results).row_count == 1 + 3 * 5 and claims_table(results).row_count == len(results["claims"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"arms": {}}, "digits.arms is empty"),
        ({"arms": {"a": {"method": "erl"}}}, "method is 'erl': choose one of ce, elr"),
        ({"arms": {"a": {"noise": "asymmetric"}}}, "flips is empty"),
        ({"flips": {"7": 11}}, "flips is .*from 0 to 9"),
        ({"epochs": 3, "score_every": 2}, "multiple of score_every"),
        ({"images": "mnist"}, "mnist need a path"),
        ({"images": "cifar10", "path": "/nowhere.npz"}, "images /nowhere.npz cannot be read"),
        ({"model": "mpl"}, "model is 'mpl'"),
    ],
)
def test_a_study_is_checked_before_anything_is_trained(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run_study("early-learning", load_config(None, study_settings(tmp_path / "out", **more)), command="x")
    assert not (tmp_path / "out").exists()
