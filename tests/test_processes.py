"""Several real processes over loopback are one run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rmft_jax.config import to_yaml
from rmft_jax.errors import UserError
from rmft_jax.processes import join_processes


def start(config, *, devices: int, code: str = "", **more: str) -> subprocess.Popen:
    """Start `rmft train`, or other code, in a process with so many devices."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **more}
    command = [sys.executable, "-c", code or "from rmft_jax.cli import main; main()", "train", str(config)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(config) -> list[float]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.timeout(600)
def test_two_processes_with_two_devices_train_as_one_with_four(tiny, tmp_path):
    """Losses, evaluation and checkpoints agree; process 0 alone reports."""
    runs = []
    for number, name in enumerate(("one", "two")):
        config = tiny(f"name=processes_{name}", "training.steps=20", "training.log_every=1", "checkpoint.count=1",
                      "mesh.replica=2", "mesh.fsdp=2")  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(to_yaml(config))
        processes = start_two(path) if number else [start(path, devices=4)]
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


def start_two(path, code=("", ""), **more: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", **more}
    return [start(path, devices=2, code=code[n], JAX_PROCESS_ID=str(n), **told) for n in range(2)]


@pytest.mark.timeout(600)
def test_a_process_that_dies_ends_the_other_which_names_it(tiny, tmp_path):
    """Then both go on to exactly what the undisturbed run comes to, and one process with as many devices goes on too."""
    settings = ["training.steps=120", "training.log_every=1", "checkpoint.count=1", "checkpoint.every_steps=15",
                "checkpoint.keep_last=3", "mesh.replica=2", "mesh.fsdp=2"]  # fmt: skip
    job = {"RMFT_PEER_TIMEOUT": "5", **kept_programs(tmp_path)}
    expected = tiny("name=peers_undisturbed", *settings)
    (path := tmp_path / "undisturbed.yaml").write_text(to_yaml(expected))
    assert [process.wait(200) for process in start_two(path, **job)] == [0, 0]
    config = tiny("name=peers", *settings)
    (path := tmp_path / "peers.yaml").write_text(to_yaml(config))
    for victim in (1, 0):
        before = newest_step(config)
        processes = start_two(path, **job)
        while newest_step(config) <= before and all(process.poll() is None for process in processes):
            time.sleep(0.05)
        processes[victim].kill()
        killed, other = time.monotonic(), processes[1 - victim]
        _, said = other.communicate(timeout=100)
        assert other.returncode == 75, said
        assert re.search(f"error: process {victim} of 2.*: process {1 - victim} ends too", said), said
        assert time.monotonic() - killed < 30
        processes[victim].communicate()
    assert 0 < newest_step(config) < 120
    alone = tiny("name=peers", *settings, f"out={tmp_path / 'alone'}", f"data={config.data_dir}")
    shutil.copytree(config.run_dir, alone.run_dir)
    (alone_path := tmp_path / "alone.yaml").write_text(to_yaml(alone))
    runs = [start_two(path, **job), [start(alone_path, devices=4)]]
    for processes in runs:
        ends = [process.communicate(timeout=200) for process in processes]
        assert all(process.returncode == 0 for process in processes) and "going on from step" in ends[0][1], ends
    assert losses(config) == losses(expected)  # to the last bit
    np.testing.assert_allclose(losses(alone), losses(expected), rtol=1e-4)


HANGS = """
import time, rmft_jax.training.loop as loop
from rmft_jax.cli import main
left, put = [8], loop.put
def hang(*arguments):
    left[0] -= 1
    time.sleep(1000 * (left[0] < 0))
    return put(*arguments)
loop.put = hang
main()
"""


@pytest.mark.timeout(600)
def test_a_process_that_hangs_is_named_by_the_other(tiny, tmp_path):
    """It is alive, and its thread says so: but it is a dispatch behind."""
    config = tiny("name=hanging", "training.steps=60", "checkpoint.count=1", "mesh.replica=2", "mesh.fsdp=2")
    (path := tmp_path / "config.yaml").write_text(to_yaml(config))
    job = {"RMFT_PEER_TIMEOUT": "5", **kept_programs(tmp_path)}
    assert [process.wait(200) for process in start_two(path, **job)] == [0, 0]  # keeps the programs: neither compiles long
    shutil.rmtree(config.run_dir)
    waiting, hanging = start_two(path, code=("", HANGS), **job)
    try:
        _, said = waiting.communicate(timeout=200)
    finally:
        hanging.kill()
    assert waiting.returncode == 75, said
    assert re.search(r"error: process 1 of 2 on \S+ is stuck at dispatch 8, the others at ", said), said
    hanging.communicate()


def kept_programs(folder) -> dict[str, str]:
    """Return the environment in which compiled programs are kept and found again."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}  # fmt: skip


def newest_step(config) -> int:
    steps = [int(path.name) for path in (config.run_dir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


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


@pytest.fixture(scope="module")
def quartet(tiny, tmp_path_factory):
    """Return the settings of a run of 4 processes, and the losses of one process with 4 devices."""
    settings = ["training.steps=40", "training.log_every=1", "checkpoint.count=1", "checkpoint.every_steps=8",
                "model.layers=1", "mesh.replica=2", "mesh.fsdp=2"]  # fmt: skip
    config, folder = tiny("name=quartet_alone", *settings), tmp_path_factory.mktemp("quartet")
    (path := folder / "config.yaml").write_text(to_yaml(config))
    alone = start(path, devices=4)
    assert alone.wait(200) == 0, alone.communicate()
    return settings, losses(config)


def by_slurm(path, process: int, port: int, job: dict) -> subprocess.Popen:
    """Start one of 4 processes with what srun would tell it."""
    return start(path, devices=1, SLURM_JOB_ID=str(port - 61440), SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="4",
                 SLURM_PROCID=str(process), SLURM_LOCALID=str(process), SLURM_STEP_NUM_NODES="1", **job)  # fmt: skip


def by_address(path, process: int, port: int, job: dict) -> subprocess.Popen:
    """Start one of 4 processes that are told where they meet."""
    return start(path, devices=1, JAX_COORDINATOR_ADDRESS=f"localhost:{port}", JAX_NUM_PROCESSES="4",
                 JAX_PROCESS_ID=str(process), **job)  # fmt: skip


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("launch", [by_slurm, pytest.param(by_address, marks=pytest.mark.slow)])
def test_four_processes_train_as_one_also_when_one_of_them_is_lost(tiny, tmp_path, quartet, launch):
    """The three that are left name the fourth, and the same four commands go on from a checkpoint."""
    settings, alone = quartet
    config = tiny(f"name=quartet_{launch.__name__}", *settings)
    (path := tmp_path / "config.yaml").write_text(to_yaml(config))
    job = {"RMFT_PEER_TIMEOUT": "15", **kept_programs(tmp_path)}
    port = 61440 + os.getpid() % 4096
    processes = [launch(path, number, port, job) for number in range(4)]
    while not newest_step(config) and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    processes[2].kill()
    ends = [process.communicate(timeout=100) for process in processes]
    print(*(said for _, said in ends), sep="\n")  # an assertion's message is cut off
    assert [process.returncode for process in processes] == [75, 75, -9, 75]
    for number in (0, 1, 3):
        assert re.search(f"error: process 2 of 4.*: process {number} ends too", ends[number][1]), ends[number]
    assert newest_step(config) < 40
    processes = [launch(path, number, port, job) for number in range(4)]
    ends = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, ends
    assert re.search(r"^\[0/4 \S+\]   going on from step \d+$", ends[0][1], re.MULTILINE)
    assert not any("run quartet" in said for _, said in ends[1:])  # process 0 speaks for all
    np.testing.assert_allclose(losses(config), alone, rtol=1e-5)


def test_processes_that_wait_in_vain_say_for_whom(tiny, tmp_path):
    (path := tmp_path / "config.yaml").write_text(to_yaml(tiny("name=in_vain", "mesh.replica=4")))
    port = 61440 + (os.getpid() + 1) % 4096
    processes = [by_slurm(path, number, port, {"RMFT_JOIN_TIMEOUT": "8"}) for number in (0, 3)]
    for process in processes:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 75
        assert re.fullmatch(r"error: processes 1, 2 of 4 have not come to localhost:.*start all of them again\n", said), said
