"""`rmft bench audit`: greedy decoding of the audit's prompts against `transformers`."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.bench import environment
from rmft_jax.bench.decoders import PEER, load_params, transformers_decoder
from rmft_jax.config import Config
from rmft_jax.data.prepare import load_prepared, prepare
from rmft_jax.devices import everywhere, rows_for, spread_rows
from rmft_jax.errors import UserError
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.memorization.prompts import Prompts, build_prompts
from rmft_jax.models.huggingface import export_model
from rmft_jax.progress import track

_WARM_UP = 1


def run(config: Config, peer: str = "", *, runs: int = 7) -> dict:
    """Decode the first batch of each prompt set with this library and with `transformers`, in turn.

    Both have the same weights in float32, the same left-padded prompts, and write `audit.new_tokens` tokens a row; time
    counts from token ids to token ids, the reading of the prompts included, compilation and loading left out. The weights
    are those that `training.init_from` names (a run or RUN/checkpoints/STEP), or else initial ones, with which hardly any
    row ends early. `transformers` runs on all cores, in inference mode, with its own cache and torch's fused attention.

    Returns name, device, versions, unit, shape, value and peer_value (medians, new tokens a second), ratio (median over the
    pairs), same_output, tokens_equal_pct (a tie that float arithmetic breaks in another way changes all tokens after it),
    sets (tokens a second for each prompt set) and runs: the pairs of samples. Raises UserError for another peer or a missing
    library.
    """
    if peer not in ("", "transformers"):
        raise UserError(f"unknown peer {peer!r} for the benchmark audit: choose transformers")
    with tempfile.TemporaryDirectory() as folder:
        if not (config.data_dir / "manifest.json").exists():
            config = dataclasses.replace(config, out=folder, data="")
            prepare(config)
        prepared = load_prepared(config)
        size = config.audit.batch_size
        prompts = {name: Prompts(s.tokens[:size], s.valid[:size]) for name, s in build_prompts(config, prepared).items()}
        whole = lambda shapes: jax.tree.map(lambda _: everywhere(), shapes)  # noqa: E731
        params = load_params(config, prepared.tokenizer.vocab_size, whole)
        bos, end = prepared.tokenizer.bos_id, prepared.tokenizer.eos_id
        export_model(params, config.model, Path(folder), bos_id=bos, eos_id=end)
        theirs = transformers_decoder(Path(folder), end)
        decoders = _ours(config, params, end), lambda rows: theirs(rows.tokens, rows.valid, config.audit.new_tokens)
    counts = {name: len(rows.tokens) * config.audit.new_tokens for name, rows in prompts.items()}
    seconds, outputs = [], {}
    for number in track(range(runs + _WARM_UP), "bench audit", runs + _WARM_UP):
        pair = {name: [0.0, 0.0] for name in prompts}
        for name, rows in prompts.items():
            for which in (0, 1) if number % 2 else (1, 0):
                begin = time.perf_counter()
                outputs[name, which] = decoders[which](rows)
                pair[name][which] = time.perf_counter() - begin
        seconds.append([pair[name] for name in prompts])
    times = np.array(seconds[_WARM_UP:])  # [runs, sets, 2]
    total = sum(counts.values())
    pairs = total / times.sum(axis=1)
    by_set = np.array(list(counts.values()))[:, None] / np.median(times, axis=0)
    equal = np.concatenate([(outputs[name, 0] == outputs[name, 1]).ravel() for name in prompts])
    ours, theirs = np.median(pairs, axis=0)
    return {
        "name": "audit",
        **environment("numpy", "torch", "transformers"),
        "unit": "tokens/s",
        "shape": {
            "prompts": {name: list(rows.tokens.shape) for name, rows in prompts.items()},
            "new_tokens": config.audit.new_tokens,
            "layers": config.model.layers,
            "width": config.model.width,
            "heads": config.model.heads,
            "vocab_size": prepared.tokenizer.vocab_size,
            "weights": config.training.init_from or "initial",
        },
        "value": float(ours),
        "peer": f"{PEER}, float32, {os.cpu_count()} threads",
        "peer_value": float(theirs),
        "ratio": float(np.median(pairs[:, 0] / pairs[:, 1])),
        "same_output": bool(equal.all()),
        "tokens_equal_pct": float(100 * equal.mean()),
        "sets": {name: [round(float(x), 1) for x in rates] for name, rates in zip(prompts, by_set, strict=True)},
        "runs": [[round(a, 1), round(b, 1)] for a, b in pairs.tolist()],
    }


def _ours(config: Config, params: dict, end: int) -> Callable[[Prompts], np.ndarray]:
    decoder = make_greedy_decoder(config.model, new_tokens=config.audit.new_tokens, end_id=end, dtype=jnp.float32)

    def generate(rows: Prompts) -> np.ndarray:
        index = np.minimum(np.arange(rows_for(len(rows.tokens))), len(rows.tokens) - 1)
        return np.asarray(decoder(params, *spread_rows(rows.tokens[index], rows.valid[index])))[: len(rows.tokens)]

    return generate
