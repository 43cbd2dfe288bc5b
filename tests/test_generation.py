"""Cached decoding against running the whole model again for each token."""

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import ModelConfig
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.models.gpt import count_params, forward, init_params

CONFIG = ModelConfig(layers=3, width=48, heads=4)
PARAMS = init_params(CONFIG, 97, jax.random.key(2))
PARAMS["embed"] = PARAMS["embed"] * 3  # sharper logits than at initialisation, so that ties cannot decide


logits_of = jax.jit(lambda tokens, segments: forward(PARAMS, CONFIG, tokens, segments))


def naive(prompt, new, end):
    """Generate for one prompt without a cache, running the whole model for each token."""
    tokens = list(prompt)
    for _ in range(new):
        if len(tokens) > len(prompt) and tokens[-1] == end:
            tokens.append(end)
            continue
        row = np.array([tokens + [0] * (24 - len(tokens))])  # padded at the right, which nothing before it sees
        logits = logits_of(row, (np.arange(24) < len(tokens))[None].astype(np.int32))
        tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_batched_cached_decoding_equals_full_recomputation():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 97, length).tolist() for length in (1, 4, 9, 12, 12, 7)]
    tokens, valid = np.zeros((6, 12), np.int32), np.zeros((6, 12), bool)
    for number, prompt in enumerate(prompts):
        tokens[number, 12 - len(prompt) :] = prompt
        valid[number, 12 - len(prompt) :] = True
    free = np.asarray(make_greedy_decoder(CONFIG, new_tokens=10, end_id=-1)(PARAMS, tokens, valid))
    assert free.tolist() == [naive(prompt, 10, -1) for prompt in prompts]
    assert len({tuple(row) for row in free.tolist()}) > 3
    end = int(free[2, 4])  # a token that does come up
    ended = np.asarray(make_greedy_decoder(CONFIG, new_tokens=10, end_id=end)(PARAMS, tokens, valid))
    assert ended.tolist() == [naive(prompt, 10, end) for prompt in prompts]
    assert (ended[2, 4:] == end).all()


def test_one_new_token():
    tokens = np.array([[5, 6, 7]], np.int32)
    one = make_greedy_decoder(CONFIG, new_tokens=1, end_id=2)(PARAMS, tokens, tokens > 0)
    assert np.asarray(one).tolist() == [naive([5, 6, 7], 1, 2)]


def test_parameter_count_by_hand():
    attention, mlp = 4 * 48 * 48, 3 * 48 * CONFIG.mlp
    assert count_params(PARAMS) == 97 * 48 + 48 + 3 * (attention + mlp + 2 * 48)
