"""Classification by filling in a word: a text, a template, and the model's choice among the words of the labels.

Two forms. Left to right (any GPT): "<text> It was" and the next token is the label's word. Masked (a model that sees both
sides): "<text> It was [MASK]." and the word stands in the place of the mask, the last row of the embedding.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmft_jax.config import ModelConfig
from rmft_jax.models.gpt import hidden, output_matrix


class Prompts(NamedTuple):
    """Prompts padded at the right: tokens int32 [N, T]; at int32 [N], where the label's word is looked for.

    residual: float [N, T, E] or None, what the first trained block reads, where blocks below it are not trained.
    """

    tokens: jax.Array
    at: jax.Array
    residual: jax.Array | None = None

    @property
    def segment_ids(self) -> jax.Array:
        """Return int32 [N, T], 0 on padding. (Of masked prompts one more token, the full stop, follows the answer.)"""
        return (jnp.arange(self.tokens.shape[1]) < self.at[:, None] + 2).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Cloze:
    """How a model is asked. model: its shape, of the trained blocks alone. causal: the left-to-right form. words: the ids of
    the labels' words."""

    model: ModelConfig
    causal: bool
    words: tuple[int, ...]

    def features(self, params: dict, prompts: Prompts, demonstrations: jax.Array | None = None) -> jax.Array:
        """Return the representation of each prompt at the place of its answer, float32 [N, E].

        demonstrations: float [N, classes, 2, E], as `kernels.neural_demonstrations` has them; they are read like tokens
        before the text, so that a left-to-right model sees them too. (In the paper the model is a masked one.)
        """
        segments, at = prompts.segment_ids, prompts.at
        residual, tokens = prompts.residual, prompts.tokens
        if demonstrations is not None:
            shown = demonstrations.reshape(len(tokens), -1, demonstrations.shape[-1])
            extra = shown.shape[1]
            # the beginning of the text stays first
            embedded = params["embed"][tokens]
            residual = jnp.concatenate([embedded[:, :1], shown, embedded[:, 1:]], axis=1)
            tokens, at = jnp.pad(tokens, ((0, 0), (extra, 0))), at + extra
            segments = jnp.pad(segments, ((0, 0), (extra, 0)), constant_values=1)
        found = hidden(params, self.model, tokens, segments, causal=self.causal, residual=residual)
        return found[jnp.arange(len(at)), at]

    def logits(self, params: dict, features: jax.Array) -> jax.Array:
        """Return the scores of the labels' words, float32 [N, classes]."""
        return features @ output_matrix(params)[:, jnp.array(self.words)]

    def label_embeddings(self, params: dict) -> jax.Array:
        """Return the input embeddings of the labels' words, float32 [classes, E]."""
        return params["embed"][jnp.array(self.words)]


def read_lower(params: dict, model: ModelConfig, prompts: Prompts, layers: int, *, causal: bool) -> tuple[dict, Prompts]:
    """Run the blocks below the last `layers`, once; return the parameters of those that are left, and prompts for them."""
    below = model.layers - layers
    lower, upper = (jax.tree.map(lambda x, s=s: x[s], params["blocks"]) for s in (slice(below), slice(below, None)))
    shape = dataclasses.replace(model, layers=below)
    run = jax.jit(lambda params, rows: hidden(
        params, shape, rows.tokens, rows.segment_ids, causal=causal, normalise=False))  # fmt: skip
    parts = [run(params | {"blocks": lower}, jax.tree.map(lambda x, b=b: x[b : b + 16], prompts))
             for b in range(0, len(prompts.tokens), 16)]  # fmt: skip
    return params | {"blocks": upper}, prompts._replace(residual=jnp.concatenate(parts))
