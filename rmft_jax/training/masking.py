"""From the config to the masking kernel: the key, the rules, and what they replace."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from rmft_jax.config import Config, MaskingRuleConfig
from rmft_jax.data.blocks import Blocks
from rmft_jax.kernels import Rule, replaced_spans


def masking_key(seed: int) -> jax.Array:
    """Return the key that surrogates are drawn from; its own stream, the same whatever else the run draws."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 0x524D4654)


def masking_rules(config: Config) -> tuple[Rule, ...]:
    """Return the Rule of each PII type of the data, or one Rule where all are equal."""
    rules = tuple(_rule(config.masking.types.get(name, config.masking)) for name in config.pii.names)
    return rules[:1] if len(set(rules)) == 1 else rules


def masked_share(config: Config, blocks: Blocks) -> tuple[int, int]:
    """Return how many PII occurrences of the training data the first epoch replaces, and how many there are."""
    span = {name: values[1:].astype(np.int32) for name, values in blocks.corpus.span.items()}
    row = _Spans(**{f"span_{name}": span[name] for name in ("rank", "count", "type", "identity", "id")}, epoch=np.int32(0))
    replaced = jax.jit(lambda row: replaced_spans(masking_key(config.seed), row, masking_rules(config)))(row)
    return int(np.sum(replaced)), len(span["rank"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Spans:
    """The part of a TaggedBatch that policies look at, for a whole corpus at once."""

    span_rank: np.ndarray
    span_count: np.ndarray
    span_type: np.ndarray
    span_identity: np.ndarray
    span_id: np.ndarray
    epoch: np.ndarray


def _rule(config: MaskingRuleConfig) -> Rule:
    return Rule(**{name: getattr(config, name) for name in Rule._fields})
