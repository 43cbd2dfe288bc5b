"""`rmft bench`: paired measurements on the current device, one JSON object each.

Adding one: a module here with `run(config, peer) -> dict`, and its line in BENCHES.
"""

from __future__ import annotations

import importlib
import importlib.metadata

import jax

from rmft_jax.config import Config
from rmft_jax.errors import UserError

BENCHES = {
    "masking": "the train step with on-device masking against the step without",
    "tracker": "the train step with memorization followed against the step without",
    "dispatch": "many steps handed over at once, against one at a time",
    "side_by_side": "eight small models in one program, against one after the other",
    "folds": "ten autoencoders on folds in one program, against one after the other",
    "knn": "nearest neighbours, exact and approximate, against scikit-learn and faiss-cpu",
    "detect": "finding and tagging personal data, against presidio-analyzer",
    "prepare": "finding, tokenising and ranking personal data, from text to records, against SentencePiece alone",
    "generate": "prefill and greedy decoding of a model, against transformers",
    "audit": "greedy decoding of the audit's prompts, against transformers",
    "train": "the whole train step, against transformers and PyTorch",
    "dedup": "deduplication, against the pipeline of the RMFT paper",
    "scaling": "memory and traffic of the train step on meshes of fake devices, against the sharding rules",
    "startup": "starting the command line and importing the package, in fresh processes",
}


def environment(*packages: str) -> dict:
    """Return what every result says of where it was measured: `device`, and `versions` of ours, jax and `packages`."""
    names = ("rmft-jax", "jax", *packages)
    return {
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def run_bench(name: str, config: Config, peer: str = "") -> dict:
    """Run one benchmark by name; `peer` names the rival to measure beside it, "" = the benchmark's own.

    Raises UserError for an unknown name or peer.
    """
    if name not in BENCHES:
        raise UserError(f"unknown benchmark {name!r}: choose one of {', '.join(BENCHES)}")
    return importlib.import_module(f"rmft_jax.bench.{name}").run(config, peer)
