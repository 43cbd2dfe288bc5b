"""Every code block of the README and of docs/ is run, in a folder of its own, one document after the other.

Commands of `rmft` run in this process, shrunk by SMALL. A comment above a block says how else it is to be taken:
`<!-- test: parse -->` (too long to run: options and config are checked, Python is compiled), `<!-- test: slow -->` (left
to `make test-slow`, as is all of HEAVY but for what comes first: there, `make test` checks options and configs only).
"""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
import yaml
from test_cli import rmft
from test_convert import folder_of
from test_report import results as report_results  # noqa: F401  a fixture
from test_suggest import write_data

import rmft_jax
from rmft_jax import cli, kernels
from rmft_jax.config import Config, load_config, with_changes

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^(?:<!-- test: (\w+) -->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEAVY = tuple(f"docs/{name}.md" for name in (
    "tutorial", "howto/finetune_huggingface", "howto/audit_another_model", "howto/tpu_pod"))  # fmt: skip
FIRST = ("rmft init", "rmft convert import", "rmft prepare", "rmft doctor")
SMALL = {
    "train": ["training.steps=8", "training.log_every=4", "training.warmup_steps=2"],
    "audit": ["audit.prompts=8", "audit.new_tokens=8", "audit.batch_size=8", "audit.samples=8"],
    "compare": ["audit.bootstrap=50"],
}
SHRINK = ("synthetic_mail(400", "synthetic_mail(80")  # of the tutorial's invented mail
MINE = {"out": "runs/mine", "source": {"format": "mbox", "path": "mail.mbox"}, "tokenizer": {"vocab_size": 500},
        "model": {"layers": 1, "width": 32, "heads": 2}, "training": {"batch_size": 8, "sequence_length": 64}}  # fmt: skip
MODELLED = ["model.layers=1", "model.width=32", "model.heads=2", "checkpoint.count=2"]  # of what `rmft init` writes
# Shell commands that are not ours: what they begin with.
OTHERS = ("pip install", "git clone", "cd ", "python -m venv", ". .venv/bin/activate", "export ", "make ",
          "tpu_scripts/", "gcloud storage ")


def blocks_of(page, languages):
    """Return the blocks of a page in these languages: how to take it, language, text."""
    found = BLOCK.findall((ROOT / page).read_text())
    return [(how or "run", language, text) for how, language, text in found if language in languages]


def commands(text):
    """Return the command lines of a shell block, without comments, continued lines joined."""
    lines = [re.sub(r"(?:^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def check_other(line):
    """Check what can be checked of a command that is not ours."""
    assert line.startswith(OTHERS), f"what is {line!r}? Run it in the test, or name it among OTHERS"
    if line.startswith("make "):
        assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text(), line
    for extras in re.findall(r"rmft-jax\[([\w,]+)\]|-e '?\.\[([\w,]+)\]", line):
        known = yaml.safe_load(json.dumps(re.findall(r"^(\w+) ?=", (ROOT / "setup.cfg").read_text(), re.MULTILINE)))
        assert set("".join(extras).split(",")) <= set(known), line


def parse(line):
    """Check that a command's options exist and that its config loads with its overrides."""
    command, words, path = typer.main.get_command(cli.app), shlex.split(line)[1:], "rmft"
    while hasattr(command, "commands"):
        command, path = command.commands[words[0]], f"{path} {words[0]}"
        words = words[1:]
    context = command.make_context(path, words)
    if context.params.get("config"):
        load_config(context.params["config"], context.params.get("overrides") or [])


def run(line, capsys):
    """Run a command of ours, shrunk, in the working folder."""
    words = shlex.split(line)[1:]
    words = [name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    more = SMALL.get(words[0], [])
    own = words[0] == "train" and "Written by `rmft init" in Path(words[1]).read_text()
    code, out, err = rmft(*words, *more, *(MODELLED if own else []), capsys=capsys)
    assert code == 0, f"{line}: {err}"
    return out


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a folder with what the documents take for granted, as the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(write_data(tmp_path, "mbox"), tmp_path / "mail.mbox")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINE))
    return tmp_path


@pytest.fixture(scope="module")
def their_model(tmp_path_factory):
    """Return a small model of Hugging Face."""
    return _folder(tmp_path_factory.mktemp("their") / "model")


RUNS = [(page, False) for page in PAGES if blocks_of(page, ("sh", "yaml", "python"))]
RUNS += [pytest.param(page, True, marks=pytest.mark.slow) for page in HEAVY]


@pytest.mark.parametrize("page, whole", RUNS)
def test_blocks(page, whole, place, request, capsys):
    some = page in HEAVY and not whole
    if "their_model" in (ROOT / page).read_text():
        shutil.copytree(request.getfixturevalue("their_model"), place / "their_model")
    if page == "docs/howto/read_the_report.md":
        request.getfixturevalue("compared")
    names = dict(NAMES.get(page, lambda request: {})(request))
    for how, language, text in blocks_of(page, ("sh", "yaml", "python")):
        if how == "slow" and not whole:
            continue
        if language == "python":
            code = compile(text.replace(*SHRINK), page, "exec")
            if how != "parse":
                if "from transformers import" in text:
                    pytest.importorskip("transformers")
                exec(code, names)  # noqa: S102
        elif language == "yaml":
            tree = yaml.safe_load(text)
            if named := re.match(r"# (\S+\.yaml)\n", text):
                Path(named[1]).write_text(text)
                load_config(Path(named[1]))
            else:
                with_changes(Config(), {key: value for key, value in tree.items() if key != "include"})
        elif language == "sh":
            for line in commands(text):
                if not line.startswith("rmft "):
                    check_other(line)
                elif how == "parse" or some and not line.startswith(FIRST):
                    parse(line)
                else:
                    run(line, capsys)


@pytest.fixture
def compared(request, place):
    """Put results where the page has them."""
    (place / "runs/mail").mkdir(parents=True)
    (place / "runs/mail/results.json").write_text(json.dumps(request.getfixturevalue("report_results")))


def _folder(path):
    folder_of(path)
    return path


def _readme(request):
    tiny, prepared = request.getfixturevalue("tiny"), request.getfixturevalue("prepared")
    import jax

    from rmft_jax.data.loader import batches
    from rmft_jax.training.setup import load_blocks

    batch = next(batches(load_blocks(tiny(), prepared)[0], batch_size=2, seed=0))
    loss = lambda params, tokens, segment_ids: (tokens * (segment_ids > 0)).sum()  # noqa: E731
    return {"batch": batch, "bank": prepared.bank, "key": jax.random.key(0), "params": {}, "my_loss": loss}


# What the Python blocks of a page may take for granted.
NAMES = {
    "README.md": _readme,
    "docs/masking.md": lambda request: {"POLICIES": dict(kernels.POLICIES)},
    "docs/tracker.md": lambda request: {"DATA": request.getfixturevalue("prepared").directory},
}


def test_the_reference_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.pages().items():
        assert (ROOT / "docs/reference" / name).read_text() == text, f"docs/reference/{name} is out of date: run `make docs`"


def test_the_reference_names_all_there_is():
    names = ("python", "config", "commands")
    python, config, commands = ((ROOT / f"docs/reference/{name}.md").read_text() for name in names)
    assert all(f"\n## {name}\n" in python for name in rmft_jax.__all__)
    assert all(f"\n## rmft {name}" in commands for name in ("init", "prepare", "train", "audit", "report", "convert import"))
    keys = set(re.findall(r"\| `([\w.]+)` \|", config))
    assert {"masking.policy", "audit.prompts", "mesh.fsdp", "source.path"} <= keys


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, (target, sorted(slugs))


@pytest.mark.slow
def test_the_notebook_runs(place):
    names = {}
    for cell in json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "notebook", "exec"), names)  # noqa: S102
    runs = names["results"]["runs"]
    leaked = {name: run["checkpoints"][-1]["prompts"]["all"]["true_leaked"] for name, run in runs.items()}
    assert leaked["rmft"] < leaked["baseline"] and names["page"].stat().st_size > 10_000
