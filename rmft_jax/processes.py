"""The processes of one run: how each finds out which one it is, meets the others, and waits for them no longer than said."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from rmft_jax.errors import PeersMissing, UserError
from rmft_jax.progress import speak_as

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PORT = 8476  # of the start, where the launcher names none
_barriers: Counter = Counter()


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process among those of a run.

    by: what started it. address: host:port at which process 0 is met. processes: how many there are. process: its number.
    local_devices: which of the accelerators that it sees are its own, None = all.
    """

    by: str
    address: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Return how this process was started, None where it is alone. TPU pods are left to JAX, see `join_processes`.

    Looked at are, in this order: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; what SLURM's `srun` sets;
    what Open MPI's `mpirun` sets; RMFT_JOBSET and RMFT_JOBSET_PROCESSES of tpu_scripts/gke.sh on GPU nodes.
    Raises UserError when a part is missing, or contradicts another one.
    """
    for look in (_explicit, _slurm, _open_mpi, _jobset):
        if launch := look(environ):
            if not 0 <= launch.process < launch.processes:
                raise UserError(f"by {launch.by} this is process {launch.process} of {launch.processes}: number them from 0")
            return launch if launch.processes > 1 else None
    return None


def join_processes() -> Launch | None:
    """Meet the other processes of the run, where this is one of several; return which one it is.

    It must be called before JAX touches a device. Raises UserError as `find_launch` does, PeersMissing with the numbers of
    those that have not come within RMFT_JOIN_TIMEOUT seconds (300).
    """
    seconds = join_timeout()
    launch = find_launch() or _tpu(seconds)
    if launch is None:
        return None
    speak_as(launch.process, launch.processes)
    meet(launch, seconds)
    local = launch.local_devices and list(launch.local_devices)
    try:
        jax.distributed.initialize(
            launch.address, launch.processes, launch.process, local, cluster_detection_method="deactivate",
            initialization_timeout=int(seconds),
        )  # fmt: skip
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"process {launch.process} of {launch.processes} cannot join {launch.address} ({why})") from None
    return launch


def join_timeout() -> float:
    """Return for how many seconds processes wait for each other to come: RMFT_JOIN_TIMEOUT, else 300.

    Raises UserError unless it is a number from 1 on.
    """
    told = os.environ.get("RMFT_JOIN_TIMEOUT", "300")
    if not re.fullmatch(r"[1-9]\d{0,5}(\.\d+)?", told):
        raise UserError(f"RMFT_JOIN_TIMEOUT is {told!r}: set it to seconds, 1 or more")
    return float(told)


def meet(launch: Launch, seconds: float) -> None:
    """Wait until all processes of a run have come: each tells process 0 its number and host; it answers who is missing.

    JAX itself would end the process with a stack trace that names nobody. Raises PeersMissing when they have not all come in
    time, UserError when two have the same number or the port is taken.
    """
    deadline = time.monotonic() + seconds
    said = _gather(launch, deadline) if launch.process == 0 else _report(launch, deadline)
    if said != "all":
        kind, _, said = said.partition(" ")
        raise (UserError if kind == "twice" else PeersMissing)(said)


def barrier(name: str, seconds: float | None = None) -> None:
    """Wait until every process of the run is here, so many seconds at most; RMFT_JOIN_TIMEOUT unless said.

    Raises PeersMissing with the numbers of those that are not. With one process nothing is done.
    """
    count = jax.process_count()
    if count == 1:
        return
    from jax._src import distributed  # there is no public way to the service

    client: Any = distributed.global_state.client
    seconds = seconds or join_timeout()
    _barriers[name] += 1
    place = f"rmft_jax/barriers/{name}/{_barriers[name]}"
    client.key_value_set(f"{place}/{jax.process_index()}", socket.gethostname())
    try:
        client.wait_at_barrier(place, int(1000 * seconds))
    except jax.errors.JaxRuntimeError:
        here = {int(key.rsplit("/", 1)[1]): host for key, host in client.key_value_dir_get(place)}
        raise PeersMissing(_missing(here, count, f"have not come to '{name}'", seconds)) from None


def _explicit(environ: Mapping[str, str]) -> Launch | None:
    address, *numbers = (environ.get(name, "") for name in _EXPLICIT)
    if not any((address, *numbers)):
        return None
    if not re.fullmatch(r".+:\d{1,5}", address) or not all(number.isdigit() for number in numbers):
        raise UserError(f"of {', '.join(_EXPLICIT)} not all are set, or not to host:port and numbers: set each, or none")
    processes, process = map(int, numbers)
    return Launch("JAX_PROCESS_ID", address, processes, process)


def _slurm(environ: Mapping[str, str]) -> Launch | None:
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_PROCID" not in environ:
        return None  # not started by srun
    job, process, local = (int(environ[name]) for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"))
    count = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", 1))
    address = f"{first_host(environ['SLURM_STEP_NODELIST'])}:{61440 + job % 4096}"  # jobs on a node have different ports
    return Launch("SLURM", address, count, process, _own(local, -(-count // nodes), environ))


def _open_mpi(environ: Mapping[str, str]) -> Launch | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    count, process, local, here = (int(environ[f"OMPI_COMM_WORLD_{name}"]) for name in names)
    uri = environ.get("OMPI_MCA_orte_hnp_uri") or environ.get("PMIX_SERVER_URI41", "")  # of version 4, of version 5
    found = re.search(r"tcp4?://([^,:;]+)|tcp6://\[?([^,\];]+)", uri)
    if count > 1 and not found:
        raise UserError(f"Open MPI does not say where process 0 is: set {', '.join(_EXPLICIT)} (mpirun -x) instead")
    host = (found[1] or f"[{found[2]}]") if found else "localhost"
    return Launch("Open MPI", f"{host}:{_PORT}", count, process, _own(local, here, environ))


def _jobset(environ: Mapping[str, str]) -> Launch | None:
    if "RMFT_JOBSET" not in environ or "TPU_WORKER_HOSTNAMES" in environ:
        return None
    name, count = environ["RMFT_JOBSET"], int(environ["RMFT_JOBSET_PROCESSES"])
    return Launch("JobSet", f"{name}-slice-0-0.{name}:{_PORT}", count, int(environ.get("JOB_COMPLETION_INDEX", 0)))


def _tpu(seconds: float) -> Launch | None:
    """Return what JAX finds out of a TPU pod, by environment or metadata; None anywhere else."""
    from jax._src.clusters import cloud_tpu_cluster as tpu

    cluster = next((kind for kind in (tpu.GkeTpuCluster, tpu.GceTpuCluster) if kind.is_env_present()), None)
    if cluster is None or (count := cluster.get_process_count()) == 1:
        return None
    return Launch("Cloud TPU", cluster.get_coordinator_address(int(seconds), None), count, cluster.get_process_id())


def first_host(nodes: str) -> str:
    """Return the first host of a list as SLURM writes it: a, a,b, node[001-004,7],b or rack[1-2]-x."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _own(local: int, here: int, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return which of the accelerators of a machine belong to the process `local` of the `here` on it.

    All where it is alone, or sees but one, as under `srun --gpus-per-task=1`; else an equal share, in order.
    """
    seen = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES")
    count = len(seen.split(",")) if seen else int(environ.get("SLURM_GPUS_ON_NODE") or here)
    if here == 1 or count == 1:
        return None
    if count % here:
        raise UserError(f"{here} processes of a machine cannot share its {count} GPUs: start one for each GPU or node")
    share = count // here
    return tuple(range(local * share, (local + 1) * share))


def _gather(launch: Launch, deadline: float) -> str:
    """Take the reports of all others, as process 0; answer each of them. Returns what is answered."""
    seconds = deadline - time.monotonic()
    port, here, waiting = int(launch.address.rsplit(":", 1)[1]), {0: socket.gethostname()}, []
    both: dict[str, Any] = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        server = socket.create_server(("", port), backlog=launch.processes, **both)
    except OSError as error:
        raise UserError(f"process 0 cannot listen on port {port} ({error.strerror}): take another one") from None
    answer = "all"
    with server:
        while len(here) < launch.processes and answer == "all":
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                number, host = connection.makefile().readline().split()
                process = int(number)
            except TimeoutError:
                if time.monotonic() >= deadline:
                    answer = "missing " + _missing(here, launch.processes, f"have not come to {launch.address}", seconds)
                continue
            except (OSError, ValueError):
                continue  # somebody else
            waiting.append(connection)
            if process in here:
                answer = f"twice process {process} was started twice, on {here[process]} and {host}: number each once"
            here[process] = host
        for connection in waiting:
            try:
                connection.sendall(f"{answer}\n".encode())
                connection.recv(1)  # it hangs up first, so that the port is free for JAX at once
            except OSError:
                pass
            connection.close()
    return answer


def _report(launch: Launch, deadline: float) -> str:
    """Tell process 0 that this one is here; return its answer."""
    seconds = deadline - time.monotonic()
    host, port = launch.address.rsplit(":", 1)
    while True:
        try:
            left = max(1, deadline - time.monotonic())
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as line:
                line.sendall(f"{launch.process} {socket.gethostname()}\n".encode())
                line.settimeout(left + 10)
                if answer := line.makefile().readline().strip():
                    return answer
        except OSError:
            pass
        if time.monotonic() >= deadline:
            return f"missing process 0 of {launch.processes} has not answered at {launch.address} for {seconds:.0f} s"
        time.sleep(0.2)


def _missing(here: Mapping[int, str], count: int, what: str, seconds: float) -> str:
    """Return the sentence that names those of `count` processes that are not here."""
    numbers = [process for process in range(count) if process not in here]
    named = ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")
    present = ", ".join(f"{process} on {host}" for process, host in sorted(here.items())[:8])
    noun = "process" if len(numbers) == 1 else "processes"
    return f"{noun} {named} of {count} {what} within {seconds:.0f} s; there are {present}{' ...' if len(here) > 8 else ''}"
