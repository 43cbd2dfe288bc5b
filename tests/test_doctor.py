"""`rmft doctor`: what it says of a whole installation, and of broken ones."""

import configparser
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_cli import rmft

from rmft_jax import doctor


def by_name(found):
    """Return the checks by name."""
    return {check["name"]: check for check in found["checks"]}


def test_a_whole_installation_is_healthy(capsys):
    code, out, err = rmft("doctor", "--json", capsys=capsys)
    found = json.loads(out)
    checks = by_name(found)
    assert code == 0 and err.startswith("doctor: ") and found["healthy"]
    assert {checks[name]["status"] for name in doctor._TRIALS} == {"ok"}
    assert found["devices"]["count"] == 8 and found["devices"]["platform"] == "cpu"
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    assert all(check["mend"] for check in found["checks"] if check["status"] != "ok")
    lines = doctor.describe(found).splitlines()
    assert len(lines) >= 3 + len(checks) and lines[2].startswith("devices: 8 x cpu")


def test_extras_are_those_of_the_package():
    parser = configparser.ConfigParser()
    parser.read(Path(__file__).parents[1] / "setup.cfg")
    assert set(doctor.EXTRAS) == set(parser["options.extras_require"]) - {"test"}


def test_wrong_and_absent_packages_are_named(monkeypatch):
    wanted = {"": [Requirement("jax>=99"), Requirement("no-such-package>=1"), Requirement("numpy>=1")],
              **dict.fromkeys(doctor.EXTRAS, [])}  # fmt: skip
    wanted["re2"] = [Requirement("no-such-engine>=2")]
    wanted["cuda"] = [Requirement("jax[cuda13]>=0.1")]
    monkeypatch.setattr(doctor, "_requirements", lambda: wanted)
    monkeypatch.setattr(doctor, "_TRIALS", {"JAX": doctor._TRIALS["JAX"]})
    found = doctor.diagnose()
    checks = by_name(found)
    assert not found["healthy"] and "numpy" not in checks
    assert checks["jax"]["status"] == "broken" and checks["jax"]["mend"] == "pip install 'jax>=99'"
    assert checks["no-such-package"]["detail"] == "not installed, needed is >=1"
    assert checks["[re2]"]["status"] == "missing" and "lacks no-such-engine" in checks["[re2]"]["detail"]
    assert checks["[cuda]"]["status"] == "missing" and "lacks plug-in" in checks["[cuda]"]["detail"]


def test_what_does_not_work_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    monkeypatch.setattr("rmft_jax.pii.windows.default_engine", lambda: 1 / 0)
    code, out, err = rmft("doctor", capsys=capsys)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and line.startswith("error: detection is broken (ZeroDivisionError") and "Traceback" not in err
    assert "broken  checkpoints: ModuleNotFoundError" in out and "broken  detection" in out


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_that_jax_does_not_use_is_named(there, tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor, "_ACCELERATORS", {"cuda": (str(tmp_path / ("nvidia0" if there else "none")),)})
    checks = doctor._unused_accelerators()
    assert bool(checks) == there and all("rmft-jax[cuda]" in check["mend"] for check in checks)
