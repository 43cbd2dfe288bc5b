"""Data and runs in an object store: gs://, played by a server on this machine."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from rmft_jax.config import to_yaml
from rmft_jax.errors import UserError
from rmft_jax.files import LineFile, read_json, read_lines, whole_folder, write_json
from rmft_jax.paths import as_path, is_remote, local_copy, upload
from rmft_jax.training.loop import train

pytest.importorskip("gcsfs")
STORE = Path(__file__).parent / "pods" / "store.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Start the server; return what programs must be told of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, STORE, str(port), "bucket"], stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}"
    for _ in range(300):
        try:
            socket.create_connection(("localhost", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    told = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_CLOUD_PROJECT": "none"}
    yield told | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    server.kill()
    server.wait()


@pytest.fixture
def bucket(store, monkeypatch):
    """Have this process use it; return the path of the bucket."""
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    return as_path("gs://bucket")


def test_paths_of_stores_are_told_apart():
    assert as_path("a/b") == Path("a/b") and not is_remote(as_path("a/b"))
    assert str(as_path("gs://bucket/x") / "y") == "gs://bucket/x/y" and is_remote(as_path("gs://bucket/x"))
    with pytest.raises(UserError, match="ftp://x/y is in no store that is known"):
        as_path("ftp://x/y")


def test_a_store_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"needs the package s3fs: pip install 'rmft-jax\[s3\]'"):
        as_path("s3://bucket/x")


def test_a_run_in_s3_is_refused_before_anything_is_done(tiny):
    with pytest.raises(UserError, match="orbax cannot save checkpoints in s3://; train with out=gs://"):
        train(dataclasses.replace(tiny(), out="s3://bucket/run", data="/nowhere"))


def test_files_in_a_store(bucket):
    write_json(bucket / "a" / "b.json", {"x": 1})
    assert read_json(bucket / "a" / "b.json", "it", "mend it") == {"x": 1}
    with pytest.raises(UserError, match=r"it gs://bucket/no.json cannot be read \(.*\): mend it"):
        read_json(bucket / "no.json", "it", "mend it")
    lines = LineFile(bucket / "lines.jsonl", [1, 2])
    lines.add(3, 4)
    assert read_lines(bucket / "lines.jsonl") == [1, 2]  # not yet
    lines.flush()
    assert read_lines(bucket / "lines.jsonl") == [1, 2, 3, 4]


def test_a_folder_appears_whole_or_not_at_all(bucket):
    with pytest.raises(RuntimeError), whole_folder(bucket / "never") as partial:
        partial.mkdir()
        (partial / "x").write_text("1")
        raise RuntimeError
    assert not (bucket / "never").exists()
    with whole_folder(bucket / "data") as partial:
        (partial / "below").mkdir(parents=True)
        (partial / "below" / "x").write_text("1")
        (partial / "manifest.json").write_text("{}")
    copy = local_copy(bucket / "data")
    assert not is_remote(copy) and (copy / "below" / "x").read_text() == "1" and copy.stat().st_mode & 0o77 == 0
    assert local_copy(bucket / "data") == copy
    (bucket / "data" / "below" / "x").write_text("2")
    (bucket / "data" / "manifest.json").write_text('{"another": 1}')
    assert (local_copy(bucket / "data") / "below" / "x").read_text() == "2"
    assert local_copy(Path("here")) == Path("here")


def test_a_store_that_does_not_answer_is_one_line(monkeypatch, bucket):
    def fails(*args):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(type(bucket), "write_bytes", fails)
    with pytest.raises(UserError, match=r"^gs://bucket/x cannot be reached \(no route\): check the name, your rights"):
        write_json(bucket / "x", 1)


def untimed(path):
    timed = ("tokens_per_second", "input_wait_pct", "goodput_pct")
    return [{name: value for name, value in record.items() if name not in timed} for record in read_lines(path)]


@pytest.mark.timeout(400)
def test_a_run_in_a_store_is_killed_and_goes_on_to_what_a_run_on_a_disk_comes_to(tiny, tmp_path, store, bucket):
    upload(tiny().data_dir, bucket / "run" / "data")
    settings = ["training.steps=30", "training.log_every=5", "checkpoint.count=1", "checkpoint.every_steps=10", "name=it",
                "model.layers=1", "tracker.enabled=true"]  # fmt: skip
    on_disk = tiny(*settings)
    told = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}  # fmt: skip
    (path := tmp_path / "config.yaml").write_text(to_yaml(on_disk))

    def start(*overrides):
        command = [sys.executable, "-c", "from rmft_jax.cli import main; main()", "train", str(path), *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | store | told, **pipes)

    assert start().wait(200) == 0
    run, process = bucket / "run" / "runs" / "it", start("out=gs://bucket/run")
    whole = f"{store['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o?prefix=run/runs/it/checkpoints/10/commit_success"
    while process.poll() is None and b"storage#object\"" not in urllib.request.urlopen(whole).read():
        time.sleep(0.2)
    process.kill()
    assert process.wait() == -9
    process = start("out=gs://bucket/run")
    said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said[0] == "gs://bucket/run/runs/it\n" and "going on from step" in said[1]
    for name in ("metrics.jsonl", "memorization.jsonl"):
        assert untimed(run / name) == untimed(on_disk.run_dir / name)
    scores = [json.loads((folder / "evaluation.json").read_bytes()) for folder in (run, on_disk.run_dir)]
    assert scores[0] == scores[1]
    shutil.rmtree(on_disk.run_dir)
