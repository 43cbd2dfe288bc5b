"""The devices of this process: CPU cores made devices of their own, and rows spread over all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rmft_jax.config import Config
from rmft_jax.errors import UserError

# Set by launchers that jax.distributed knows, where more than one process runs.
_CLUSTERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")

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


def join_processes() -> None:
    """Start the processes of one run up, where this is one of several: on TPU pods, under Slurm or Open MPI, or as told.

    Told by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. It must be called before
    JAX touches a device. Raises UserError when only a part of these is set, or the others do not answer.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (os.environ.get(name, "") for name in names)
    if not any((address, *numbers)):
        if any(name in os.environ for name in _CLUSTERS):
            jax.distributed.initialize()
        return
    if not address or not all(number.isdigit() for number in numbers):
        raise UserError(f"of {', '.join(names)} not all are set, or not to numbers: set each of them, or none")
    processes, process = map(int, numbers)
    if process >= processes:
        raise UserError(f"JAX_PROCESS_ID {process} is not below JAX_NUM_PROCESSES {processes}: number processes from 0")
    if processes == 1:
        return
    try:
        jax.distributed.initialize(address, processes, process)
    except RuntimeError as error:
        raise UserError(f"process {process} of {processes} cannot join {address} ({str(error).splitlines()[0]})") from None


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("JAX_NUM_PROCESSES") or 1)
    count = devices_for(config, cores * processes) if config else cores
    jax.config.update("jax_num_cpu_devices", max(1, count // processes))


def fake_devices(count: int) -> list[jax.Device]:
    """Return so many CPU devices, which share whatever cores there are: enough to compile for a mesh.

    It must be called before JAX touches a device, unless there are as many already. Raises UserError if there are not.
    """
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


def rows_for(rows: int) -> int:
    """Return the least number from `rows` on that the devices of this process can share equally."""
    count = jax.local_device_count()
    return -(-rows // count) * count


def _line() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("rows",))
