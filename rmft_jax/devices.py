"""The devices of this process: CPU cores made devices of their own, and rows spread over all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rmft_jax.config import Config
from rmft_jax.cores import cores
from rmft_jax.errors import UserError
from rmft_jax.processes import find_launch

# What device kinds contain -> peak in bfloat16 without sparsity, FLOP/s, by the makers' data sheets. The first that fits.
_PEAK_FLOPS = {
    "h100 pcie": 756e12,
    "h100": 989.4e12,
    "h200": 989.4e12,
    "gh200": 989.4e12,
    "b200": 2250e12,
    "a100": 312e12,
    "l40s": 362e12,
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
    "tpu7": 2307e12,
}


def is_main() -> bool:
    """Return whether this process is the one that writes what all of them share."""
    return jax.process_index() == 0


def use_cores(config: Config | None = None) -> None:
    """Make a device of each CPU core, as far as the config's mesh and batch can be spread over them.

    One CPU device computes matrix products on all cores but most other operations on one; on two cores, two devices train
    1.35 times as fast and decode 1.6 times as fast. It must be called before JAX touches a device, changes nothing for other
    accelerators, and leaves a number of devices that XLA_FLAGS names alone.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    available = cores()
    processes = launch.processes if (launch := find_launch()) else 1
    count = devices_for(config, available * processes) if config else available
    jax.config.update("jax_num_cpu_devices", max(1, count // processes))


def fake_devices(count: int) -> list[jax.Device]:
    """Return so many CPU devices, which share whatever cores there are: enough to compile for a mesh.

    It must be called before JAX touches a device, unless there are as many already. Raises UserError if there are not.
    """
    if count > 1:  # XLA 0.10.2 for CPU aborts when it widens some sums of bfloat16; what is only compiled needs none of that
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_disable_hlo_passes=all-reduce-promotion".strip()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", count)
            jax.config.update("jax_platforms", "cpu")
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"there are {len(found)} CPU devices of the {count} needed: start a new process, without "
            f"xla_force_host_platform_device_count in XLA_FLAGS"
        )
    return found[:count]


def tpu_devices(chip: str, topology: str, slices: int = 1) -> list[jax.Device]:
    """Return the devices of TPU slices that are not there: enough to compile for them.

    Raises UserError when libtpu is missing, or there is no such slice.
    """
    if not re.fullmatch(r"\d+(x\d+)+", topology) or chip not in ("v5e", "v5p", "v6e"):
        raise UserError(f"topology {topology} of chip {chip or '(none)'}: write 16x16 of v5e or v6e, 8x8x8 of v5p")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{topology}", **several).devices)
    except Exception as error:
        why = str(error).splitlines()[0][:200] or type(error).__name__
        raise UserError(f"cannot compile for {chip} {topology} ({why}): pip install 'rmft-jax[tpu]', or name a slice "
                        f"that exists") from None  # fmt: skip


def device_memory() -> int:
    """Return the bytes that a device of this process may use; of CPUs, an equal share of the machine's memory."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return limit


def devices_for(config: Config, cores: int) -> int:
    """Return how many CPU devices to make: as many as a fixed mesh has, else the most of `cores` that split the batch."""
    mesh = config.mesh
    fixed = int(np.prod([size for size in dataclasses.astuple(mesh) if size > 0]))
    if -1 not in (mesh.replica, mesh.fsdp):
        return fixed
    one_row, rows = mesh.tensor * mesh.context, config.training.batch_size // config.training.accumulation
    fitting = (n for n in range(cores, 0, -1) if n % fixed == 0 and rows % (n // one_row) == 0)
    return next(fitting, fixed)


def peak_flops() -> float | None:
    """Return the peak of one device in bfloat16 floating-point operations a second, dense; None where it is not known."""
    kind = jax.devices()[0].device_kind.lower()
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in kind), None)


def keep_programs() -> None:
    """Keep compiled programs on disk for later runs, where compiling takes long: not on CPU.

    In JAX_COMPILATION_CACHE_DIR if set, else in the user's cache directory.
    """
    if jax.default_backend() != "cpu" and not getattr(jax.config, "jax_compilation_cache_dir", None):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "rmft_jax" / "programs"))


def everywhere() -> NamedSharding:
    """Return the sharding of arrays that each device of this process holds whole."""
    return NamedSharding(_line(), P())


def spread_rows(*arrays: np.ndarray) -> list[jax.Array]:
    """Put arrays on the devices of this process, an equal part of the rows on each.

    The number of rows must be a multiple of the number of devices, see `rows_for`.
    """
    return jax.device_put(list(arrays), NamedSharding(_line(), P("rows")))


def by_rows(function: Callable) -> Callable:
    """Return function(rows, shared) such that each device of this process computes the results of its part of the rows.

    rows: an array [N, ...], any N; shared: arrays that every device holds whole. What comes back has an axis of N first.
    """
    line, rows = _line(), P("rows")
    run = jax.jit(jax.shard_map(function, mesh=line, in_specs=(rows, P()), out_specs=rows, check_vma=False))

    def call(rows: np.ndarray, shared):
        more = rows_for(len(rows)) - len(rows)
        padded = np.pad(rows, ((0, more), *[(0, 0)] * (rows.ndim - 1)))
        return jax.tree.map(lambda x: x[: len(rows)], run(*spread_rows(padded), shared))

    return call


def rows_for(rows: int) -> int:
    """Return the least number from `rows` on that the devices of this process can share equally."""
    count = jax.local_device_count()
    return -(-rows // count) * count


def _line() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("rows",))
