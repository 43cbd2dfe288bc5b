"""`rmft bench train`: the whole train step against `transformers` and PyTorch."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rmft_jax.bench import environment
from rmft_jax.config import Config
from rmft_jax.data.blocks import Blocks
from rmft_jax.data.loader import batches
from rmft_jax.data.prepare import Prepared, load_prepared, prepare
from rmft_jax.devices import peak_flops
from rmft_jax.errors import UserError
from rmft_jax.kernels import TaggedBatch
from rmft_jax.models.gpt import count_params, flops_per_token, init_params
from rmft_jax.models.huggingface import export_model
from rmft_jax.progress import say, track
from rmft_jax.training.attention import choose_attention
from rmft_jax.training.mesh import batch_sharding, check_mesh, make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import compile_train_step, init_state

MFU = "tokens/s x (6 x weights in matrix products + 6 x layers x heads x head width x length) / peak; causal, no embedding"
_VOCABULARY = 2048  # of the text: the bundled corpus fills no larger one; the model has the config's own


def run(config: Config, peer: str = "", *, runs: int = 10, seconds: float = 1.0) -> dict:
    """Time training steps of this library and of the peer, in turn, from token ids on the host to updated weights.

    Ours is the step of `rmft train`: masking on the device, documents that do not see each other, which tokens were
    predicted. The peer `transformers` has the same shapes, weights, optimizer, clipping and dtype (on GPU bfloat16 by
    autocast), torch's fused attention and fused AdamW, no dropout, and does none of these. It is measured as it is and under
    `torch.compile`, and the faster of the two counts. `none` measures ours alone.

    A pair is four samples in mirrored order (ABBA), of as many steps each as take about `seconds`; the mean of two counts.
    Before each sample one step is taken that is not timed: a first step after the other's finds its threads still spinning
    and its own memory given back, which in a training of one of the two happens once.

    Returns name, device, versions, unit, shape, value and peer_value (medians, tokens a second), ratio (median over the
    pairs), parameters, flops_per_token, mfu and peer_mfu (None where the device's peak is not known), mfu_formula,
    compile_seconds, peak_bytes of a device (as XLA has planned it), peer_peak_bytes (None on CPU), peer_modes (ms a step,
    seconds until the first one was done), losses of the first step, and runs: the pairs of samples.
    Raises UserError for another peer or a missing library.
    """
    if peer not in ("", "transformers", "none"):
        raise UserError(f"unknown peer {peer!r} for the benchmark train: choose transformers or none")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both live on one GPU
    prepared, blocks = tagged_text(config)
    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh, config.tokenizer.vocab_size)
    config = choose_attention(config, mesh)
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)
    first = next(source)
    ours, about = _ours(config, prepared, mesh, first)
    models, theirs = {"ours": ours}, {}
    if peer != "none":
        theirs = _transformers(config, first)
        models["peer"] = theirs.pop("step")
    tokens = config.training.batch_size * config.training.sequence_length
    counts = {name: max(1, round(seconds / _time(step, [first] * 2) * 2)) for name, step in models.items()}
    pairs = []
    for number in track(range(runs), "bench train", runs):
        names = list(models) + list(models)[::-1]
        order = names if number % 2 else [{"ours": "peer", "peer": "ours"}[n] if peer != "none" else n for n in names]
        spent = dict.fromkeys(models, 0.0)
        for name in order:
            warm_up, *timed = [next(source) for _ in range(1 + counts[name])]
            models[name]([warm_up])
            spent[name] += _time(models[name], timed)
        pairs.append([2 * counts[name] * tokens / spent[name] for name in models])
    value, *rival = np.median(pairs, axis=0).tolist()
    flops = flops_per_token(config.model, config.tokenizer.vocab_size, config.training.sequence_length, config.lora)
    peak = peak_flops()
    return {
        "name": "train",
        **environment("numpy", *(("torch", "transformers") if rival else ())),
        "unit": "tokens/s",
        "shape": {
            "batch_size": config.training.batch_size,
            "sequence_length": config.training.sequence_length,
            **{name: getattr(config.model, name) for name in ("layers", "width", "heads", "positions", "activation")},
            "vocab_size": config.tokenizer.vocab_size,
            "dtype": config.training.dtype,
            "attention": config.training.attention,
            "masking": config.masking.policy,
            "mesh": dict(mesh.shape),
        },
        "flops_per_token": flops,
        "mfu_formula": MFU,
        "mfu": peak and value * flops / (peak * mesh.size),
        **about,
        "value": value,
        "peer": theirs.pop("peer", None),
        "peer_value": rival[0] if rival else None,
        "peer_mfu": peak and rival[0] * flops / peak if rival else None,
        "ratio": float(np.median([a / b for a, b in pairs])) if rival else None,
        **theirs,
        "runs": [[round(rate, 1) for rate in pair] for pair in pairs],
    }


def tagged_text(config: Config) -> tuple[Prepared, Blocks]:
    """Return blocks of real, tagged text: the config's own data if they are prepared, else the bundled corpus."""
    if (config.data_dir / "manifest.json").exists():
        prepared = load_prepared(config)
        return prepared, load_blocks(config, prepared)[0]
    with tempfile.TemporaryDirectory() as folder:
        size = min(_VOCABULARY, config.tokenizer.vocab_size)
        tokenizer = dataclasses.replace(config.tokenizer, vocab_size=size)
        config = dataclasses.replace(config, out=folder, data="", tokenizer=tokenizer)
        prepare(config)
        prepared = load_prepared(config)
        return prepared, load_blocks(config, prepared)[0]


def _time(step: Callable[[list], None], batches: list) -> float:
    begin = time.perf_counter()
    step(batches)
    return time.perf_counter() - begin


def _ours(config: Config, prepared: Prepared, mesh, first: TaggedBatch) -> tuple[Callable, dict]:
    """Return a function that trains on batches, and what there is to say of the program."""
    optimizer, sharding = make_optimizer(config.training, 1000), batch_sharding(mesh)
    make = lambda: init_state(config, config.tokenizer.vocab_size, prepared.identities, optimizer)  # noqa: E731
    shapes = jax.eval_shape(make)
    held = {"state": jax.jit(make, out_shardings=shardings_for(shapes, mesh))()}
    bank = jax.device_put(prepared.bank, replicated(mesh))
    lowered = compile_train_step(config, optimizer, mesh, shapes).lower(held["state"], jax.device_put(first, sharding), bank)
    begin = time.perf_counter()
    program = lowered.compile()
    compile_seconds = time.perf_counter() - begin
    memory = program.memory_analysis()

    def train(batches: list) -> None:
        for batch in batches:
            held["state"], held["metrics"] = program(held["state"], jax.device_put(batch, sharding), bank)
        jax.block_until_ready(held)

    train([first])
    return train, {
        "parameters": count_params(shapes["params"]),
        "compile_seconds": round(compile_seconds, 2),
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,  # outputs take the place of arguments
        "loss": float(held["metrics"]["loss"]),
    }


def _transformers(config: Config, first: TaggedBatch) -> dict:
    """Return step (a function that trains on batches), peer (its description) and what there is to say of it."""
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(f"the peer needs {error.name}, which is not installed: pip install 'rmft-jax[bench]'") from None
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise UserError("the peer's torch has no CUDA, and ours runs on a GPU: install torch with CUDA, or --peer none")
    device = "cuda" if gpu else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("highest" if config.training.dtype == "float32" else "high")
    with tempfile.TemporaryDirectory() as folder:
        key = jax.random.key(config.seed, impl="threefry2x32")
        params = jax.jit(lambda: init_params(config.model, config.tokenizer.vocab_size, key))()
        export_model(params, config.model, Path(folder))
        del params
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.float32, attn_implementation="sdpa").train().to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    training = config.training
    betas = (training.beta1, training.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=betas, weight_decay=training.weight_decay, fused=True
    )
    autocast = torch.autocast(device, torch.bfloat16, enabled=training.dtype == "bfloat16")
    losses: list = []

    def trainer(model) -> Callable[[list], None]:
        def train(batches: list) -> None:
            for batch in batches:
                tokens = torch.from_numpy(np.asarray(batch.tokens[:, : training.sequence_length], np.int64)).to(device)
                with autocast:
                    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip or float("inf"))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))  # waits for the device

        return train

    steps, modes = {}, {}
    for mode, variant in (("eager", lambda: model), ("compile", lambda: torch.compile(model))):
        step = trainer(variant())
        begin = time.perf_counter()
        try:
            step([first])
        except Exception as error:  # torch.compile needs a C++ compiler and supports not every platform
            if mode == "eager":
                raise
            say(f"bench train: torch.compile does not work here ({type(error).__name__}); the peer runs as it is")
            continue
        first_seconds = time.perf_counter() - begin
        _time(step, [first])
        milliseconds = 1000 * float(np.median([_time(step, [first]) for _ in range(5)]))
        steps[mode] = step
        modes[mode] = {"ms_per_step": round(milliseconds, 2), "first_step_seconds": round(first_seconds, 2)}
    best = min(modes, key=lambda mode: modes[mode]["ms_per_step"])
    return {
        "step": steps[best],
        "peer": f"transformers {best}, sdpa, fused AdamW, {training.dtype}, {device}, {torch.get_num_threads()} threads",
        "peer_loss": losses[0],
        "peer_modes": modes,
        "peer_peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
    }
