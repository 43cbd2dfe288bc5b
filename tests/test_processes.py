"""Several real processes over loopback are one run."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from rmft_jax.config import to_yaml
from rmft_jax.devices import join_processes
from rmft_jax.errors import UserError

TRAIN = [sys.executable, "-c", "from rmft_jax.cli import main; main()", "train"]


def start(config, *, devices: int, **more: str) -> subprocess.Popen:
    """Start `rmft train` in a process with so many devices."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **more}
    return subprocess.Popen([*TRAIN, config], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(config) -> list[float]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.timeout(240)
def test_two_processes_with_two_devices_train_as_one_with_four(tiny, tmp_path):
    """Losses, evaluation and checkpoints agree; process 0 alone reports."""
    runs = []
    for number, name in enumerate(("one", "two")):
        config = tiny(f"name=processes_{name}", "training.steps=20", "training.log_every=1", "checkpoint.count=1",
                      "mesh.replica=2", "mesh.fsdp=2")  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(to_yaml(config))
        if number == 0:
            processes = [start(path, devices=4)]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
            processes = [start(path, devices=2, JAX_PROCESS_ID=str(n), **told) for n in range(2)]
        said = [process.communicate(timeout=200) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), said
        assert [str(config.run_dir) in out for out, _ in said] == [True, *[False] * (len(processes) - 1)]
        runs.append(config)
    one, two = map(losses, runs)
    assert len(one) == 20
    np.testing.assert_allclose(two, one, rtol=1e-5)
    scores = [json.loads((config.run_dir / "evaluation.json").read_text())["checkpoints"][-1] for config in runs]
    assert scores[0]["perplexity"] == pytest.approx(scores[1]["perplexity"], rel=1e-5)
    assert (runs[1].run_dir / "checkpoints" / "20" / "params").is_dir()


HALF_TOLD = (
    {"JAX_NUM_PROCESSES": "2"},
    {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "x"},
    {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
)


@pytest.mark.parametrize("told", HALF_TOLD)
def test_a_half_told_start_is_refused(monkeypatch, told):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_"):
        join_processes()
