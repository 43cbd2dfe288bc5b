"""YAML files that include others, such as the presets of configs/models."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from rmft_jax.errors import UserError

MODELS = Path("configs", "models")
_CHECKOUT = Path(__file__).parents[1]


def read_tree(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict, list[Path]]:
    """Read a YAML file and what its key `include` names: a file or a list of them, relative to the file itself.

    above: the files that include this one. Returns nested dicts without the key, and the files that they come from. The
    file's own keys win over those it includes, later includes over earlier ones, section by section.
    Raises UserError for a file that cannot be read, is not a mapping, or includes itself.
    """
    tree, chain = _read(path, above), (*above, path)
    below, files = read_includes(tree.pop("include", []), path.parent, chain)
    return merge(below, tree), [path, *files]


def read_includes(names: Any, folder: Path, chain: tuple[Path, ...] = ()) -> tuple[dict, list[Path]]:
    """Read the files that an `include` names, as `read_tree` does. folder: what they are relative to."""
    where = f"in {chain[-1]}" if chain else "on the command line"
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"include {where} is {names!r}: it must be a file or a list of files")
    tree: dict = {}
    files: list[Path] = []
    for name in names:
        path = folder / name
        circle = [other for other in chain if other.resolve() == path.resolve()]
        if circle:
            way = " -> ".join(map(str, (*chain[chain.index(circle[0]) :], path)))
            raise UserError(f"include {name} {where} goes round in a circle ({way}): take one of them out")
        inner, more = read_tree(path, chain)
        tree, files = merge(tree, inner), [*files, *more]
    return tree, files


def merge(below: Any, above: Any) -> Any:
    """Return two trees of dicts as one: where both have a key, sections are merged and other values are those of `above`."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: merge(below.get(key), value) for key, value in above.items()}


def find_model(name: str) -> Path:
    """Return the path of a preset: `name` itself if it is a file, else NAME.yaml in configs/models, here or in the checkout.

    Raises UserError for a name that none has, with the nearest one.
    """
    if Path(name).is_file():
        return Path(name)
    folders = [MODELS, _CHECKOUT / MODELS]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(f"unknown model {name!r}{_meant(name, known)}: name a file, or one of {', '.join(known) or 'none'}")


def _read(path: Path, above: tuple[Path, ...]) -> dict:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        by = f" (included by {above[-1]})" if above else ""
        near = _meant(path.name, [other.name for other in path.parent.glob("*.yaml")])
        raise UserError(f"config {path}{by} cannot be read ({error.strerror}): check the path{near}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = f" line {line + 1}" if line is not None else ""
        raise UserError(f"config {path}{at} is not valid YAML: check its indentation and quotes") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path} is a {type(tree).__name__}: it must hold `key: value` lines")
    return tree


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
