"""What the benchmarks of decoding share: weights to decode with, and the decoder of `transformers`."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rmft_jax.config import Config
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import init_params
from rmft_jax.training.checkpoints import Checkpoints, abstract

PEER = "transformers generate, greedy, sdpa"


def load_params(config: Config, vocab_size: int, place: Callable) -> dict:
    """Return the parameters that `training.init_from` names (a run or RUN/checkpoints/STEP), or initial ones.

    place: from the parameters' shapes to the sharding of each.
    """
    make = jax.jit(lambda: init_params(config.model, vocab_size, jax.random.key(config.seed)))
    shapes = jax.eval_shape(make)
    if not config.training.init_from:
        return jax.device_put(make(), place(shapes))
    checkpoints, step = Checkpoints.open(Path(config.training.init_from))
    params = checkpoints.restore(step, abstract({"params": shapes}, {"params": place(shapes)}), items=("params",))["params"]
    checkpoints.close()
    return params


def transformers_decoder(folder: Path, end: int, dtype: str = "float32") -> Callable[..., np.ndarray]:
    """Load a model that `export_model` wrote, and return `(tokens, valid, new_tokens) -> int32 [B, new_tokens]`.

    tokens: int32 [B, P], padded at the left; valid: bool [B, P]. Rows that ended are filled up with the end token. It runs
    on the GPU where ours does, else on all cores. Raises UserError when torch or transformers is missing, or torch has no
    CUDA.
    """
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(f"the peer needs {error.name}, which is not installed: pip install 'rmft-jax[bench]'") from None
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise UserError("the peer's torch has no CUDA, and ours runs on a GPU: install torch with CUDA")
    device = "cuda" if gpu else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval().to(device)

    def generate(tokens: np.ndarray, valid: np.ndarray, new_tokens: int) -> np.ndarray:
        ids, mask = (torch.from_numpy(np.asarray(x, np.int64)).to(device) for x in (tokens, valid))
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=end,
                pad_token_id=end,
            )  # fmt: skip
        written = out[:, tokens.shape[1] :].cpu().numpy()
        return np.pad(written, ((0, 0), (0, new_tokens - written.shape[1])), constant_values=end).astype(np.int32)

    return generate
