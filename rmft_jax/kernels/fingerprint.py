"""A fingerprint of an array that is the same on any mesh, to notice when what was stored is not what is read."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_SALTS = (0x9E3779B9, 0x7F4A7C15)


def fingerprint(x: jax.Array) -> jax.Array:
    """Return two sums over the bits of all elements and their places, uint32 [2].

    x: any shape and dtype that has bits (no typed keys). A change in one element always changes both sums, one in several
    goes unnoticed with a chance of about 2^-64. Sums are modulo 2^32, so that neither order nor a split over devices
    matters. Each element is mixed as by the finalizer of MurmurHash3 (Appleby, 2011). It is no protection against intent.
    """
    x = jnp.asarray(x)
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    width = {1: jnp.uint8, 2: jnp.uint16}.get(bits.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(bits, width).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    sums = [jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(salt))), dtype=jnp.uint32) for salt in _SALTS]
    return jnp.stack(sums)


def _mix(x: jax.Array) -> jax.Array:
    """Scramble uint32 one to one."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
