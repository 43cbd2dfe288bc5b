"""Pure, jittable array functions, usable in any JAX program: they import nothing of rmft_jax outside this room."""

from rmft_jax.kernels.attention import attention, causal_mask, rotary
from rmft_jax.kernels.cross_entropy import target_mask, token_nll
from rmft_jax.kernels.masking import (
    PII,
    POLICIES,
    SURROGATE,
    TEXT,
    MaskedBatch,
    Rule,
    Spans,
    TaggedBatch,
    draw_surrogates,
    mask_batch,
    replaced_components,
    replaced_spans,
    uniform_below,
)
from rmft_jax.kernels.splice import Spliced, SurrogateBank, splice, splice_reference

__all__ = [
    "PII", "POLICIES", "SURROGATE", "TEXT", "MaskedBatch", "Rule", "Spans", "Spliced", "SurrogateBank", "TaggedBatch",
    "attention", "causal_mask", "draw_surrogates", "mask_batch", "replaced_components", "replaced_spans", "rotary",
    "splice", "splice_reference", "target_mask", "token_nll", "uniform_below",
]  # fmt: skip
