"""Folders of `transformers`, random models of each family: the same logits on both sides, out and in."""

import json

import jax
import numpy as np
import pytest

from rmft_jax.config import ModelConfig
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import decode, forward, init_params, prefill, unstack
from rmft_jax.models.huggingface import export_model, import_model

torch = pytest.importorskip("torch", reason="needs the extra [bench]")
transformers = pytest.importorskip("transformers", reason="needs the extra [bench]")

LLAMA = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, initializer_range=0.3, rope_parameters={"rope_type": "default", "rope_theta": 300.0})
GPT2 = dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=32, initializer_range=0.3)
NEO = dict(vocab_size=61, hidden_size=32, num_layers=4, num_heads=4, max_position_embeddings=32, initializer_range=0.3)
NEOX = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
NEOX |= dict(initializer_range=0.3, rope_parameters=LLAMA["rope_parameters"] | {"partial_rotary_factor": 0.5})
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False, n_inner=48, activation_function="gelu")),
    "gpt_neo": ("GPTNeo", NEO | dict(window_size=5, attention_types=[[["global", "local"], 2]])),
    "gpt_neo_local": ("GPTNeo", NEO | dict(window_size=3, attention_types=[[["local"], 4]])),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox_in_turn": ("GPTNeoX", NEOX | dict(use_parallel_residual=False, attention_bias=False)),
    "llama": ("Llama", LLAMA | dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "llama_biases": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True, head_dim=6)),
    "qwen2": ("Qwen2", LLAMA | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=12)),
    "qwen3_one_key_head": ("Qwen3", LLAMA | dict(head_dim=8, num_key_value_heads=1, attention_bias=True)),
}


def theirs_of(family, settings):
    """Make a random model, biases and norms included."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{family}Config")(**settings)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def ask(model, tokens, valid=None):
    """Return their logits; valid: bool, False on padding at the left."""
    more = {}
    if valid is not None:
        mask = torch.from_numpy(valid).long()
        more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)}
    with torch.inference_mode():
        return model(torch.from_numpy(tokens).long(), **more).logits.float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_in_and_out(name, tmp_path):
    model = theirs_of(*MODELS[name])
    model.save_pretrained(tmp_path / "theirs")
    params, config = import_model(tmp_path / "theirs")
    tokens = np.random.default_rng(1).integers(0, 61, (4, 19)).astype(np.int32)
    logits = jax.jit(lambda tokens, segment_ids: forward(params, config, tokens, segment_ids))
    for length in (1, 7, 19):  # padded at the right
        theirs = ask(model, tokens[:, :length])
        ours = logits(tokens, np.broadcast_to(np.arange(19) < length, (4, 19)).astype(np.int32))[:, :length]
        assert theirs.std() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=1e-4)

    valid = np.arange(13) >= np.array([0, 3, 9, 12])[:, None]
    theirs = ask(model, tokens[:, :13], valid)
    blocks = unstack(params)
    read = jax.jit(lambda tokens, valid: prefill(blocks, config, tokens, valid, cache_length=19))
    last, cache = read(tokens[:, :13], valid)
    np.testing.assert_allclose(last, theirs[:, -1], atol=1e-4)
    whole = np.concatenate([valid, np.ones((4, 6), bool)], axis=1)
    theirs = ask(model, tokens, whole)
    step = jax.jit(lambda token, at, valid, cache: decode(blocks, config, token, at, valid, cache))
    for at in range(13, 19):  # cached decoding
        last, cache = step(tokens[:, at], at, whole & (np.arange(19) <= at), cache)
        np.testing.assert_allclose(last, theirs[:, at], atol=1e-4)

    packed = np.repeat([[1] * 8 + [2] * 7 + [0] * 4], 4, axis=0)  # the second document as if it stood alone
    ours = logits(tokens, packed)[:, 8:15]
    np.testing.assert_allclose(ours, ask(model, tokens[:, 8:15]), atol=1e-4)

    export_model(params, config, tmp_path / "ours", bos_id=0, eos_id=1)
    again, says = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(model) and not any(says.values())
    np.testing.assert_allclose(ask(again.eval(), tokens), ask(model, tokens), atol=1e-5)
    back, same = import_model(tmp_path / "ours")
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen2"])
def test_weights_in_several_files_and_in_bfloat16(name, tmp_path):
    model = theirs_of(*MODELS[name]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    params, config = import_model(tmp_path / "theirs")
    tokens = np.arange(22, dtype=np.int32).reshape(2, 11) * 7 % 61
    # read again: `.to` rounds the rotary frequencies of a model too
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    theirs = ask(model, tokens)
    np.testing.assert_allclose(forward(params, config, tokens, np.ones_like(tokens)), theirs, atol=1e-4)
    export_model(params, config, tmp_path / "ours", bos_id=0, eos_id=1, shard_bytes=20000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(ask(again, tokens), theirs, atol=1e-5)


CONFIG = ModelConfig(layers=3, width=48, heads=4, mlp_width=80, rope_base=5000.0)
PARAMS = init_params(CONFIG, 97, jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba': take a model of llama"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"attention_bias": True}, "no tensor layers.0.self_attn.q.*bias|no tensor .*bias"),
        ({"num_key_value_heads": 3}, "not divisible"),
        ({"num_key_value_heads": 2}, "self_attn.k_proj.weight has shape"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rotary"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
        ({"num_hidden_layers": 4}, "layers.3"),
        ({"num_hidden_layers": 2}, "no place"),
        ({"intermediate_size": 64}, "mlp.*shape"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    export_model(PARAMS, CONFIG, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        import_model(tmp_path)
    assert "\n" not in str(error.value)


def test_faulty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        import_model(tmp_path)
    with pytest.raises(UserError, match="no family of .* has a model with model.local_window 4"):
        export_model(PARAMS, ModelConfig(layers=3, width=48, heads=4, local_window=4), tmp_path)
    assert not list(tmp_path.iterdir())
    export_model(PARAMS, CONFIG, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a safetensors file"):
        import_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other")
    with pytest.raises(UserError, match="cannot be read"):
        import_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(UserError, match="files beside it"):
        import_model(tmp_path)
