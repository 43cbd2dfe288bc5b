"""`rmft bench generate`: prefill and greedy decoding of a config's model, against `transformers`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rmft_jax.bench import environment
from rmft_jax.bench.decoders import PEER, load_params, transformers_decoder
from rmft_jax.config import Config
from rmft_jax.errors import UserError
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.models.gpt import count_params
from rmft_jax.models.huggingface import export_model
from rmft_jax.progress import track
from rmft_jax.training.mesh import batch_sharding, check_mesh, make_mesh, placement, shardings_for
from rmft_jax.training.step import DTYPES

_BATCHES = (8, 32)  # beside audit.batch_size
_NEVER = -1  # no row ends


def run(config: Config, peer: str = "", *, runs: int = 7) -> dict:
    """Time reading prompts and writing after them, of this library and of the peer in turn, from token ids to token ids.

    Each batch has random prompts of `audit.prompt_tokens` tokens without padding; `audit.new_tokens` are written to each and
    no row ends. Prefill is the time to the first new token; decoding is the rest. Batches: 8, 32 and `audit.batch_size`
    rows. The model, its weights (`training.init_from`, else initial ones), `training.dtype` and the mesh are the config's;
    parameters, rows and cache are split over it. The peer is `transformers` with the same weights and dtype, on all cores or
    the GPU, its own cache; `none` measures ours alone.

    Returns name, device, versions, unit, shape, value and peer_value (decoded tokens a second at the largest batch,
    medians), ratio (median over the pairs), runs (those pairs), and batches: for each size prefill and decode (tokens a
    second, ours and the peer's), their ratios, and tokens_equal_pct.
    Raises UserError for another peer, a missing library, or a mesh that the rows do not fit.
    """
    if peer not in ("", "transformers", "none"):
        raise UserError(f"unknown peer {peer!r} for the benchmark generate: choose transformers or none")
    if config.audit.new_tokens < 2:
        raise UserError(f"audit.new_tokens {config.audit.new_tokens}: all of it is prefill, take 2 or more")
    vocab_size, sizes = config.tokenizer.vocab_size, sorted({*_BATCHES, config.audit.batch_size})
    decoders, parameters = _decoders(config, peer, sizes)
    rng, results = np.random.default_rng(config.seed), []
    for size in sizes:
        tokens = rng.integers(0, vocab_size, (size, config.audit.prompt_tokens), np.int32)
        results.append(_measure(decoders, tokens, config.audit.new_tokens, runs))
    last = results[-1]
    return {
        "name": "generate",
        **environment("numpy", *(("torch", "transformers") if peer != "none" else ())),
        "unit": "decoded tokens/s",
        "shape": {
            **{name: getattr(config.model, name) for name in ("layers", "width", "heads", "positions", "activation")},
            "vocab_size": vocab_size,
            "parameters": parameters,
            "prompt_tokens": config.audit.prompt_tokens,
            "new_tokens": config.audit.new_tokens,
            "batch_size": sizes[-1],
            "dtype": config.training.dtype,
            "weights": config.training.init_from or "initial",
        },
        "value": last["decode"][0],
        "peer": f"{PEER}, {config.training.dtype}" if peer != "none" else None,
        "peer_value": last["decode"][1] if peer != "none" else None,
        "ratio": last.get("decode_ratio"),
        "runs": last.pop("runs"),
        "batches": [{key: value for key, value in result.items() if key != "runs"} for result in results],
    }


def _decoders(config: Config, peer: str, sizes: list[int]) -> tuple[list[Callable], int]:
    """Return `(tokens, new_tokens) -> new tokens` for ours, and the peer if there is one; and the number of parameters."""
    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh, config.tokenizer.vocab_size)
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    if unfit := [size for size in sizes if size % ways]:
        raise UserError(f"{unfit[0]} rows do not split over mesh.replica x mesh.fsdp = {ways}: make it a divisor")
    params = load_params(config, config.tokenizer.vocab_size, lambda shapes: shardings_for(shapes, mesh))
    dtype = DTYPES[config.training.dtype]
    programs = {
        new: make_greedy_decoder(config.model, new_tokens=new, end_id=_NEVER, dtype=dtype)
        for new in (1, config.audit.new_tokens)
    }

    def ours(tokens: np.ndarray, new: int) -> np.ndarray:
        rows = jax.device_put((tokens, np.ones(tokens.shape, bool)), batch_sharding(mesh))
        with placement(mesh):
            return np.asarray(programs[new](params, *rows))

    if peer == "none":
        return [ours], count_params(params)
    with tempfile.TemporaryDirectory() as folder:
        export_model(params, config.model, Path(folder))
        theirs = transformers_decoder(Path(folder), _NEVER, config.training.dtype)
    return [ours, lambda tokens, new: theirs(tokens, np.ones(tokens.shape, bool), new)], count_params(params)


def _measure(decoders: list[Callable], tokens: np.ndarray, new: int, runs: int) -> dict:
    """Return the rates of one batch, ours first; samples of the decoders alternate in order."""
    rows, length = tokens.shape
    seconds = np.zeros((runs + 1, len(decoders), 2))  # to the first new token, to the last
    outputs = [None] * len(decoders)
    for number in track(range(runs + 1), f"bench generate, {rows} rows", runs + 1):  # the first compiles
        for which in range(len(decoders))[:: 1 if number % 2 else -1]:
            for part, count in enumerate((1, new)):
                begin = time.perf_counter()
                outputs[which] = decoders[which](tokens, count)
                seconds[number, which, part] = time.perf_counter() - begin
    prefill, whole = np.moveaxis(seconds[1:], 2, 0)
    rates = {"prefill": rows * length / prefill, "decode": rows * (new - 1) / (whole - prefill)}
    result = {"batch_size": rows, **{name: np.median(x, axis=0).round(1).tolist() for name, x in rates.items()}}
    if len(decoders) > 1:
        result |= {f"{name}_ratio": float(np.median(x[:, 0] / x[:, 1])) for name, x in rates.items()}
        result["tokens_equal_pct"] = float(100 * (outputs[0] == outputs[1]).mean())
    return result | {"runs": rates["decode"].round(1).tolist()}
