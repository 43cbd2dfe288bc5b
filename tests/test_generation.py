"""Cached decoding against running the whole model again for each token, against transformers, and over many devices."""

import jax
import numpy as np
import pytest

from rmft_jax.config import MeshConfig, ModelConfig
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.models.gpt import count_params, forward, init_params, prefill, unstack
from rmft_jax.models.huggingface import export_model
from rmft_jax.training.mesh import batch_sharding, make_mesh, placement, shardings_for

CONFIG = ModelConfig(layers=3, width=48, heads=4)
GPT2 = dict(
    positions="learned", max_positions=64, norm="layer", activation="gelu_new", qkv_bias=True, out_bias=True, mlp_bias=True
)
CONFIGS = {
    "rotary": CONFIG,
    "grouped queries": ModelConfig(layers=2, width=48, heads=4, kv_heads=2, qk_norm=True, tied=False),
    "learned positions": ModelConfig(layers=2, width=48, heads=4, **GPT2),
    "local windows": ModelConfig(layers=2, width=48, heads=4, local_window=5, **GPT2),
    "half rotated, parallel": ModelConfig(layers=2, width=48, heads=4, rotary_share=0.5, parallel=True),
}


def sharp(config, vocabulary=97):
    """Return initial parameters with sharper logits, so that ties cannot decide."""
    params = init_params(config, vocabulary, jax.random.key(2))
    return params | {"embed": params["embed"] * 3}


PARAMS = sharp(CONFIG)


def padded(lengths, vocabulary=97):
    """Return random prompts, as lists and padded at the left."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, vocabulary, length).tolist() for length in lengths]
    most = max(lengths)
    tokens, valid = np.zeros((len(lengths), most), np.int32), np.zeros((len(lengths), most), bool)
    for number, prompt in enumerate(prompts):
        tokens[number, most - len(prompt) :] = prompt
        valid[number, most - len(prompt) :] = True
    return prompts, tokens, valid


def naive(config, params, prompts, new, end):
    """Generate without a cache, running the whole model for each token."""
    logits_of = jax.jit(lambda tokens, segments: forward(params, config, tokens, segments))
    rows, at = [list(prompt) for prompt in prompts], np.arange(len(prompts))
    for _ in range(new):
        lengths = np.array([len(row) for row in rows])
        tokens = np.array([row + [0] * (24 - len(row)) for row in rows])  # padded at the right, which nothing before it sees
        logits = logits_of(tokens, (np.arange(24) < lengths[:, None]).astype(np.int32))
        chosen = np.argmax(np.asarray(logits)[at, lengths - 1], axis=-1)
        for row, prompt, token in zip(rows, prompts, chosen, strict=True):
            row.append(end if end in row[len(prompt) :] else int(token))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_cached_decoding_equals_full_recomputation(name):
    config = CONFIGS[name]
    params = sharp(config)
    prompts, tokens, valid = padded((1, 4, 9, 12, 12, 7))
    free = np.asarray(make_greedy_decoder(config, new_tokens=10, end_id=-1)(params, tokens, valid))
    assert free.tolist() == naive(config, params, prompts, 10, -1)
    assert len({tuple(row) for row in free.tolist()}) > 3


@pytest.mark.parametrize("at", [0, 4])
def test_rows_end_at_once_or_later_while_others_go_on(at):
    prompts, tokens, valid = padded((1, 4, 9, 12, 12, 7))
    end = naive(CONFIG, PARAMS, prompts[2:3], 5, -1)[0][at]
    ended = np.asarray(make_greedy_decoder(CONFIG, new_tokens=10, end_id=end)(PARAMS, tokens, valid))
    assert ended.tolist() == naive(CONFIG, PARAMS, prompts, 10, end)
    assert (ended[2, at:] == end).all() and (ended[:, -1] != end).any()


def test_one_new_token():
    tokens = np.array([[5, 6, 7]], np.int32)
    one = make_greedy_decoder(CONFIG, new_tokens=1, end_id=2)(PARAMS, tokens, tokens > 0)
    assert np.asarray(one).tolist() == naive(CONFIG, PARAMS, [[5, 6, 7]], 1, 2)


@pytest.mark.parametrize("name", ["rotary", "grouped queries", "learned positions"])
def test_the_same_tokens_as_transformers(name, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra [bench]")
    from rmft_jax.bench.decoders import transformers_decoder

    config = CONFIGS[name]
    params = sharp(config)
    export_model(params, config, tmp_path)
    _, tokens, valid = padded((1, 4, 9, 12, 12, 7))
    ours = np.asarray(make_greedy_decoder(config, new_tokens=10, end_id=2)(params, tokens, valid))
    assert ours.tolist() == transformers_decoder(tmp_path, 2)(tokens, valid, 10).tolist()


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, tensor=2), dict(replica=2, fsdp=2, tensor=2)])
def test_on_a_mesh_tokens_are_the_same_and_the_cache_is_split(sizes):
    config = ModelConfig(layers=2, width=64, heads=4, kv_heads=2)
    params = sharp(config, 96)
    _, tokens, valid = padded((1, 4, 9, 12, 12, 7, 3, 5), 96)
    decoder = make_greedy_decoder(config, new_tokens=6, end_id=2)
    alone = np.asarray(decoder(params, tokens, valid))
    mesh = make_mesh(MeshConfig(**{"replica": 1, **sizes}), jax.devices()[: int(np.prod(list(sizes.values())))])
    params = jax.device_put(params, shardings_for(params, mesh))
    rows = jax.device_put((tokens, valid), batch_sharding(mesh))
    with placement(mesh):
        assert np.asarray(decoder(params, *rows)).tolist() == alone.tolist()
        _, cache = jax.jit(lambda p, t, v: prefill(unstack(p), config, t, v, cache_length=18))(params, *rows)
    for array in jax.tree.leaves(cache):
        assert array.shape == (8, 2, 18, 16)
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // mesh.size}


def test_parameter_count_by_hand():
    attention, mlp = 4 * 48 * 48, 3 * 48 * CONFIG.mlp
    assert count_params(PARAMS) == 97 * 48 + 48 + 3 * (attention + mlp + 2 * 48)
