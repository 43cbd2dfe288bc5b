"""How a process finds out which one of a run it is, and what it says when others do not come."""

import socket
import threading
import time

import pytest

from rmft_jax.errors import PeersMissing, UserError
from rmft_jax.processes import Launch, find_launch, first_host, meet

SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-10,12],x1", "SLURM_NTASKS": "12", "SLURM_PROCID": "5",
         "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "6", "SLURM_GPUS_ON_NODE": "8"}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
       "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
JOBSET = {"RMFT_JOBSET": "pod", "RMFT_JOBSET_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "[::1]:99", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, None),
        (EXPLICIT, Launch("JAX_PROCESS_ID", "[::1]:99", 3, 2)),
        (EXPLICIT | SLURM, Launch("JAX_PROCESS_ID", "[::1]:99", 3, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, Launch("SLURM", "node07:61441", 12, 5, (4, 5, 6, 7))),
        (SLURM | {"SLURM_STEP_NUM_NODES": "12"}, Launch("SLURM", "node07:61441", 12, 5)),  # one for each node: all GPUs
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Launch("SLURM", "node07:61441", 12, 5)),  # sees but its own
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}, None),  # in a job, but not by srun
        (MPI | URI, Launch("Open MPI", "10.96.0.1:8476", 4, 3, (1,))),
        (MPI | {"PMIX_SERVER_URI41": "prte.0;tcp6://[fe80::1]:34"}, Launch("Open MPI", "[fe80::1]:8476", 4, 3, (1,))),
        (JOBSET, Launch("JobSet", "pod-slice-0-0.pod:8476", 4, 2)),
        (JOBSET | {"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # JAX knows
    ],
)
def test_a_process_finds_out_which_one_it_is(environ, launch):
    assert find_launch(environ) == launch


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "not all are set"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host"}, "host:port"),
        (EXPLICIT | {"JAX_PROCESS_ID": "3"}, "process 3 of 3: number them from 0"),
        (SLURM | {"SLURM_GPUS_ON_NODE": "7"}, "cannot share its 7 GPUs"),
        (MPI, "Open MPI does not say"),
    ],
)
def test_what_does_not_fit_together_is_refused(environ, says):
    with pytest.raises(UserError, match=says):
        find_launch(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a-b2,b", "a-b2"), ("n[001-015],b", "n001"), ("n[3,7-9]", "n3"), ("rack[1-2]-x,b", "rack1-x")],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def together(processes, numbers, seconds):
    """Have those numbers of so many processes meet; return what each comes to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ends = {}

    def one(place, process):
        try:
            meet(Launch("a test", address, processes, process), seconds)
            ends[place] = "met"
        except (PeersMissing, UserError) as error:
            ends[place] = error

    threads = [threading.Thread(target=one, args=item) for item in enumerate(numbers)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # in that order
    for thread in threads:
        thread.join(timeout=30)
    return [ends[place] for place in range(len(numbers))]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 0, 1]])
def test_all_that_come_meet_in_any_order(order):
    assert together(4, order, 20) == ["met"] * 4


def test_those_that_do_not_come_are_named_by_all_others():
    for end in together(5, [0, 2, 3], 1):
        assert isinstance(end, PeersMissing)
        assert str(end).startswith("processes 1, 4 of 5 have not come to 127.0.0.1:"), end
        assert f"2 on {socket.gethostname()}" in str(end)


def test_without_the_first_process_the_others_say_so():
    for end in together(3, [1, 2], 1):
        assert isinstance(end, PeersMissing) and "process 0 of 3 has not answered at 127.0.0.1:" in str(end)


def test_the_same_number_twice_is_refused():
    ends = together(3, [0, 1, 1], 20)
    assert all(isinstance(end, UserError) and "process 1 was started twice" in str(end) for end in ends), ends
