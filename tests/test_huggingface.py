"""Llama folders: what goes out comes back, and `transformers` computes the same from it."""

import json

import jax
import numpy as np
import pytest

from rmft_jax.config import ModelConfig
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import forward, init_params, prefill, unstack
from rmft_jax.models.huggingface import export_llama, import_llama

CONFIG = ModelConfig(layers=3, width=48, heads=4, mlp_width=80, rope_base=5000.0)


@pytest.fixture
def params():
    """Random parameters, the scales of the norms included."""
    shapes = jax.eval_shape(lambda: init_params(CONFIG, 97, jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = {1: lambda shape: rng.uniform(0.5, 1.5, shape), 2: lambda shape: rng.normal(0, 0.3, shape)}
    return jax.tree.map(lambda x: draw[1 if x.shape[-1] == 48 and x.ndim < 3 and x.shape[0] != 97 else 2](x.shape)
                        .astype(np.float32), shapes)  # fmt: skip


def test_round_trip_is_exact(tmp_path, params):
    export_llama(params, CONFIG, 97, tmp_path)
    back, config = import_llama(tmp_path)
    assert config == CONFIG
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_transformers_computes_the_same_logits(tmp_path, params):
    torch = pytest.importorskip("torch", reason="needs the extra [bench]")
    transformers = pytest.importorskip("transformers", reason="needs the extra [bench]")
    export_llama(params, CONFIG, 97, tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 97, (5, 17)).astype(np.int32)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    ours = forward(params, CONFIG, tokens, np.ones_like(tokens))
    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    valid = np.arange(17) >= np.array([0, 3, 9, 16, 1])[:, None]  # padded at the left
    with torch.inference_mode():
        mask = torch.from_numpy(valid).long()
        padded = model(torch.from_numpy(tokens).long(), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0))
    last, _ = prefill(unstack(params), CONFIG, tokens, valid, cache_length=17)
    np.testing.assert_allclose(last, padded.logits[:, -1].numpy(), atol=1e-4)


def test_a_model_that_transformers_wrote_comes_in(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra [bench]")
    transformers = pytest.importorskip("transformers", reason="needs the extra [bench]")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, rms_norm_eps=1e-6, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings).eval()
    model.save_pretrained(tmp_path)
    params, config = import_llama(tmp_path)
    assert config == ModelConfig(layers=2, width=32, heads=4, mlp_width=40, rope_base=300.0)
    tokens = np.arange(22, dtype=np.int32).reshape(2, 11) * 7 % 61
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(forward(params, config, tokens, np.ones_like(tokens)), theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"num_key_value_heads": 2}, "key-value heads"),
        ({"head_dim": 24}, "wide"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rotary"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary"),
        ({"tie_word_embeddings": False}, "output matrix"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"num_hidden_layers": 2}, "no place"),
        ({"intermediate_size": 64}, "mlp.gate_proj"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, params, change, message):
    export_llama(params, CONFIG, 97, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        import_llama(tmp_path)


def test_faulty_folders_are_refused(tmp_path, params):
    with pytest.raises(UserError, match="config.json"):
        import_llama(tmp_path)
    with pytest.raises(UserError, match="97 rows but the tokenizer 98"):
        export_llama(params, CONFIG, 98, tmp_path)
    export_llama(params, CONFIG, 97, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a safetensors file"):
        import_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other")
    with pytest.raises(UserError, match="cannot be read"):
        import_llama(tmp_path)
