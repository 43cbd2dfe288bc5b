"""`rmft doctor`: what this machine and this installation can do, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from rmft_jax.cores import cores
from rmft_jax.progress import say

SCHEMA = 1
PACKAGE = "rmft-jax"
# What each extra is for; its packages are those that the installed package names itself.
EXTRAS = {
    "cuda": "training on NVIDIA GPUs",
    "tpu": "training on TPUs",
    "re2": "finding personal data many times faster, with the same result",
    "gguf": "`rmft convert import` of .gguf files",
    "data": "sources in Parquet and .zst, tables in Parquet (`rmft report --parquet`)",
    "presidio": "person names as a type of personal data",
    "studies": "studies on images",
    "datasketch": "`dedup.minhash=datasketch`: near-duplicates as published pipelines find them",
    "dp": "DP-SGD",
    "gcs": "data and runs in gs://",
    "s3": "data and runs in s3://",
    "beam": "`rmft prepare --runner beam`, in an environment of its own",
    "wandb": "metrics in Weights & Biases",
    "bench": "`rmft bench` against other libraries",
}
# Where the kernel puts a device of the kind -> the extra that brings JAX's plug-in for it.
_ACCELERATORS = {"cuda": ("/dev/nvidia0", "/proc/driver/nvidia/version"), "tpu": ("/dev/accel0",)}
_SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "CUDA_VISIBLE_DEVICES", "TMPDIR")


def diagnose() -> dict[str, Any]:
    """Look at the installation, the devices and the disk, and try out what a run needs.

    Returns schema, machine (system, python, cores, memory_bytes, free_disk_bytes, settings), versions (name -> installed, ""
    = not installed), devices (platform, kind, count, memory_bytes of each, peak_flops or None), checks (each name, status:
    ok | missing | broken, detail, mend), and healthy, whether nothing is broken. Missing is what can be done without.
    """
    say("doctor: trying what a run needs, a few seconds")
    requirements = _requirements()
    checks = [_try(name, check, mend) for name, (check, mend) in _TRIALS.items()]
    works = checks[0]["status"] == "ok"
    checks = [_python(), *_versions(requirements), *checks, *_extras(requirements)]
    devices = _devices() if works else {}
    if devices.get("platform") == "cpu":
        checks += _unused_accelerators()
    return {
        "schema": SCHEMA,
        "machine": _machine(),
        "versions": {name: _version(name) for name in (PACKAGE, *(r.name for r in requirements[""]))},
        "devices": devices,
        "checks": checks,
        "healthy": all(check["status"] != "broken" for check in checks),
    }


def describe(found: dict[str, Any]) -> str:
    """Return what `diagnose` found as lines to read."""
    machine, devices, versions = found["machine"], found["devices"], found["versions"]
    gigabytes = lambda size: f"{size / 1e9:.1f} GB"  # noqa: E731
    lines = [
        f"rmft-jax {versions[PACKAGE] or 'not installed'}, jax {versions.get('jax') or 'not installed'}, "
        f"flax {versions.get('flax') or 'not installed'}, Python {machine['python']}, {machine['system']}",
        f"{machine['cores']} cores, {gigabytes(machine['memory_bytes'])} memory, "
        f"{gigabytes(machine['free_disk_bytes'])} free on this disk",
    ]
    if devices:
        peak = f", peak {devices['peak_flops'] / 1e12:.0f} TFLOP/s in bfloat16" if devices["peak_flops"] else ""
        lines.append(f"devices: {devices['count']} x {devices['kind']} ({devices['platform']}), "
                     f"{gigabytes(devices['memory_bytes'])} each{peak}")  # fmt: skip
    lines += [f"set in the environment: {name}={value}" for name, value in machine["settings"].items()]
    for check in found["checks"]:
        mend = f" -> {check['mend']}" if check["status"] != "ok" else ""
        lines.append(f"{check['status']:8}{check['name']}: {check['detail']}{mend}")
    return "\n".join(lines)


def _check(name: str, status: str, detail: str, mend: str = "") -> dict[str, str]:
    return {"name": name, "status": status, "detail": detail, "mend": mend}


def _try(name: str, check: Callable[[], str], mend: str) -> dict[str, str]:
    try:
        return _check(name, "ok", check())
    except Exception as error:  # noqa: BLE001  whatever it is, it is what the user has to know
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _check(name, "broken", f"{type(error).__name__}: {why[:200]}", mend)


def _requirements() -> dict[str, list[Requirement]]:
    """Return what the installed package asks for, by extra, "" = always."""
    try:
        named = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        named = []
    applies = lambda r, extra: r.marker is None if not extra else bool(r.marker and r.marker.evaluate({"extra": extra}))  # noqa: E731
    return {extra: [r for r in named if applies(r, extra)] for extra in ("", *EXTRAS)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _python() -> dict[str, str]:
    status = "ok" if sys.version_info >= (3, 11) else "broken"
    return _check("Python", status, platform.python_version(), "install Python 3.11 or newer and make a new environment")


def _versions(requirements: dict[str, list[Requirement]]) -> list[dict[str, str]]:
    """Return one check of all that must be there, and one for each package that is absent or out of its bounds."""
    if not _version(PACKAGE):
        return [_check("packages", "broken", f"{PACKAGE} is not installed", "pip install -e . in a clone")]
    wrong = [r for r in requirements[""] if not r.specifier.contains(_version(r.name) or "0", prereleases=True)]
    if not wrong:
        return [_check("packages", "ok", f"all {len(requirements[''])} at versions that this release asks for")]
    return [
        _check(r.name, "broken", f"{_version(r.name) or 'not installed'}, needed is {r.specifier}", f"pip install '{r}'")
        for r in wrong
    ]


def _extras(requirements: dict[str, list[Requirement]]) -> list[dict[str, str]]:
    checks = []
    for extra, purpose in EXTRAS.items():
        absent = {r.name for r in requirements[extra] if not r.extras and not _version(r.name)}
        lacking = sorted(absent) or ([] if requirements[extra] and _plugin(extra) else ["plug-in"])
        what = f"{purpose} (lacks {', '.join(lacking)})" if lacking else purpose
        status = "missing" if lacking else "ok"
        checks.append(_check(f"[{extra}]", status, what, f"pip install 'rmft-jax[{extra}]'"))
    return checks


def _plugin(extra: str) -> bool:
    names = {"cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "tpu": ("libtpu",)}.get(extra)
    return names is None or any(map(_version, names))


def _unused_accelerators() -> list[dict[str, str]]:
    return [
        _check(extra.upper(), "missing", "there is such a device, but JAX computes on the CPU",
               f"pip install 'rmft-jax[{extra}]', and see that JAX_PLATFORMS is not set to cpu")
        for extra, places in _ACCELERATORS.items() if any(Path(place).exists() for place in places)
    ]  # fmt: skip


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "settings": {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)},
    }


def _devices() -> dict[str, Any]:
    import jax

    from rmft_jax.devices import device_memory, peak_flops

    device = jax.local_devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "memory_bytes": device_memory(),
        "peak_flops": peak_flops(),
    }


def _compiles() -> str:
    import jax
    import jax.numpy as jnp

    found = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((64, 64))))
    if found != 64.0**3:
        raise ArithmeticError(f"a matrix product came out as {found}, not as {64.0**3}")
    return f"a program was compiled and run on {jax.devices()[0].device_kind}"


def _masks() -> str:
    """Splice a row of tokens on the device and in plain Python."""
    import jax
    import numpy as np

    from rmft_jax.kernels import SurrogateBank, splice, splice_reference

    zeros = np.zeros(2, np.int32)
    fields = dict.fromkeys(SurrogateBank._fields, zeros) | {
        "tokens": np.array([7, 8, 9], np.int32), "begins": np.array([0, 1], np.int32), "lengths": np.array([1, 2], np.int32),
        "first": zeros, "counts": np.array([2, 2], np.int32),
    }  # fmt: skip
    bank = SurrogateBank(**{name: fields[name] for name in SurrogateBank._fields})
    row = {
        "tokens": np.arange(1, 6, dtype=np.int32), "valid": np.ones(5, bool), "kind": zeros,
        "component": np.array([0, 1, 1, 0, 0], np.int32), "begin": np.array([-1, 1], np.int32),
        "replaced": np.array([False, True]), "row": np.array([0, 1], np.int32),
    }  # fmt: skip
    ours = np.asarray(jax.jit(lambda row, bank: splice(**row, bank=bank, length=5).tokens)(row, bank)).tolist()
    if ours != splice_reference(**row, bank=bank, length=5):
        raise ArithmeticError(f"the masking kernel gave {ours}")
    return "the kernel agrees with plain Python on this device"


def _finds() -> str:
    from rmft_jax.pii.detector import detect
    from rmft_jax.pii.windows import default_engine

    if [span.value for span in detect("Write to Ada.King@Example.org or call.")] != ["ada.king@example.org"]:
        raise ValueError("an e-mail address was not found")
    return f"searched with {default_engine()}"


def _stores() -> str:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    records = [b"one", b"two", bytes(1000)]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "test.array_record")
        writer = ArrayRecordWriter(path, "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        reader = ArrayRecordReader(path)
        back = reader.read_all()
        reader.close()
    if back != records:
        raise OSError("what was written is not what was read")
    return f"an ArrayRecord file was written and read in {tempfile.gettempdir()}"


def _saves() -> str:
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", {"a": jnp.arange(4.0)})
        checkpointer.wait_until_finished()
        back = checkpointer.restore(Path(folder) / "state")
    if back["a"].tolist() != [0.0, 1.0, 2.0, 3.0]:
        raise OSError("what was saved is not what was restored")
    return "a checkpoint was written and read"


_AGAIN = "make a new environment and install the clone again: pip install -e ."
_TRIALS: dict[str, tuple[Callable[[], str], str]] = {
    "JAX": (_compiles, "see that jax, jaxlib and the plug-in have one version; or " + _AGAIN),
    "masking": (_masks, _AGAIN),
    "detection": (_finds, _AGAIN),
    "data sets": (_stores, "see that TMPDIR can be written; or " + _AGAIN),
    "checkpoints": (_saves, "see that TMPDIR can be written; or " + _AGAIN),
}
