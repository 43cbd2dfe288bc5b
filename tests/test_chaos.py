"""Runs that are killed at any moment, and checkpoints that are damaged in any way: nothing is lost, nothing wrong is loaded.

`make chaos` has the long forms.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmft_jax import cli
from rmft_jax.config import to_yaml
from rmft_jax.kernels import fingerprint
from rmft_jax.training.checkpoints import Checkpoints
from rmft_jax.training.loop import train

RMFT = [sys.executable, "-c", "from rmft_jax.cli import main; main()"]
RUN = [
    "source.limit=120", "tokenizer.vocab_size=400", "masking.policy=cap", "tracker.enabled=true", "model.layers=1",
    "model.width=32", "model.heads=2", "training.batch_size=8", "training.sequence_length=64", "training.accumulation=2",
    "training.log_every=5", "training.steps=120", "checkpoint.count=3", "checkpoint.every_steps=9", "checkpoint.keep_last=2",
]  # fmt: skip
TIMED = ("tokens_per_second", "input_wait_pct", "goodput_pct")


def command(verb, config, cache, file_kib="unlimited", memory_kib="unlimited"):
    """Start `rmft VERB CONFIG` on one device, in a process of its own that finds compiled programs of the ones before.

    file_kib: no file may become larger. memory_kib: of addresses that it may use.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    env |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    with (config.parent / "log.txt").open("a") as log:
        limited = ["bash", "-c", f'ulimit -f {file_kib} -v {memory_kib}; exec "$@"', "bash"]
        return subprocess.Popen([*limited, *RMFT, verb, str(config)], env=env, stdout=log, stderr=log)


def finish(config, cache):
    for verb in ("prepare", "train"):
        assert command(verb, config, cache).wait(200) == 0, (config.parent / "log.txt").read_text()[-2000:]


def everything(run):
    """Return all that a run's newest checkpoint holds, byte by byte, and what it says of its course."""
    checkpoints, step = Checkpoints.open(run)
    state = checkpoints.restore(step, shapes(checkpoints, step))
    lines = {}
    for name in ("metrics.jsonl", "memorization.jsonl"):
        records = map(json.loads, (run / name).read_text().splitlines())
        lines[name] = [{key: value for key, value in record.items() if key not in TIMED} for record in records]
    lines["evaluation.json"] = json.loads((run / "evaluation.json").read_text())
    return step, state, lines


def shapes(checkpoints, step):
    """Return the target to restore all of a checkpoint onto the first device."""
    saved = checkpoints._manager.item_metadata(step)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    trees = [dict(saved[item].tree) for item in ("params", "optimizer", "progress", "guard", "tracker")]
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)  # noqa: E731
    return jax.tree.map(shape, {name: tree[name] for tree in trees for name in tree})


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[2] == other[2]
    assert same(one[1], other[1])


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Return how to make a config for a new place, the folder of compiled programs, and an undisturbed run."""
    cache = tmp_path_factory.mktemp("programs")

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        config = tiny(*RUN, f"out={folder / 'out'}", "data=", "name=run")
        path = folder / "config.yaml"
        path.write_text(to_yaml(config))
        return config, path

    config, path = make("undisturbed")
    finish(path, cache)
    return make, cache, config.run_dir


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_is_the_undisturbed_run(undisturbed, kills):
    make, cache, expected = undisturbed
    expected, rng, done = everything(expected), random.Random(7), 0
    kinds = ["prepare", "steps", "saving"]
    while done < kills:
        config, path = make("killed")
        for kind in (kinds * kills)[done % 3 :]:
            verb = "prepare" if kind == "prepare" else "train"
            if verb == "train" and command("prepare", path, cache).wait(200) != 0:
                pytest.fail((path.parent / "log.txt").read_text()[-2000:])
            process = command(verb, path, cache)
            wait_for(kind, config, rng, process)
            process.kill()
            if process.wait() != -signal.SIGKILL:
                if verb == "train":
                    break  # it was done before
                continue
            done += 1
            if done >= kills:
                break
        finish(path, cache)
        assert_same(everything(config.run_dir), expected)
        shutil.rmtree(path.parent)


def wait_for(kind, config, rng, process):
    """Wait for a random moment of a kind, or the end of the process."""
    signs = {
        "prepare": lambda: config.data_dir.parent.exists(),
        "steps": lambda: (config.run_dir / "metrics.jsonl").exists(),
        "saving": lambda: any(config.run_dir.glob("checkpoints/*tmp*")),
    }
    while process.poll() is None and not signs[kind]():
        time.sleep(0.001)
    time.sleep(rng.random() * {"prepare": 2.0, "steps": 1.5, "saving": 0.02}[kind])


def test_a_run_that_is_told_to_stop_saves_and_goes_on(undisturbed):
    make, cache, expected = undisturbed
    config, path = make("told")
    assert command("prepare", path, cache).wait(200) == 0
    process = command("train", path, cache)
    while process.poll() is None and not (config.run_dir / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 143
    said = (path.parent / "log.txt").read_text()
    step = int(said.split(" is saved at step ")[1].split()[0])
    assert step in Checkpoints.open(config.run_dir)[0].steps()
    finish(path, cache)
    (step, state, lines), (_, whole, its_lines) = everything(config.run_dir), everything(expected)
    epochs = lambda lines: [line for line in lines["memorization.jsonl"] if line["kind"] == "epoch"]  # noqa: E731
    assert_same((step, state, epochs(lines)), (step, whole, epochs(its_lines)))


DAMAGES = {
    "deleted": lambda file, rng: file.unlink(),
    "truncated": lambda file, rng: os.truncate(file, rng.randrange(file.stat().st_size)),
    "flipped": lambda file, rng: flip(file, rng),
}


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # answers to reads that were given up
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("count", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_it_used(tiny, tmp_path, capsys, count):
    settings = ["tracker.enabled=true", "training.steps=12", "checkpoint.count=1", "checkpoint.every_steps=4"]
    settings += ["checkpoint.keep_last=3", "name=damaged", f"data={tiny().data_dir}"]
    whole = train(tiny(*settings, f"out={tmp_path / 'whole'}"))
    expected = everything(whole)
    shutil.rmtree(whole / "checkpoints" / "12")  # as if it had died after step 8
    target = shapes(Checkpoints.open(whole)[0], 8)
    states = {step: Checkpoints.open(whole)[0].restore(step, target) for step in (4, 8)}
    files = sorted(path for path in (whole / "checkpoints" / "8").rglob("*") if path.is_file() and path.stat().st_size)
    numbers = max((path for path in files if path.parts[-3:-1] == ("optimizer", "d")), key=lambda path: path.stat().st_size)
    rng, found = random.Random(3), []
    for number in range(count):
        out = tmp_path / f"damaged{number}"
        shutil.copytree(tmp_path / "whole", out)
        run = out / whole.relative_to(tmp_path / "whole")
        chosen = numbers if number < 3 else rng.choice(files)
        kind, file = list(DAMAGES)[number % 3], chosen.relative_to(tmp_path / "whole")
        DAMAGES[kind](out / file, rng)
        checkpoints = Checkpoints(run / "checkpoints", keep_last=3)
        step, state = checkpoints.restore_newest(target)
        checkpoints.close()
        assert same(state, states[step]), (kind, file)
        said = capsys.readouterr().err
        assert (step == 4) == ("is damaged" in said) == (run / "damaged" / "8").exists(), (kind, file, said)
        if step == 4:
            found.append(out)
    print(f"{len(found)} of {count} were found out, the others harmless")
    assert len(found) >= 3
    assert_same(everything(train(tiny(*settings, f"out={found[0]}"))), expected)


def test_a_full_disk_is_one_line_and_leaves_what_is_there(undisturbed):
    make, cache, expected = undisturbed
    config, path = make("full")
    assert command("prepare", path, cache).wait(200) == 0
    process = command("train", path, cache)
    while process.poll() is None and not (config.run_dir / "checkpoints" / "9").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    steps = Checkpoints.open(config.run_dir)[0].steps()
    log = path.parent / "log.txt"
    log.unlink()
    assert command("train", path, cache, file_kib=64).wait(200) == 2  # less than the optimizer's state takes
    said = log.read_text().splitlines()
    assert re.fullmatch("error: a checkpoint cannot be written .*: make room, or .*those before it are whole.*", said[-1])
    assert not any("Traceback" in line for line in said), "\n".join(said)
    assert Checkpoints.open(config.run_dir)[0].steps() == steps
    finish(path, cache)
    assert_same(everything(config.run_dir), everything(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_fingerprint_knows_every_bit_and_no_mesh(dtype):
    x = jnp.floor(jax.random.uniform(jax.random.key(0), (16, 6)) * (2 if dtype == "bool" else 100)).astype(dtype)
    known = fingerprint(x)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))
    np.testing.assert_array_equal(jax.jit(fingerprint)(split), known)
    data = np.array(x)
    changed = {tuple(known.tolist())}
    for place in range(data.size):
        other = data.copy()
        raw = other.reshape(-1).view(np.uint8)
        raw[place * data.itemsize + place % data.itemsize] ^= 1 if dtype == "bool" else 1 << place % 8
        changed.add(tuple(jax.jit(fingerprint)(jnp.asarray(other)).tolist()))
    assert len(changed) == data.size + 1
    assert (fingerprint(x[::-1]) != known).all() and (fingerprint(x.reshape(6, 16).T) != known).any()


@pytest.mark.parametrize("said", ["RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.",
                                  "INTERNAL: Error dispatching computation: Out of memory allocating 8 bytes."])  # fmt: skip
def test_a_full_memory_is_known_by_what_xla_says(said):
    line = cli._fault_of_the_machine(jax.errors.JaxRuntimeError(said))
    assert line.startswith("out of memory (") and "lower training.batch_size" in line
    assert cli._fault_of_the_machine(jax.errors.JaxRuntimeError("INTERNAL: a fault of ours")) is None


@pytest.mark.slow
def test_a_full_memory_is_one_line(tiny, tmp_path):
    """Of a run that `rmft plan` takes for small enough, in a process that may have 6.5 GB."""
    large = ["model.width=768", "model.layers=6", "model.heads=12", "training.batch_size=8", "training.sequence_length=512"]
    config = tiny(*large, f"out={tmp_path / 'out'}", f"data={tiny().data_dir}", "training.steps=4", "checkpoint.count=1")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert command("train", path, tmp_path / "programs", memory_kib=6_500_000).wait(250) == 2
    said = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(r"error: out of memory \(.*\): lower training\.batch_size .*", said.splitlines()[-1]), said[-2000:]
    assert "Traceback" not in said
