"""One teacher-forced pass over token rows: what a model says about each token, in compiled batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import ModelConfig
from rmft_jax.devices import rows_for, spread_rows
from rmft_jax.kernels import filtered_log_prob, token_nll, vocabulary_statistics
from rmft_jax.models.gpt import forward

_LOGITS = 2**25  # elements of the logits of a batch at most (128 MiB in float32)


class Rows(NamedTuple):
    """Token rows, padded at the right: tokens int32 [N, T]; start, end int [N], the range of tokens that count.

    All tokens before `end` are read; none may count that nothing stands before, so start >= 1.
    """

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Return bool [N, T]: the tokens that count."""
        place = np.arange(self.tokens.shape[1])
        return (place >= self.start[:, None]) & (place < self.end[:, None])


class Sampling(NamedTuple):
    """How tokens are sampled: see `kernels.filtered_log_prob`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


# What can be asked of each token: a function (logits [B, T, V], targets [B, T], sampling) -> [B, T].
FIELDS: dict[str, Callable] = {
    "log_prob": lambda logits, targets, sampling: -token_nll(logits, targets),
    "hit": lambda logits, targets, sampling: jnp.argmax(logits, axis=-1) == targets,
    "mean": lambda logits, targets, sampling: vocabulary_statistics(logits)[0],
    "deviation": lambda logits, targets, sampling: vocabulary_statistics(logits)[1],
    "filtered_log_prob": lambda logits, targets, sampling: filtered_log_prob(logits, targets, **sampling._asdict()),
}


@dataclass(frozen=True)
class Model:
    """A trained model, ready to be asked."""

    config: ModelConfig
    params: dict
    vocab_size: int
    batch_size: int
    dtype: type = jnp.float32

    def score(self, rows: Rows, fields: Sequence[str], sampling: Sampling = Sampling()) -> dict[str, np.ndarray]:  # noqa: B008
        """Return each of `fields` (keys of FIELDS) as an array [N, T], 0 or False where a token does not count.

        Place t is about token t, given those before it in the row.
        """
        count, length = rows.tokens.shape
        size = rows_for(max(1, min(self.batch_size, count, _LOGITS // (length * self.vocab_size))))
        program = _program(self.config, tuple(fields), sampling, self.dtype)
        out: dict[str, list[np.ndarray]] = {name: [] for name in fields}
        for begin in range(0, count, size):
            index = np.minimum(np.arange(begin, begin + size), count - 1)  # the last batch is filled up: one program for all
            for name, values in program(self.params, *spread_rows(rows.tokens[index], rows.end[index])).items():
                out[name].append(np.asarray(values))
        counts = rows.counts
        whole = {name: np.concatenate(values)[:count] for name, values in out.items()}
        return {name: _where(counts, np.pad(values, ((0, 0), (1, 0)))) for name, values in whole.items()}


def _where(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(counts, values, np.zeros((), values.dtype))


def make_rows(tokens: Sequence[np.ndarray], start: Sequence[int] | int = 1) -> Rows:
    """Pad token sequences into Rows that count from `start` to their end."""
    end = np.array([len(row) for row in tokens])
    out = np.zeros((len(tokens), end.max(initial=2)), np.int32)
    for number, row in enumerate(tokens):
        out[number, : len(row)] = row
    return Rows(out, np.broadcast_to(start, end.shape), end)


@functools.lru_cache(maxsize=32)
def _program(config: ModelConfig, fields: tuple[str, ...], sampling: Sampling, dtype) -> Callable:
    @jax.jit
    def score(params, tokens, end):
        segments = (jnp.arange(tokens.shape[1]) < end[:, None]).astype(jnp.int32)
        logits = forward(params, config, tokens[:, :-1], segments[:, :-1], dtype=dtype)
        return {name: FIELDS[name](logits, tokens[:, 1:], sampling) for name in fields}

    return score
