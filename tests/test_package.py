"""The package as others import it: names, cost of importing, what the wheel holds."""

import ast
import configparser
import importlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rmft_jax
from rmft_jax import cli
from rmft_jax.bench import run_bench, startup
from rmft_jax.config import load_config
from rmft_jax.errors import UserError

ROOT = Path(__file__).parents[1]
HEAVY = {"jax", "numpy", "flax", "orbax", "grain", "tensorflow_datasets", "sentencepiece", "scipy", "torch", "jinja2"}


def test_public_names_are_what_the_list_says():
    tree = ast.parse(Path(rmft_jax.__file__).read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.If) for item in node.body
             if isinstance(item, ast.ImportFrom) for alias in item.names}  # fmt: skip
    assert sorted(typed) == sorted(rmft_jax._PLACES) == sorted(rmft_jax.__all__)
    assert set(rmft_jax.__all__) <= set(dir(rmft_jax))
    for name in rmft_jax.__all__:
        value = getattr(rmft_jax, name)
        home = importlib.import_module(f"rmft_jax.{rmft_jax._PLACES[name]}")
        assert value is getattr(home, name) and value.__module__ == home.__name__, name
        assert (inspect.getdoc(value) or "").splitlines()[0].endswith("."), name
        if inspect.isfunction(value):
            assert {"return"} | set(inspect.signature(value).parameters) == set(value.__annotations__), name
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        rmft_jax.fit  # noqa: B018


def test_public_kernels_have_docstrings_and_types():
    from rmft_jax import kernels

    assert len(kernels.__all__) > 60
    for name in kernels.__all__:
        value = getattr(kernels, name)
        if callable(value):
            assert inspect.getdoc(value), name


@pytest.mark.parametrize("command", [
    "import rmft_jax", "import rmft_jax.cli", "import rmft_jax; rmft_jax.load_config()",
    "import sys; sys.argv = ['rmft', '--help']; import rmft_jax.cli as c\ntry: c.main()\nexcept SystemExit: pass",
])  # fmt: skip
def test_nothing_heavy_is_imported_before_it_is_needed(command):
    report = "; import sys; print('\\n' + ' '.join(m for m in sys.modules))" if "try" not in command else (
        "\nprint('\\n' + ' '.join(m for m in sys.modules))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", command + report], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "rmft_jax" in loaded and not loaded & HEAVY


def test_startup_is_measured():
    result = startup.run(load_config(), runs=1)
    ((ours, peer),) = result["runs"]
    assert result["ratio"] == pytest.approx(peer / ours, rel=0.01) and result["peer_value"] == peer
    samples = result["samples"]
    assert samples["python"] < samples["import rmft_jax.kernels"]
    assert set(result["limits"]) == {"rmft --help", "import rmft_jax", "import rmft_jax, load a config"}
    with pytest.raises(UserError, match="knows no peer 'bash'"):
        run_bench("startup", load_config(), "bash")


def test_every_command_can_answer_in_json():
    root = typer.main.get_command(cli.app)
    inner = {**root.commands, **root.commands["convert"].commands}
    for name, command in inner.items():
        if name != "convert":
            assert "--json" in {option for parameter in command.params for option in parameter.opts}, name


@pytest.mark.parametrize("typed, wanted", [("rmft pre", "prepare"), ("rmft report --mod", "--model-card")])
def test_the_shell_completes(typed, wanted):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_RMFT_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv = ['rmft']; from rmft_jax.cli import main; main()"
    env = {**os.environ, **words}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == [wanted]


@pytest.mark.slow
def test_the_wheel_holds_all_that_runs_and_nothing_else(tmp_path):
    """Built without isolation, by the setuptools at hand: no network is needed."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "rmft_jax", source / "rmft_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = archive.read(next(name for name in names if name.endswith("dist-info/METADATA"))).decode()
        commands = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "rmft_jax").rglob("*")
              if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    assert wanted == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert re.search(r"^License(-Expression)?: Apache-2.0$", about, re.MULTILINE)
    assert "rmft = rmft_jax.cli:main" in commands and "rmft_jax/py.typed" in names
    assert {"cuda", "tpu", "re2", "gguf", "data", "dp", "wandb"} <= set(re.findall(r"Provides-Extra: (\w+)", about))


def test_time_left_does_not_count_what_comes_once(monkeypatch, capsys):
    """The first item takes 100 s, each other one 20 s; lines come every 10 s at most."""
    from rmft_jax import progress

    clock = iter([0.0, 100.0, 120.0, 140.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track(iter("abc"), "work", 5)) == list("abc")
    assert capsys.readouterr().err.splitlines() == [
        "work: 1/5 (20%)", "work: 2/5 (40%), 60 s left", "work: 3/5 (60%), 40 s left",
    ]  # fmt: skip


def test_licenses_of_all_that_is_installed_are_listed():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    wanted = re.findall(r"^([\w.-]+)(?: >=.*)?$", settings["options"]["install_requires"], re.MULTILINE)
    rows = re.findall(r"^\| ([\w.-]+) \| (.*?) \| http", (ROOT / "docs/licenses.md").read_text(), re.MULTILINE)
    assert len(wanted) > 20 and sorted(wanted) == sorted(name for name, license in rows if license)


def test_the_tested_versions_go_together():
    """Of each package that is here in the pinned version: what it asks of other packages holds for their pins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parts = [line.partition("==") for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in parts}
    wrong, looked = [], 0
    for found in importlib.metadata.distributions():
        name = canonicalize_name(found.metadata["Name"])
        if pins.get(name) != found.version.partition("+")[0]:
            continue
        looked += 1
        for wanted in map(Requirement, found.requires or []):
            pin = pins.get(canonicalize_name(wanted.name))
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if pin and applies and not wanted.specifier.contains(pin, prereleases=True):
                wrong.append(f"{name} asks for {wanted}, pinned is {pin}")
    assert not wrong and looked > 60
