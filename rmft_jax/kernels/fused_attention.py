"""Attention without its scores in memory, on GPU and TPU: which kernel serves where, and how each is called.

Kernels of JAX itself do the work: on GPU the one in Triton (Dao 2023, FlashAttention-2, arXiv 2307.08691), on TPU splash
attention. Both take segment ids. cuDNN's attention, by JAX's public interface, takes none, so that documents of one row
would see each other; the Hopper kernel in Mosaic takes none either.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

FUSED_ATTENTION = {"triton": "gpu", "splash": "tpu"}
"""Names of the kernels, and the platform of each."""

_BLOCK = {"triton": 64, "splash": 128}  # the length of a row must be a multiple of it


def why_not_fused(name: str, *, platform: str, head_dim: int, length: int, local_window: int = 0) -> str:
    """Return why a kernel cannot serve, "" where it can. platform: cpu | gpu | tpu; length: positions of a row."""
    if platform != FUSED_ATTENTION[name]:
        return f"it runs on {FUSED_ATTENTION[name].upper()}, not on {platform.upper()}"
    if length % _BLOCK[name]:
        return f"rows of {length} tokens are no multiple of {_BLOCK[name]}"
    if local_window:
        return "it has no local layers"
    if name == "splash" and head_dim % 64:
        return f"a head width of {head_dim} is no multiple of 64"
    if name == "triton" and not 16 <= head_dim <= 128:
        return f"a head width of {head_dim} is not within 16 and 128"
    return ""


def fused_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    scale: float = 0.0,
    *,
    name: str,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within documents: `attention` under `causal_mask(segment_ids)`, forward and backward.

    q: [B, H, T, D]; k, v: [B, G, T, D]; segment_ids: int32 [B, T], 0 = padding, whose results mean nothing; scale: what q k
    is multiplied by, 0 = D ** -0.5. name: of FUSED_ATTENTION. interpret: run on any platform, slowly, for tests.
    Returns [B, H, T, D] in q's dtype. Ask `why_not_fused` first.
    """
    return _KERNELS[name](q, k, v, segment_ids, scale or q.shape[-1] ** -0.5, interpret)


def _triton(q, k, v, segment_ids, scale, interpret):
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    length, repeats = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, repeats, axis=1) for x in (k, v))
    forward = 128 if length % 128 == 0 and q.shape[-1] <= 64 else 64
    backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 32)
    blocks = BlockSizes(block_q=forward, block_k=64, **backward)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = mha(q, k, v, segment_ids, sm_scale=scale, causal=True, block_sizes=blocks, interpret=interpret)
    return out.swapaxes(1, 2)


def _splash(q, k, v, segment_ids, scale, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    kernel = _splash_kernel(q.shape[1], q.shape[2], interpret)
    of_row = lambda q, k, v, s: kernel(q, k, v, segment_ids=SegmentIds(q=s, kv=s))  # noqa: E731
    return jax.vmap(of_row)((q * scale).astype(q.dtype), k, v, segment_ids)


@functools.cache
def _splash_kernel(heads: int, length: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block)
    blocks = splash.BlockSizes(**sizes)  # type: ignore[arg-type]  # all of these are numbers
    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    with jax.ensure_compile_time_eval():  # the kernel is kept: it may hold no tracer of the program it is first made in
        return splash.make_splash_mha(causal, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)


_KERNELS = {"triton": _triton, "splash": _splash}
