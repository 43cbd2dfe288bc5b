"""CPU cores as devices."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from rmft_jax.config import Config, with_changes
from rmft_jax.devices import devices_for, everywhere, rows_for, spread_rows


@pytest.mark.parametrize(
    "mesh, batch, cores, expected",
    [
        ({}, 16, 2, 2),
        ({}, 16, 12, 8),  # 12, 11, 10 and 9 do not split 16 rows
        ({}, 7, 4, 1),
        ({"tensor": 2}, 16, 2, 2),
        ({"tensor": 2}, 6, 7, 6),  # 3 x 2
        ({"tensor": 4}, 16, 2, 4),  # a fixed mesh comes before the cores
        ({"replica": 2, "fsdp": 2}, 16, 16, 4),
        ({"replica": 1, "fsdp": -1}, 16, 4, 4),
        ({"replica": 2, "tensor": -1}, 16, 16, 2),
    ],
)
def test_devices_follow_mesh_batch_and_cores(mesh, batch, cores, expected):
    config = with_changes(Config(), {"mesh": mesh, "training": {"batch_size": batch}})
    assert devices_for(config, cores) == expected


def test_rows_are_spread_over_all_devices():
    count = jax.local_device_count()
    assert [rows_for(n) for n in (1, count, count + 1)] == [count, count, 2 * count]
    rows = np.arange(3 * count * 2).reshape(-1, 2)
    (spread,) = spread_rows(rows)
    assert [shard.data.shape for shard in spread.addressable_shards] == [(3, 2)] * count
    assert (np.asarray(spread) == rows).all()
    assert jax.device_put(rows, everywhere()).is_fully_replicated


@pytest.mark.parametrize("flags, expected", [("", "4"), ("--xla_force_host_platform_device_count=3", "3")])
def test_cores_become_devices_unless_xla_flags_say_otherwise(flags, expected):
    code = (
        "import os; os.sched_getaffinity = lambda _: range(4)\n"
        "from rmft_jax.devices import use_cores; use_cores()\n"
        "import jax; print(jax.device_count())"
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [expected]
