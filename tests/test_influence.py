"""Influence functions: solvers against the exact inverse, scores against closed forms and against leaving examples out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from rmft_jax.kernels import (
    conjugate_gradients,
    exact_solver,
    gauss_newton_product,
    hessian_product,
    influence,
    kernel_self_influence,
    lissa,
    self_influence,
    tangent_kernel,
)

L2 = 0.05


def digits(classes, count):
    sklearn = pytest.importorskip("sklearn.datasets", reason="needs the extra [studies]")
    x, y = sklearn.load_digits(return_X_y=True)
    of = np.isin(y, classes)
    return (x[of] / 16).astype(np.float32)[:count], np.searchsorted(classes, y[of]).astype(np.int32)[:count]


def margins(params, x):
    return x @ params["weight"] + params["bias"]


def logistic_loss(params, example):
    x, y = example
    return jax.nn.softplus(-(2 * y - 1) * margins(params, x)) + L2 / 2 * ravel_pytree(params)[0] @ ravel_pytree(params)[0]


def mean_loss(params, data, weights=1.0):
    return jnp.mean(weights * jax.vmap(logistic_loss, in_axes=(None, 0))(params, data))


def fitted(data, weights):
    """Train to the minimum by Newton's method."""
    params = {"weight": jnp.zeros(data[0].shape[1]), "bias": jnp.zeros(())}
    for _ in range(8):
        step = exact_solver(mean_loss, params, data, weights)(jax.grad(mean_loss)(params, data, weights))
        params = jax.tree.map(lambda p, s: p - s, params, step)
    return params


@pytest.fixture(scope="module")
def flipped():
    """Return digits 3 against 8 with a tenth of the labels flipped, which those are, and the model fitted to them."""
    x, y = digits([3, 8], 300)
    wrong = np.random.default_rng(0).permutation(len(y)) < len(y) // 10
    data = (jnp.asarray(x), jnp.asarray(np.where(wrong, 1 - y, y)))
    return data, wrong, jax.jit(fitted)(data, jnp.ones(len(y)))


def own_probability(params, example):
    x, y = example
    return jax.nn.sigmoid((2 * y - 1) * margins(params, x))


def test_scores_are_those_of_training_without_the_example(flipped):
    """Exact leave-one-out retraining of a convex model, example by example."""
    data, wrong, params = flipped
    count = len(wrong)

    @jax.jit
    def scored(params):
        solve = exact_solver(mean_loss, params, data)
        return self_influence(logistic_loss, params, data, solve, probability=own_probability, batch_size=50)

    scores = scored(params)
    without = (1 - jnp.eye(count)) * count / (count - 1)
    left_out = jax.jit(functools.partial(jax.lax.map, lambda w: fitted(data, w), batch_size=20))(without)
    before = jax.vmap(own_probability, in_axes=(None, 0))(params, data)
    after = jax.vmap(own_probability)(left_out, data)
    assert np.corrcoef(scores, before - after)[0, 1] >= 0.9
    assert np.mean(scores / count) / np.mean(before - after) == pytest.approx(1, abs=0.25)
    assert scores[wrong].mean() / scores[~wrong].mean() >= 2
    assert (np.asarray(scores) >= 0).all()


def test_of_linear_regression_they_are_leverage_times_squared_residual():
    """With the hat values of statsmodels as the oracle."""
    sm = pytest.importorskip("statsmodels.api", reason="needs the extra [test]")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 5))
    y = x @ rng.normal(size=5) + rng.normal(size=40)
    fit = sm.OLS(y, x).fit()
    leverage, residual = fit.get_influence().hat_matrix_diag, fit.resid
    data, params = (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)), jnp.asarray(fit.params, jnp.float32)
    loss = lambda params, example: 0.5 * (example[0] @ params - example[1]) ** 2  # noqa: E731
    total = lambda params: jnp.mean(jax.vmap(loss, in_axes=(None, 0))(params, data))  # noqa: E731
    minus = lambda params, example: -loss(params, example)  # noqa: E731
    scores = jax.jit(lambda p: self_influence(loss, p, data, exact_solver(total, p), probability=minus))(params)
    np.testing.assert_allclose(scores, 40 * leverage * residual**2, rtol=1e-3)
    # influence of the first example on the loss of the second
    solved = exact_solver(total, params)(jax.grad(loss)(params, (data[0][0], data[1][0])))
    found = influence(jax.grad(loss)(params, (data[0][1], data[1][1])), solved)
    hat = x @ np.linalg.inv(x.T @ x) @ x.T
    assert float(found) == pytest.approx(-40 * hat[0, 1] * residual[0] * residual[1], rel=1e-3)


def outputs(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def cross_entropy(logits, labels):
    return jnp.mean(-jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


@pytest.fixture(scope="module")
def network():
    """Return a small network (204 parameters) trained on some digits, and these."""
    x, y = digits([0, 1, 2, 3], 96)
    x = x @ np.random.default_rng(2).normal(size=(64, 30)).astype(np.float32) / 4
    keys = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(keys[0], (30, 6)) / 6, "out": jax.random.normal(keys[1], (6, 4)) / 2}
    loss = lambda params: cross_entropy(outputs(params, x), y)  # noqa: E731
    step = lambda _, params: jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))  # noqa: E731
    params = jax.jit(lambda params: jax.lax.fori_loop(0, 300, step, params))(params)
    return params, jnp.asarray(x), jnp.asarray(y)


def test_products_are_those_of_the_dense_matrices(network):
    params, x, y = network
    flat, unravel = ravel_pytree(params)
    vector = jax.random.normal(jax.random.key(1), flat.shape)
    loss = lambda params, x, y: cross_entropy(outputs(params, x), y)  # noqa: E731
    dense = jax.jit(jax.hessian(lambda flat: loss(unravel(flat), x, y)))(flat)
    found = hessian_product(loss, params, unravel(vector), x, y, damping=0.3)
    np.testing.assert_allclose(ravel_pytree(found)[0], dense @ vector + 0.3 * vector, rtol=1e-3, atol=1e-4)
    jacobian = jax.jit(jax.jacobian(lambda flat: outputs(unravel(flat), x)))(flat).reshape(-1, len(flat))
    inner = jax.hessian(lambda z: cross_entropy(z.reshape(-1, 4), y))(outputs(params, x).ravel())
    dense = jacobian.T @ inner @ jacobian
    found = gauss_newton_product(outputs, lambda z: cross_entropy(z, y), params, unravel(vector), x, damping=0.3)
    np.testing.assert_allclose(ravel_pytree(found)[0], dense @ vector + 0.3 * vector, rtol=1e-3, atol=1e-4)
    assert np.linalg.eigvalsh(dense).min() > -1e-5


def test_conjugate_gradients_and_lissa_come_within_a_twentieth_of_the_exact_score(network):
    """By the Gauss-Newton matrix of a network; LiSSA sees 16 examples at a time, drawn anew."""
    params, x, y = network
    flat, unravel = ravel_pytree(params)
    loss = lambda params, example: cross_entropy(outputs(params, example[0][None]), example[1][None])  # noqa: E731
    product = lambda v, rows: gauss_newton_product(  # noqa: E731
        outputs, lambda z: cross_entropy(z, y[rows]), params, v, x[rows], damping=0.02
    )
    every = jnp.arange(len(x))
    matrix = jax.jit(lambda rows: jax.vmap(lambda v: ravel_pytree(product(unravel(v), rows))[0])(jnp.eye(len(flat))))
    dense = matrix(every)
    inverse = jnp.linalg.inv(dense)
    rows = jax.random.randint(jax.random.key(2), (3000, 16), 0, len(x))
    largest = max(np.linalg.eigvalsh(matrix(r))[-1] for r in rows[:5])
    solvers = {
        "exact": lambda v: unravel(inverse @ ravel_pytree(v)[0]),
        "conjugate gradients": lambda v: conjugate_gradients(lambda v: product(v, every), v, steps=60),
        "lissa": lambda v: lissa(product, v, rows, scale=1.5 * largest),
    }
    few = x[:24], y[:24]
    score = jax.jit(lambda solve: self_influence(loss, params, few, solve, batch_size=24), static_argnums=0)
    scores = {name: np.asarray(score(solve)) for name, solve in solvers.items()}
    large = scores["exact"] >= np.quantile(scores["exact"], 0.25)
    for name in ("conjugate gradients", "lissa"):
        np.testing.assert_allclose(scores[name].sum(), scores["exact"].sum(), rtol=0.05)
        np.testing.assert_allclose(scores[name][large], scores["exact"][large], rtol=0.05, err_msg=name)
    gradient = jax.jit(jax.grad(loss))(params, (x[0], y[0]))
    early = jax.jit(lambda g: lissa(product, g, rows[:4], scale=1.5 * largest))(gradient)
    exact = solvers["exact"](gradient)
    gap = ravel_pytree(jax.tree.map(lambda a, b: a - b, early, exact))[0]
    assert jnp.linalg.norm(gap) > 0.2 * jnp.linalg.norm(ravel_pytree(exact)[0])  # four steps are not enough


def test_scores_from_the_tangent_kernel_are_those_of_the_whole_matrix(network):
    params, x, y = network
    flat, unravel = ravel_pytree(params)
    few, labels = x[:20], y[:20]
    whole = lambda v: gauss_newton_product(  # noqa: E731
        outputs, lambda z: cross_entropy(z, labels), params, v, few, damping=0.01
    )
    dense = jax.jit(jax.vmap(lambda v: ravel_pytree(whole(unravel(v)))[0]))(jnp.eye(len(flat)))
    loss = lambda params, example: cross_entropy(outputs(params, example[0][None]), example[1][None])  # noqa: E731
    solve = lambda v: unravel(jnp.linalg.solve(dense, ravel_pytree(v)[0]))  # noqa: E731
    expected = jax.jit(lambda p: self_influence(loss, p, (few, labels), solve, batch_size=20))(params)
    kernel = jax.jit(lambda p: tangent_kernel(outputs, p, few))(params)
    logits = outputs(params, few)
    of_output = lambda z, y: -jax.nn.log_softmax(z)[y]  # noqa: E731
    gradient = jax.vmap(jax.grad(of_output))(logits, labels)
    p_gradient = jax.vmap(jax.grad(lambda z, y: jax.nn.softmax(z)[y]))(logits, labels)
    curvature = jax.vmap(jax.hessian(of_output))(logits, labels)
    found = kernel_self_influence(kernel, curvature, gradient, p_gradient, damping=0.01)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)
