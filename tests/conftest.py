"""Eight fake CPU devices, and one small prepared experiment that the tests share."""

import os

# Eight devices on few cores: a collective waits long for the last of them when other work runs, and XLA would abort after
# 40 seconds. For the same reason tests take one step at a time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import pytest  # noqa: E402

from rmft_jax.config import load_config  # noqa: E402
from rmft_jax.data.prepare import load_prepared, prepare  # noqa: E402

TINY = [
    "source.limit=120", "tokenizer.vocab_size=700", "model.layers=2", "model.width=32", "model.heads=2",
    "training.batch_size=8", "training.sequence_length=64", "training.log_every=5", "checkpoint.count=2",
    "training.warmup_steps=5", "audit.prompts=16", "audit.new_tokens=16", "audit.batch_size=16",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a function that makes a small config with prepared data, given overrides."""
    out = tmp_path_factory.mktemp("tiny")
    prepare(load_config(None, [*TINY, f"out={out}"]))
    return lambda *overrides: load_config(None, [*TINY, f"out={out}", *overrides])


@pytest.fixture(scope="session")
def prepared(tiny):
    """Return the small prepared experiment."""
    return load_prepared(tiny())
