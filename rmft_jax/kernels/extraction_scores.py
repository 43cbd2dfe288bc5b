"""Scores of extraction from one teacher-forced pass, without decoding.

Notation: L tokens; hit_t = token t is the most probable one after those before it. Greedy decoding from a prefix returns
the rest of a text exactly if every token of the rest is a hit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_SMALL = -15.0  # below, -log(1 - exp(x)) equals exp(x) in float32


def all_hit(hits: jax.Array, valid: jax.Array) -> jax.Array:
    """Return bool [...]: every valid token is a hit, so greedy decoding gives the text back.

    hits, valid: bool [..., L]. Source: Carlini et al. 2022, arXiv 2202.07646 (discoverable memorization).
    """
    return jnp.all(jnp.where(valid, hits, True), axis=-1)


def extraction_strength(hits: jax.Array, valid: jax.Array) -> jax.Array:
    """Return 1 - k*/L, float32 [...]; k* = the fewest tokens of prefix after which the rest is right to the end.

    0 if the last token is wrong. hits: bool [..., L], False for a token that nothing stands before. valid: bool [..., L].
    Source: Wang et al. 2024, arXiv 2406.09179 (after Carlini et al. 2021).
    """
    place = jnp.cumsum(valid, axis=-1)
    needed = jnp.max(jnp.where(hits, 0, place * valid), axis=-1)
    return 1 - needed / jnp.maximum(place[..., -1], 1)


def filtered_log_prob(
    logits: jax.Array, targets: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Return the log probability of each target under filtered sampling, float32 [...]; -inf where it is filtered out.

    The logits are divided by the temperature, the top_k highest stay, of these the fewest whose probabilities sum to top_p
    or more, and what stays is renormalised. Tokens as probable as the last one that stays, stay too.

    Args:
      logits: [..., V] of any float dtype; targets: int [...].
      temperature: above 0. top_k: 0 = all. top_p: in (0, 1], 1 = all.
    Source: Hayes et al. 2024, arXiv 2410.19482 (the sampling scheme of p_z); top-p: Holtzman et al. 2020.
    """
    logits = logits.astype(jnp.float32) / temperature
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    least = jnp.full_like(picked, -jnp.inf)
    if 0 < top_k < logits.shape[-1]:
        least = _least_below(logits, jnp.ones_like(logits), top_k)
    if top_p < 1:
        stays = jnp.where(logits >= least, logits, -jnp.inf)
        least = jnp.maximum(least, _least_below(stays, jax.nn.softmax(stays, axis=-1), top_p))
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True, where=logits >= least)
    return jnp.where(picked >= least, picked - total, -jnp.inf)[..., 0]


def _least_below(values: jax.Array, weights: jax.Array, limit: float) -> jax.Array:
    """Return the least float x for which the elements above x weigh less than `limit`, float32 [..., 1].

    values: float32 [..., V]; weights: float [..., V]. By bisection over the floats in order, since
    `lax.top_k` over a vocabulary takes more than twice as long on CPU.
    """

    def ordered(x):  # floats as integers of the same order; its own inverse
        return jnp.where(x < 0, x ^ 0x7FFFFFFF, x)

    keys = ordered(jax.lax.bitcast_convert_type(values, jnp.int32))
    shape = (*values.shape[:-1], 1)
    limits = jnp.iinfo(jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow
        below = jnp.sum(jnp.where(keys > middle, weights, 0), axis=-1, keepdims=True) < limit
        return jnp.where(below, low, middle), jnp.where(below, middle, high)

    start = jnp.full(shape, limits.min), jnp.max(keys, axis=-1, keepdims=True)
    high = jax.lax.fori_loop(0, 32, halve, start)[1]
    return jax.lax.bitcast_convert_type(ordered(high), jnp.float32)


def queries_needed(log_p_z: jax.Array, p: float) -> jax.Array:
    """Return the least n for which a text is (n, p)-discoverable: n >= log(1 - p) / log(1 - p_z). float32 [...].

    log_p_z: float [...], the text's log probability under the sampling scheme; inf is returned for -inf. p: in (0, 1).
    Source: Hayes et al. 2024, arXiv 2410.19482.
    """
    return jnp.maximum(1, jnp.ceil(jnp.exp(_log_hazard(jnp.log(p)) - _log_hazard(log_p_z))))


def n_p_discoverable(log_p_z: jax.Array, n: float, p: float) -> jax.Array:
    """Return bool [...]: n samples hold the text with probability p or more, 1 - (1 - p_z)^n >= p.

    log_p_z: float [...]; n: 1 or more; p: in (0, 1). Source: Hayes et al. 2024, arXiv 2410.19482.
    """
    return jnp.log(n) + _log_hazard(log_p_z) >= _log_hazard(jnp.log(p))


def _log_hazard(log_p: jax.Array) -> jax.Array:
    """Return log(-log(1 - exp(log_p))), without loss for log_p near 0 and far below."""
    log_p = jnp.asarray(log_p, jnp.float32)
    near = jnp.maximum(log_p, _SMALL)
    log_rest = jnp.where(near > -0.6931472, jnp.log(-jnp.expm1(near)), jnp.log1p(-jnp.exp(near)))
    return jnp.where(log_p < _SMALL, log_p, jnp.log(-log_rest))
