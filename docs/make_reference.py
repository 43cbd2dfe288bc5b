"""Write docs/reference from docstrings, the configuration's dataclasses and the command line: `make docs`."""

import dataclasses
import inspect
import sys
import typing
from pathlib import Path

import typer

import rmft_jax
from rmft_jax import cli, kernels
from rmft_jax.config import Config

FOLDER = Path(__file__).parent / "reference"
NOTE = "Written by `make docs` from the code; change it there.\n"


def text_of(value) -> str:
    """Return a docstring as Markdown: lines that end in a colon and what is indented below them as they are."""
    lines = inspect.cleandoc(inspect.getdoc(value) or "").splitlines()
    return "\n".join(["```text", *lines[1 + (not lines[1]) :], "```"]) if len(lines) > 1 else ""


def first_line(value) -> str:
    return (inspect.getdoc(value) or "").splitlines()[0]


def of_names(title: str, intro: str, module, names: list[str]) -> str:
    """Return a page of functions and classes of a module."""
    parts = [f"# {title}\n", NOTE, intro + "\n"]
    for name in sorted(names, key=str.lower):
        value = getattr(module, name)
        if not callable(value):
            kind = type(value).__name__
            said = f" of {', '.join(map(str, value))}" if kind == "dict" else f": {value}"
            parts.append(f"## {name}\n\nA {kind}{said}.\n")
            continue
        signature = str(inspect.signature(value)).replace("'", "") if inspect.isfunction(value) else ""
        place = Path(sys.modules[value.__module__].__file__).relative_to(FOLDER.parents[1])
        parts.append(f"## {name}\n\n`{name}{signature}` · [{value.__module__}](../../{place})\n\n{first_line(value)}\n")
        parts += [text_of(value) + "\n"] if text_of(value) else []
    return "\n".join(parts)


def of_config() -> str:
    """Return a page of all keys, a section a dataclass."""
    parts = ["# Configuration\n", NOTE, "YAML, or `key.path=value` behind a command. Every key with its default:\n"]
    waiting: list[tuple[str, type]] = [("", Config)]
    while waiting:
        prefix, cls = waiting.pop(0)
        types = typing.get_type_hints(cls)
        parts.append(f"## {prefix.rstrip('.') or 'top level'}\n\n{first_line(cls)}\n")
        parts += [text_of(cls) + "\n"] if text_of(cls) else []
        rows = []
        for field in dataclasses.fields(cls):
            inner = types[field.name]
            if dataclasses.is_dataclass(inner):
                waiting.append((f"{prefix}{field.name}.", inner))
                continue
            below = [part for part in typing.get_args(inner) if dataclasses.is_dataclass(part)]
            waiting += [(f"{prefix}{field.name}.*.", part) for part in below]
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            named = str(inner).replace("rmft_jax.config.", "") if typing.get_args(inner) else inner.__name__
            shown = repr(default).replace("|", "\\|")
            rows.append(f"| `{prefix}{field.name}` | {named.replace('typing.', '')} | `{shown}` |")
        parts.append("| key | type | default |\n|---|---|---|\n" + "\n".join(rows) + "\n" if rows else "")
    return "\n".join(parts)


def of_commands() -> str:
    """Return a page of all commands with their arguments and options."""
    parts = ["# Commands\n", NOTE]
    parts.append(
        "Any `key.path=value` behind CONFIG changes a setting. Exit codes: 0; 2 = a mistake that you can mend, one "
        "line `error: ...`; 3 = a claim of a study does not hold (`--strict`); 75 = another process of the run ended; "
        "130, 143 = stopped; 1 = a fault of ours.\n"
    )
    root = typer.main.get_command(cli.app)

    def walk(command, path: str) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk(inner, f"{path} {name}")
            return
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([path, *(_upper(p) + ("..." if p.nargs != 1 else "") for p in arguments)])
        parts.append(f"## {path}\n\n`{usage}`\n\n{command.help}\n")
        for p in command.params:
            shown = _upper(p) if p in arguments else ", ".join(p.opts)
            parts.append(f"* `{shown}` {getattr(p, 'help', '') or ''}".rstrip())
        parts.append("")

    walk(root, "rmft")
    return "\n".join(parts)


def _upper(argument) -> str:
    return argument.name.upper()


def pages() -> dict[str, str]:
    """Return the content of each page by file name."""
    intro = (
        "```python\nimport rmft_jax\n```\n\nThe public interface; everything else may change without notice. "
        "Importing it loads nothing until a name is used."
    )
    inside = (
        "```python\nfrom rmft_jax import kernels\n```\n\nPure functions of arrays for any JAX program; "
        "they import nothing else of this package."
    )
    found = {
        "python.md": of_names("Python", intro, rmft_jax, rmft_jax.__all__),
        "kernels.md": of_names("Kernels", inside, kernels, kernels.__all__),
        "config.md": of_config(),
        "commands.md": of_commands(),
    }
    return {name: "\n".join(line.rstrip() for line in text.splitlines()).rstrip() + "\n" for name, text in found.items()}


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)
