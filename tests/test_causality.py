"""Gradients prove it: no position learns from later tokens or from another document of its row, not even by rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmft_jax.config import load_config
from rmft_jax.kernels import FUSED_ATTENTION
from rmft_jax.models import gpt

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 0, 0]], np.int32)
SMALL = ["model.layers=2", "model.width=16", "model.heads=2"]
MODELS = {
    "llama": [],
    "grouped": ["model.kv_heads=1", "model.qk_norm=true"],
    "gpt2": ["model.positions=learned", "model.norm=layer", "model.activation=gelu_new", "model.qkv_bias=true"],
    "local": ["model.local_window=2", "model.positions=learned", "training.sequence_length=64"],
    "parallel": ["model.parallel=true", "model.rotary_share=0.5", "model.tied=false"],
}


ROWS = np.array([0, 69, 70, 144, 145, 200, 235])  # of the long row of the fused kernels: borders of documents, and within


def derivative(config, segments, monkeypatch, rows=None, **more):
    """Return |d features of position t / d embedding of position s|, summed over features, [T, T].

    rows: positions t to look at alone, and of their features one weighted sum.
    """
    params = gpt.init_params(config, 50, jax.random.key(0))
    inputs = gpt._embed(params, config, jnp.asarray(np.arange(segments.size)[None] % 50), jnp.zeros_like(segments))
    monkeypatch.setattr(gpt, "_embed", lambda params, *_: params["inputs"])

    def features(inputs):
        out = gpt.hidden(params | {"inputs": inputs}, config, jnp.zeros_like(segments), jnp.asarray(segments), **more)[0]
        return out if rows is None else (out[rows] @ jax.random.normal(jax.random.key(1), (config.width,)))[:, None]

    return np.abs(jax.jit(jax.jacrev(features))(inputs)).sum((1, 2, 4))


@pytest.mark.parametrize("fused", FUSED_ATTENTION)
def test_what_a_position_learns_from_by_fused_kernels(fused, monkeypatch):
    """Through the whole model: 256 positions, of which a few are looked at."""
    config = load_config(None, ["model.layers=2", "model.width=128", "model.heads=2", "model.kv_heads=1"]).model
    segments = np.repeat([1, 2, 3, 0], [70, 75, 91, 20])[None].astype(np.int32)
    influence = derivative(config, segments, monkeypatch, fused=fused, interpret=True, rows=ROWS)
    document, at = segments[0], np.arange(256)
    for row, t in zip(influence, ROWS, strict=True):
        may = (at <= t) & (document == document[t])
        assert (row[~may] == 0).all() and (row[may] > 0).all()


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_position_learns_from(name, remat, monkeypatch):
    config = load_config(None, [*SMALL, *MODELS[name]]).model
    influence = derivative(config, SEGMENTS, monkeypatch, remat=remat)
    document = SEGMENTS[0]
    may = np.tril(np.ones((12, 12), bool)) & (document[:, None] == document[None, :])
    text = document > 0
    assert (influence[text][:, ~text] == 0).all()
    assert (influence[np.ix_(text, text)][~may[np.ix_(text, text)]] == 0).all()
    if not config.local_window:
        assert (influence[np.ix_(text, text)][may[np.ix_(text, text)]] > 0).all()


def test_decoding_learns_from_its_own_prompt_alone():
    """The logits of a row in a batch depend on no other row, and on no padding."""
    config = load_config(None, SMALL).model
    params = gpt.unstack(gpt.init_params(config, 50, jax.random.key(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 6)))
    valid = jnp.asarray([[False, False, True, True, True, True], [True] * 6])

    def next_logits(embed):
        first, cache = gpt.prefill(params | {"embed": embed}, config, tokens, valid, cache_length=8)
        padded = jnp.pad(valid, ((0, 0), (0, 2))).at[:, 6].set(True)
        second, _ = gpt.decode(params | {"embed": embed}, config, tokens[:, 0], 6, padded, cache)
        return jnp.stack([first[0, 0], second[0, 0]])

    # column 0 of the output matrix reads the embedding too: leave out token 0 and what row 0 holds
    influence = np.abs(jax.jacrev(next_logits)(params["embed"])).sum(-1)
    read = [set(np.asarray(tokens)[0, 2:].tolist()) | {0}, set(np.asarray(tokens)[0].tolist()) | {0}]
    read[1] = read[0] | {int(tokens[0, 0])}
    for step in range(2):
        others = [token for token in range(50) if token not in read[step]]
        assert (influence[step, others] == 0).all() and (influence[step, sorted(read[step] - {0})] > 0).all()
