"""`rmft convert`: models of others to start training from, and our runs for others to load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import yaml

from rmft_jax.config import ModelConfig
from rmft_jax.data.huggingface_tokenizer import HuggingFaceTokenizer, read_files, rebuild
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.data.tokenizer import Tokenizer, load_tokenizer, lossless, tokenizer_path
from rmft_jax.files import read_json, whole_folder, write_bytes, write_json, write_text
from rmft_jax.models.gguf import Gguf
from rmft_jax.models.gpt import count_params, init_params
from rmft_jax.models.huggingface import export_model, import_model
from rmft_jax.progress import say
from rmft_jax.training.checkpoints import Checkpoints, abstract
from rmft_jax.training.setup import load_run_config


def convert_import(source: Path, out: Path) -> dict:
    """Turn a model into a folder that training starts from, and return what it is.

    source: a folder of Hugging Face (config.json, safetensors) or a .gguf file.
    out: a new folder. It gets checkpoints/0, which `training.init_from` takes; config.yaml, a config of the sections that go
      with it; the tokenizer's files; and config.json, which says how many ids the model has.

    Returns: family, parameters, vocab_size, tokenizer (its file, None without one), bos_id, eos_id.
    Raises UserError when `out` exists, for every fault of the source, and for a tokenizer that does not keep text as it is.
    """
    with whole_folder(out) as partial:
        say(f"convert: reading {source}")
        gguf = Gguf(source) if source.suffix == ".gguf" and not source.is_dir() else None
        if gguf:
            settings, files = gguf.settings, rebuild(gguf.metadata, str(source))
        else:
            settings = read_json(source / "config.json", "model config", "name a folder of Hugging Face or a .gguf file")
            files = read_files(source)
        tokenizer = _tokenizer(files, settings, source)
        params, model = gguf.read_model() if gguf else import_model(source)
        for name, data in files.items():
            write_bytes(partial / name, data)
        write_json(partial / "config.json", settings)
        checkpoints = Checkpoints(partial / "checkpoints")
        checkpoints.save({"params": params, "step": np.int32(0)})
        checkpoints.close()
        fragment = {"model": dataclasses.asdict(model), "training": {"init_from": str(out.absolute())}}
        if tokenizer:
            fragment["tokenizer"] = {"path": str(out.absolute() / Path(tokenizer.file).name)}
        write_text(partial / "config.yaml", yaml.safe_dump(fragment, sort_keys=False))
    return {
        "family": settings["model_type"],
        "parameters": count_params(params),
        "vocab_size": len(params["embed"]),
        "tokenizer": Path(tokenizer.file).name if tokenizer else None,
        "bos_id": tokenizer.bos_id if tokenizer else None,
        "eos_id": tokenizer.eos_id if tokenizer else None,
    }


def convert_export(run: Path, out: Path) -> dict:
    """Write a run as a folder that AutoModelForCausalLM and AutoTokenizer of `transformers` load.

    run: a run's directory (its newest checkpoint), RUN/checkpoints/STEP, or a folder that `convert_import` made.
    out: a new folder, with config.json, generation_config.json, safetensors and the tokenizer.

    Returns: step, parameters, vocab_size. Raises UserError when `out` exists, when `run` is not a run or has no finished
    checkpoint, and when no family of `transformers` has such a model.
    """
    directory = run.parent.parent if run.name.isdigit() else run
    config = load_run_config(directory)
    own = (directory / "tokenizer.json").exists() or (directory / "tokenizer.model").exists()
    tokenizer = load_tokenizer(directory if own else tokenizer_path(config.data_dir))
    with whole_folder(out) as partial:
        params, step = _params(run, config.model, tokenizer.vocab_size)
        export_model(params, config.model, partial, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        for name, data in tokenizer.transformers_files().items():
            write_bytes(partial / name, data)
    return {"step": step, "parameters": count_params(params), "vocab_size": tokenizer.vocab_size}


def _tokenizer(files: dict[str, bytes], settings: dict, source: Path) -> Tokenizer | None:
    """Return the tokenizer of a model's folder, checked; None where it has none."""
    if "tokenizer.json" in files:
        model = {"config.json": json.dumps(settings).encode()}
        return lossless(HuggingFaceTokenizer(files | model, str(source / "tokenizer.json")), str(source))
    if "tokenizer.model" in files:
        return lossless(SentencePieceTokenizer(files["tokenizer.model"]), str(source / "tokenizer.model"))
    return None


def _params(run: Path, model: ModelConfig, vocab_size: int) -> tuple[dict, int]:
    checkpoints, step = Checkpoints.open(run)
    tree = jax.eval_shape(lambda: init_params(model, vocab_size, jax.random.key(0)))
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = abstract(tree, jax.tree.map(lambda _: host, tree))
    params = checkpoints.restore_params(step, target)
    checkpoints.close()
    return params, step
