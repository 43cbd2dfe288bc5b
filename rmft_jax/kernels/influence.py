"""Influence functions: what a model would say had an example not been in its training set, without training it again.

Trees are parameters of any model; a loss is any scalar function of them. H is the curvature of the mean training loss at the
parameters that training ended with. Source: Koh & Liang 2017, arXiv 1703.04730; the self-influence as a memorization score:
Chen et al. 2022, arXiv 2205.14704.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Tree = Any  # of arrays


def hessian_product(loss: Callable, params: Tree, vector: Tree, *args, damping: float | jax.Array = 0.0) -> Tree:
    """Return (H + damping I) vector, where H is the Hessian of `loss(params, *args)`, without forming H.

    vector: a tree like params. H of a model that is not convex has negative directions: damping must outweigh them, or take
    `gauss_newton_product`. Source: Pearlmutter 1994.
    """
    _, product = jax.jvp(lambda params: jax.grad(loss)(params, *args), (params,), (vector,))
    return jax.tree.map(lambda h, v: h + damping * v, product, vector)


def gauss_newton_product(
    predict: Callable, loss: Callable, params: Tree, vector: Tree, *args, damping: float | jax.Array = 0.0
) -> Tree:
    """Return (G + damping I) vector, G = J^T L'' J the Hessian of loss(predict(params, *args)) with predict linearised.

    predict: gives an array or tree, such as logits; loss: a convex scalar function of that, which may close over labels. G
    has no negative directions; at a model that fits its data it is near H. Source: Schraudolph 2002.
    """
    outputs, forward = jax.linearize(lambda params: predict(params, *args), params)
    _, curved = jax.jvp(jax.grad(loss), (outputs,), (forward(vector),))
    (product,) = jax.linear_transpose(forward, params)(curved)
    return jax.tree.map(lambda g, v: g + damping * v, product, vector)


def exact_solver(loss: Callable, params: Tree, *args, damping: float = 0.0) -> Callable[[Tree], Tree]:
    """Return vector -> (H + damping I)^-1 vector with H formed and factored once: for up to a few thousand parameters."""
    flat, unravel = ravel_pytree(params)
    hessian = jax.hessian(lambda flat: loss(unravel(flat), *args))(flat) + damping * jnp.eye(len(flat), dtype=flat.dtype)
    factors = jax.scipy.linalg.lu_factor(hessian)
    return lambda vector: unravel(jax.scipy.linalg.lu_solve(factors, ravel_pytree(vector)[0]))


def conjugate_gradients(product: Callable[[Tree], Tree], vector: Tree, *, steps: int, tolerance: float = 1e-5) -> Tree:
    """Return x with product(x) = vector, by at most so many conjugate gradient steps.

    product: x -> A x for a symmetric A without negative directions. tolerance: of the residual, relative to the vector.
    """
    return jax.scipy.sparse.linalg.cg(product, vector, maxiter=steps, tol=tolerance)[0]


def lissa(product: Callable[[Tree, Any], Tree], vector: Tree, batches: Any, *, scale: float | jax.Array) -> Tree:
    """Return x with E[product(x, batch)] = vector, by the recursion x <- x + (vector - product(x, batch)) / scale.

    product: (x, batch) -> A x, A the damped curvature of the mean loss over a batch alone. batches: a tree whose leaves have
    a leading axis of steps. scale: above half the largest eigenvalue of A on any batch, or the recursion runs away; it needs
    some scale / (smallest eigenvalue) steps. The mean over the later half of the steps is returned, as single ones scatter
    about it.
    Source: Agarwal et al. 2016, arXiv 1602.03943; as used by Koh & Liang 2017, section 3.
    """
    count = len(jax.tree.leaves(batches)[0])
    begin = jax.tree.map(lambda v: v / scale, vector)

    def step(carry, numbered):
        x, total = carry
        number, batch = numbered
        x = jax.tree.map(lambda x, v, a: x + (v - a) / scale, x, vector, product(x, batch))
        late = (number >= count // 2).astype(jnp.float32)
        return (x, jax.tree.map(lambda t, x: t + late * x, total, x)), None

    zero = jax.tree.map(jnp.zeros_like, vector)
    (_, total), _ = jax.lax.scan(step, (begin, zero), (jnp.arange(count), batches))
    return jax.tree.map(lambda t: t / (count - count // 2), total)


def influence(measured: Tree, solved: Tree) -> jax.Array:
    """Return d(measure) / d(weight of z) = -grad(measure)^T H^-1 grad L(z), float [].

    measured: the gradient of what is asked about, with respect to the parameters. solved: H^-1 grad L(z). Without z, one
    of N examples, the measure changes by about -1/N times this. Source: Koh & Liang 2017, equation 2.
    """
    pairs = zip(jax.tree.leaves(measured), jax.tree.leaves(solved), strict=True)
    return -sum((jnp.vdot(a, b) for a, b in pairs), jnp.float32(0))


def self_influence(
    loss: Callable, params: Tree, examples: Any, solve: Callable[[Tree], Tree], *,
    probability: Callable | None = None, batch_size: int = 1,
) -> jax.Array:  # fmt: skip
    """Return the memorization score -grad P(y|x)^T H^-1 grad L(z) of each training example z = (x, y), float [N].

    loss: (params, example) -> scalar, L(z), of which training minimised the mean. examples: a tree whose leaves have a
    leading axis of examples. solve: grad L -> H^-1 grad L, by one of the solvers above. probability: (params, example) ->
    scalar, P(y|x); None = exp(-loss), right where the loss is the cross entropy alone. batch_size: examples solved for at
    once.

    A high score: without z in the training set the model would give it a lower probability. 1/N times the score is the fall
    that is to be expected. Source: Chen et al. 2022, arXiv 2205.14704.
    """
    probability = probability or (lambda params, example: jnp.exp(-loss(params, example)))

    def score(example):
        solved = solve(jax.grad(loss)(params, example))
        return influence(jax.grad(probability)(params, example), solved)

    return jax.lax.map(score, examples, batch_size=batch_size)


def kernel_self_influence(
    kernel: jax.Array, loss_curvature: jax.Array, loss_gradient: jax.Array, probability_gradient: jax.Array, *,
    damping: float | jax.Array,
) -> jax.Array:  # fmt: skip
    """Return what `self_influence` does under G + damping I, from the examples' tangent kernel alone: float [N].

    For few examples and any number of parameters it is exact, where the solvers above iterate.

    kernel: float [N, C, N, C], J J^T with J the Jacobian of the N x C outputs (see `tangent_kernel`). loss_curvature: float
    [N, C, C], the second derivative of each example's loss in its outputs. loss_gradient, probability_gradient: float
    [N, C], the first derivatives of L and of P in the outputs. damping: above 0.
    With A the block-diagonal matrix of loss_curvature / N: J (J^T A J + damping I)^-1 J^T = K (A K + damping I)^-1.
    """
    count, classes = loss_gradient.shape
    size = count * classes
    flat = kernel.reshape(size, size)
    curved = jnp.einsum("nab,nbm->nam", loss_curvature / count, kernel.reshape(count, classes, size)).reshape(size, size)
    # rows of K (A K + damping)^-1: solve the transposed system
    inverse = jnp.linalg.solve((curved + damping * jnp.eye(size, dtype=flat.dtype)).T, flat.T).T
    own = inverse.reshape(count, classes, count, classes)[jnp.arange(count), :, jnp.arange(count)]
    return -jnp.einsum("na,nab,nb->n", probability_gradient, own, loss_gradient)


def tangent_kernel(outputs: Callable, params: Tree, examples: Any, *, batch_size: int = 8) -> jax.Array:
    """Return K = J J^T, float32 [N, C, N, C], J the Jacobian of all examples' outputs in the parameters.

    outputs: (params, example) -> [C]. examples: a tree whose leaves have a leading axis N. batch_size: examples whose
    Jacobians are made at once; all of J, N x C rows as large as params, is held. Source: Jacot et al. 2018, arXiv
    1806.07572.
    """
    of_example = lambda example: jax.jacrev(lambda params: outputs(params, example))(params)  # noqa: E731
    rows = jax.lax.map(of_example, examples, batch_size=batch_size)
    flat = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(rows)]
    products = (jnp.einsum("ncp,mdp->ncmd", leaf, leaf, precision="highest") for leaf in flat)
    return sum(products, jnp.float32(0))
