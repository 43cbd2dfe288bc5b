"""One module for each paper reproduced. They build on the other rooms and hold no maths of their own.

Adding one: a module here with `run(config, command=) -> dict`, and its line in STUDIES.
"""

from __future__ import annotations

import importlib

from rmft_jax.config import Config
from rmft_jax.errors import UserError

STUDIES = {
    "rmft": "randomized masked fine-tuning against its rivals",
    "early-learning": "right labels are learned first, wrong ones memorized later, unless regularized",
    "deja-vu": "what vision-language models remember of training images beyond their captions",
    "m-score": "which training examples generative models memorize",
    "retroprompt": "whether looking examples up lowers what is memorized of them",
    "scaling": "how fast models of different sizes memorize, and forget",
}


def run_study(name: str, config: Config, *, command: str) -> dict:
    """Run one study by name and return its results. Raises UserError for an unknown name."""
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}: choose one of {', '.join(STUDIES)}")
    if config.training.mix and name != "rmft":
        raise UserError(f"training.mix is set, but `rmft study {name}` trains on one corpus: leave it out")
    return importlib.import_module(f"rmft_jax.studies.{name.replace('-', '_')}").run(config, command=command)
