"""`rmft init`: look at a sample of somebody's text, and write the config that suits it and this machine."""

from __future__ import annotations

import math
import re
import statistics
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from rmft_jax.config import PII_TYPES, Config, ModelConfig, PiiConfig, SourceConfig, with_changes
from rmft_jax.data.sources import first_bytes, first_rows, read_documents
from rmft_jax.errors import UserError
from rmft_jax.files import write_text
from rmft_jax.pii.detector import Detector
from rmft_jax.progress import say

SCHEMA = 1
SAMPLE = 5000  # documents
# Layers, width and heads of the models to choose from.
LADDER = ((2, 64, 2), (4, 128, 4), (4, 192, 4), (6, 256, 4), (6, 384, 6), (8, 512, 8), (12, 768, 12), (24, 1024, 16))
_SMALLEST = 1  # the rung below which nothing is worth training if there is more text than time
_EFFICIENCY = 0.35  # of a train step, against the fastest matrix product
_TYPES = tuple(name for name in PII_TYPES if name != "person")  # which needs a model of its own
_HEADER = re.compile(r"\A(?:[A-Za-z][\w-]*: ?.*\n(?:[ \t].*\n)*)+\n")
_BORDERS = {"jsonl": rb"\n", "csv": rb"\n", "mbox": rb"^From ", "text": rb"^<\|endoftext\|>\r?$"}
_HEAD = 1 << 26  # bytes in which borders of documents are counted
_NAMED = re.compile(r"^(?:from|to|subject|date|message-id): ", re.IGNORECASE | re.MULTILINE)


def suggest_config(data: str, *, minutes: float = 15.0, out: str = "", name: str = "", speed: float = 0.0) -> dict[str, Any]:
    """Look at a sample of the text at `data` and at this machine, and return a config for both.

    data: a file or folder in any format of `source.format` but array_record. minutes: how long one training may take on this
    machine. out: directory of the experiment, "" = runs/ with the name of the data. name: of the file for the config.
    speed: FLOP/s of a train step, 0 = measured.

    Returns schema, data (path, format, bytes, and whether its texts are mail), sample (documents, characters,
    median_characters), documents (of all the data, an estimate where the sample is not all), pii (type -> occurrences,
    values, repeating_pct), machine (device, count, flops), model (parameters, layers, width), steps, minutes (expected, of
    one training), config (nested keys) and yaml (the same with comments). No value of the data is in any of it.
    Raises UserError for data that cannot be read, or hold no text.
    """
    source = find_source(data)
    say(f"init: reading the first documents of {data}, {SAMPLE:,} at most")
    texts = _sample(source)
    characters = sum(map(len, texts))
    total = _documents(source, texts)
    say(f"init: looking for personal data in {len(texts):,} documents")
    pii = count_pii(texts)
    say("init: how fast is this machine")
    machine = _machine()
    speed = speed or machine["flops"]
    plan = _fit(texts, total, speed * 60 * minutes, on_cpu=machine["platform"] == "cpu")
    tree = _tree(source, pii, plan, out or f"runs/{_stem(source.path)}")
    with_changes(Config(), tree, "the suggested config")  # raises if it breaks a rule
    found = {
        "schema": SCHEMA,
        "data": {"path": source.path, "format": source.format, "bytes": _size(source.path), "mail": source.mail},
        "sample": {"documents": len(texts), "characters": characters,
                   "median_characters": int(statistics.median(map(len, texts)))},
        "documents": total,
        "pii": pii,
        "machine": machine | {"flops": speed},
        "model": {"parameters": plan["parameters"], "layers": plan["model"][0], "width": plan["model"][1]},
        "steps": plan["steps"],
        "minutes": round(plan["flops"] / speed / 60, 1),
        "config": tree,
    }  # fmt: skip
    return found | {"yaml": _commented(found, plan, name or config_name(data))}


def write_config(found: dict[str, Any], path: Path) -> Path:
    """Write what `suggest_config` returned as a YAML file. Raises UserError where there is one already."""
    if path.exists():
        raise UserError(f"{path} exists already: name another file with --to, or delete it")
    write_text(path, found["yaml"])
    return path


def describe(found: dict[str, Any]) -> str:
    """Return what was found as lines to read."""
    data, sample, model = found["data"], found["sample"], found["model"]
    about = "" if found["documents"] == sample["documents"] else "about "
    lines = [
        f"{data['path']}: {data['format']}{', mail' if data['mail'] else ''}, {about}{found['documents']:,} documents, "
        f"{data['bytes'] / 1e6:,.1f} MB; looked at {sample['documents']:,} of them",
        "personal data in the sample: " + (", ".join(
            f"{name} {count['occurrences']:,} times, {count['values']:,} values" for name, count in found["pii"].items())
            or "none found"),
        f"{found['machine']['device']}: a model of {model['parameters']:,} parameters, {found['steps']:,} steps, about "
        f"{found['minutes']:.0f} minutes a training",
    ]  # fmt: skip
    return "\n".join(lines)


def config_name(data: str) -> str:
    """Return the name of the config for data."""
    return f"{_stem(data)}.yaml"


def find_source(data: str) -> SourceConfig:
    """Return where and in which format the text at `data` is, by its content more than by its name.

    Raises UserError for what does not exist, is empty, or has no field of text.
    """
    path = Path(data)
    if not path.exists():
        raise UserError(f"{data} does not exist: name a file or a folder with your text")
    if path.is_dir():
        if found := sorted([*path.glob("dataset_info.json"), *path.glob("*/dataset_info.json")]):
            return SourceConfig(format="tfds", path=str(found[-1].parent))  # of several versions the last
        return SourceConfig(format="maildir", path=data)
    if re.search(r"\.(tar|tgz|tar\.\w+)$", path.name):
        return SourceConfig(format="maildir", path=data)
    try:
        head = first_bytes(data, 1 << 16)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{data} cannot be read ({error}): check that it is whole") from None
    if not head.strip():
        raise UserError(f"{data} is empty: name a file with text")
    if head.startswith(b"PAR1"):
        return _with_field(data, "parquet")
    if head.lstrip().startswith(b"{"):
        return _with_field(data, "jsonl")
    if head.lstrip().startswith(b"[") and ".json" in path.suffixes:
        raise UserError(f"{data} is one JSON array: write an object a line, for instance by jq -c '.[]', and name it .jsonl")
    if head.startswith(b"From "):
        return SourceConfig(format="mbox", path=data)
    if re.search(r"\.csv(\.gz|\.zst)?$", path.name):
        return _with_field(data, "csv")
    if b"\0" in head:
        raise UserError(f"{data} is neither text nor a format known here: convert it to JSON lines, see docs/data.md")
    return SourceConfig(format="text", path=data)


def count_pii(texts: list[str]) -> dict[str, dict[str, float]]:
    """Return, for each built-in type but `person` that the texts hold, occurrences, values, and repeating_pct.

    repeating_pct: how many percent of the occurrences repeat an earlier one. The most frequent type comes first.
    """
    detector = Detector(PiiConfig(types=_TYPES))
    seen: dict[str, Counter[str]] = {name: Counter() for name in _TYPES}
    for spans in detector.detect_many(texts):
        for span in spans:
            seen[_TYPES[span.type]][span.value] += 1
    found = {}
    for name, values in sorted(seen.items(), key=lambda item: -item[1].total()):
        if occurrences := values.total():
            repeating = round(100 * (1 - len(values) / occurrences), 1)
            found[name] = {"occurrences": occurrences, "values": len(values), "repeating_pct": repeating}
    return found


def _with_field(path: str, format: str) -> SourceConfig:
    """Return the source with the field that holds most text, and whether that is mail."""
    try:
        rows = first_rows(path, format, 100)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): check that it is whole") from None
    lengths: Counter[str] = Counter()
    for row in rows:
        lengths.update({name: len(value) for name, value in row.items() if name and isinstance(value, str)})
    if not lengths:
        raise UserError(f"{path} has no field with text in its first rows: see source.text_field in docs/data.md")
    field = lengths.most_common(1)[0][0]
    texts = [row[field] for row in rows if isinstance(row.get(field), str)]
    heads = [match[0] for text in texts if (match := _HEADER.match(text.replace("\r\n", "\n")))]
    mail = sum(len(_NAMED.findall(head)) >= 2 for head in heads) > 0.8 * len(texts)
    return SourceConfig(format=format, path=path, text_field=field, mail=mail)


def _sample(source: SourceConfig) -> list[str]:
    """Return the first texts of a source, at most SAMPLE."""
    documents = read_documents(SourceConfig(**{**vars(source), "limit": SAMPLE, "on_error": "skip"}))
    return documents.train + documents.heldout


def _size(path: str) -> int:
    files = [file for file in Path(path).rglob("*") if file.is_file()] if Path(path).is_dir() else [Path(path)]
    return sum(file.stat().st_size for file in files)


def _documents(source: SourceConfig, texts: list[str]) -> int:
    """Return how many documents a source has: all that were read, or what its first part and its size lead to expect."""
    if len(texts) < SAMPLE:
        return len(texts)
    path = Path(source.path)
    if path.is_dir():
        return max(len(texts), sum(file.is_file() for file in path.rglob("*")))
    if source.format not in _BORDERS or source.path.endswith((".tar", ".tgz", ".tar.gz")):
        return len(texts)
    head = first_bytes(source.path, _HEAD)
    count = float(len(re.findall(_BORDERS[source.format], head, re.MULTILINE)))
    if source.format == "csv":  # texts have line breaks of their own
        count /= 1 + sum(text.count("\n") for text in texts) / len(texts)
    if len(head) == _HEAD:
        part = head[: 1 << 24]
        packed = len(zlib.compress(part)) / len(part) if source.path.endswith((".gz", ".zst")) else 1.0
        count *= path.stat().st_size / (_HEAD * packed)
    return max(len(texts), round(count))


def _machine() -> dict[str, Any]:
    """Return the devices and the FLOP/s that a train step may be expected to reach on all of them."""
    import jax
    import jax.numpy as jnp

    from rmft_jax.devices import peak_flops

    device, count = jax.devices()[0], jax.device_count()
    if peak := peak_flops():
        flops = _EFFICIENCY * peak * count
    else:  # one CPU device multiplies on all cores
        multiply, x = jax.jit(lambda x: x @ x), jnp.ones((1024, 1024))
        multiply(x).block_until_ready()
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            multiply(x).block_until_ready()
            times.append(time.perf_counter() - begin)
        flops = _EFFICIENCY * 2 * 1024**3 / min(times)
    return {"device": f"{device.device_kind} x{count}", "platform": device.platform, "flops": flops}


def _fit(texts: list[str], total: int, budget: float, *, on_cpu: bool) -> dict[str, Any]:
    """Return the largest model that `budget` FLOPs can train on the text, with fewer documents where none could."""
    average = sum(map(len, texts)) / len(texts)
    best: dict[str, Any] = {}
    for model in LADDER:
        fit = _trained(model, average * total, on_cpu)
        if best and (fit["flops"] > budget or fit["parameters"] > 10 * fit["tokens"]):  # no time, or no text, for more
            break
        if fit["flops"] <= budget:
            best = fit
        elif model == LADDER[_SMALLEST]:  # the smallest worth training, on what there is time for
            limit = total
            for _ in range(4):  # with less text the vocabulary is smaller
                limit = min(total, max(200, int(limit * budget / fit["flops"])))
                fit = _trained(model, average * limit, on_cpu)
            return fit | {"limit": limit if limit < total else 0}
    return best


def _trained(model: tuple[int, int, int], characters: float, on_cpu: bool) -> dict[str, Any]:
    """Return what training a rung of the ladder on so much text takes."""
    from rmft_jax.models.gpt import flops_per_token

    layers, width, heads = model
    vocabulary = _vocabulary(characters)
    length, batch = (128, 16) if on_cpu else (512, 32)
    tokens = 0.9 * characters / (2.5 + 0.25 * (vocabulary.bit_length() - 10))  # a tenth is held out
    epochs = min(20.0, max(3.0, 250 * batch * length / tokens))
    flops = flops_per_token(ModelConfig(layers=layers, width=width, heads=heads), vocabulary, length) * tokens * epochs
    return {
        "model": model, "parameters": _parameters(layers, width, vocabulary), "vocabulary": vocabulary, "length": length,
        "batch": batch, "epochs": round(epochs, 1), "steps": max(1, int(epochs * tokens / (batch * (length - 8)))),
        "tokens": tokens, "flops": flops, "limit": 0,
    }  # fmt: skip


def _vocabulary(characters: float) -> int:
    """Return pieces for a text: 512, doubled with each factor of ten from 3,000 characters on, at most 32,768."""
    return 512 << max(0, min(6, int(math.log10(max(characters, 1) / 3000))))


def _parameters(layers: int, width: int, vocabulary: int) -> int:
    model = ModelConfig(layers=layers, width=width)
    return vocabulary * width + width + layers * (4 * width * width + 3 * width * model.mlp + 2 * width)


def _tree(source: SourceConfig, pii: dict, plan: dict, out: str) -> dict[str, Any]:
    """Return the nested keys of the config."""
    place: dict[str, Any] = {"format": source.format, "path": source.path}
    if source.format in ("jsonl", "csv", "parquet", "tfds"):
        place["text_field"] = source.text_field
    layers, width, heads = plan["model"]
    return {
        "out": out,
        "source": place | ({"mail": True} if source.mail else {}) | {"limit": plan["limit"], "on_error": "skip"},
        "tokenizer": {"vocab_size": plan["vocabulary"]},
        "pii": {"types": [name for name, count in pii.items() if count["occurrences"] >= 3] or ["email"]},
        "masking": {"policy": "keep_first"},
        "model": {"layers": layers, "width": width, "heads": heads},
        "training": {
            "batch_size": plan["batch"],
            "sequence_length": plan["length"],
            "epochs": plan["epochs"],
            "learning_rate": 2e-3 if width <= 256 else 6e-4,
            "warmup_steps": min(100, plan["steps"] // 10),
        },
        "checkpoint": {"count": max(1, min(5, plan["steps"] // 5))},
    }


def _commented(found: dict[str, Any], plan: dict[str, Any], name: str) -> str:
    """Return the config as YAML with a comment on each choice."""
    config, data = found["config"], found["data"]
    share = f"; 0 = all, about {found['documents']:,}" if plan["limit"] else ""
    counts = ", ".join(f"{name} {count['occurrences']:,}" for name, count in found["pii"].items()) or "none found"
    comments = {
        "out": "where the prepared data and the runs go",
        "limit": f"documents to take{share}",
        "mail": "the texts are mail: decode headers and bodies (docs/data.md)",
        "on_error": "leave out what cannot be read, and count it; raise = stop there",
        "vocab_size": "pieces, 256 of them bytes",
        "types": f"occurrences in {found['sample']['documents']:,} documents: {counts}",
        "policy": "RMFT: the first occurrence of a value stays; none = the baseline (docs/masking.md has stronger ones)",
        "layers": f"with the vocabulary {found['model']['parameters']:,} parameters",
        "epochs": f"about {found['steps']:,} steps, {found['minutes']:.0f} minutes on {found['machine']['device']}",
        "learning_rate": "lower it if the loss jumps",
        "count": "checkpoints to attack in the audit, evenly spaced",
    }
    head = [
        f"# Written by `rmft init {data['path']}` for {data['bytes'] / 1e6:,.1f} MB of {data['format']}.",
        "# Every key there is, with its default: configs/synthetic.yaml in the repository.",
        f"#   rmft prepare {name}",
        f"#   rmft train {name} masking.policy=none    -> {config['out']}/runs/baseline",
        f"#   rmft train {name}                        -> {config['out']}/runs/rmft",
        f"#   rmft audit {config['out']}/runs/*",
        f"#   rmft compare {config['out']}/runs/*",
        f"#   rmft report {config['out']}",
    ]
    lines = []
    for key, value in config.items():
        inner = value if isinstance(value, dict) else {}
        lines += [f"{key}:"] if inner else [_line(key, value, comments)]
        lines += [f"  {_line(name, item, comments)}" for name, item in inner.items()]
    return "\n".join([*head, *lines]) + "\n"


def _line(key: str, value: Any, comments: dict[str, str]) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return f"{key}: {written} # {comments[key]}" if key in comments else f"{key}: {written}"


def _stem(path: str) -> str:
    return re.sub(r"[^\w-]", "_", Path(path).name.partition(".")[0]) or "mine"
