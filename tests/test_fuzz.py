"""Whatever is in a file or a setting: an answer, or one line that says what is wrong; no traceback, nothing half-written."""

import copy
import gzip
import json
import random
import shutil
from pathlib import Path

import jax
import pytest
import yaml
from test_convert import MODEL, folder_of, write_gguf
from test_report import results  # noqa: F401  a fixture
from test_sources import TEXTS, message, write_source

from rmft_jax.config import Config, load_config, to_dict, to_yaml
from rmft_jax.convert import convert_import
from rmft_jax.data.mail import text_of
from rmft_jax.data.sources import read_documents
from rmft_jax.errors import UserError
from rmft_jax.models.gpt import init_params
from rmft_jax.report.html import write_report

FEW = 60
MANY = pytest.param(2000, marks=pytest.mark.slow)
BAD = [
    "", "x", "-1", "0", "1e400", "nan", "-.inf", "null", "[]", "{}", "[1, [2]]", "{a: {b: 1}}", "true", "1.5", str(10**30),
    "'\\0'", "💥", "../../etc/passwd", "!!python/object:os.system", "a: b: c", "{{7*7}}", "<script>", "2024-01-01", "0x10",
    "*x", "&x",
]  # fmt: skip
BYTES = [b"\0", b"\xff\xfe", b"{", b"]", b'"', b"\r", b"-1", b"1e999", b"null", b"\xf0\x9f", b"&a *a"]
ODD = [None, "", "x", -1, 0, 1e300, [], {}, [[]], True, "<script>alert(1)</script>", "{{7*7}}", 10**25, [None], {"": 0}]


def refused_or_done(act, *arguments):
    """Return the line of a refusal, None where it went well; whatever else is raised fails the test."""
    try:
        act(*arguments)
    except UserError as error:
        assert str(error).strip()
        return str(error)
    return None


def mutate(data: bytes, rng) -> bytes:
    """Change bytes in one of the ways in which files are broken, or were made to be."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randint(1, 50)]
        elif kind == 3:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20)))
        elif kind == 4:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        elif kind == 5:
            data[at:at] = rng.choice(BYTES)
        else:
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, (1 << 62).to_bytes(8, "little")])
    return bytes(data)


def mutate_tree(value, rng):
    """Change one thing in a tree of JSON."""
    value = copy.deepcopy(value)
    spot = value
    while isinstance(spot, dict | list) and spot:
        key = rng.choice(list(spot)) if isinstance(spot, dict) else rng.randrange(len(spot))
        if not isinstance(spot[key], dict | list) or rng.random() < 0.2:
            if rng.random() < 0.3:
                del spot[key]
            else:
                spot[key] = rng.choice(ODD)
            break
        spot = spot[key]
    return value


def leaves(tree, prefix=""):
    for name, value in tree.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]


@pytest.mark.parametrize("count", [600, pytest.param(100_000, marks=pytest.mark.slow)])
def test_settings(count):
    """Every key of the config with every odd value."""
    pairs = [(key, value) for key in leaves(to_dict(Config())) for value in BAD]
    pairs += [(f"{key}.deeper", "1") for key in leaves(to_dict(Config()))] + [("", "1"), (".", "1"), ("model..width", "1")]
    random.Random(0).shuffle(pairs)
    for key, value in pairs[:count]:
        said = refused_or_done(load_config, None, [f"{key}={value}"])
        assert said is None or "\n" not in said.strip() or key in said, (key, value, said)


@pytest.mark.parametrize("count", [FEW * 4, MANY])
def test_config_files(tmp_path, count):
    rng, path = random.Random(1), tmp_path / "config.yaml"
    whole = [file.read_bytes() for file in Path("configs").rglob("*.yaml")] or [to_yaml(Config()).encode()]
    for number in range(count):
        data = rng.choice(whole)
        tree = yaml.safe_load(data)
        path.write_bytes(mutate(data, rng) if number % 3 else yaml.safe_dump(mutate_tree(tree, rng)).encode())
        refused_or_done(load_config, path)


@pytest.mark.parametrize("count", [FEW * 4, MANY])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_documents(tmp_path, name, on_error, count):
    rng = random.Random(2)
    lines = [json.dumps({"id": str(n), "text": f"Dear {n}, write to ann{n}@alder.example.com\né"}) for n in range(8)]
    whole = "\n".join(lines).encode()
    kind = "text" if name.endswith("txt") else "jsonl"
    settings = [f"format={kind}", f"path={tmp_path / name}", f"on_error={on_error}", "heldout_fraction=0.3"]
    config = load_config(None, [f"source.{setting}" for setting in settings])
    for number in range(count // 4):
        data = mutate(whole, rng)
        if name.endswith("gz"):
            data = mutate(gzip.compress(whole), rng) if number % 2 else gzip.compress(data)
        (tmp_path / name).write_bytes(data)
        refused_or_done(read_documents, config.source)


@pytest.mark.parametrize("count", [FEW * 4, MANY])
@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl.zst", "a.mbox"])
def test_other_formats(tmp_path, name, count):
    rng, path = random.Random(6), tmp_path / name
    if name.endswith("mbox"):
        path.write_bytes(b"".join(b"From x\nTo: a@b.example.com\nSubject: %d\n\nhello\n\n" % n for n in range(5)))
    else:
        write_source(path, TEXTS)
    whole, kind = path.read_bytes(), name.split(".")[1]
    settings = [f"format={kind}", f"path={path}", "heldout_fraction=0.3"]
    config = load_config(None, [f"source.{setting}" for setting in settings])
    for _ in range(count // 4):
        path.write_bytes(mutate(whole, rng))
        refused_or_done(read_documents, config.source)


@pytest.mark.parametrize("count", [FEW * 2, MANY])
def test_mail(count):
    rng, whole = random.Random(7), message()
    whole.add_alternative("<p>Dear &eacute;</p>", subtype="html")
    whole.add_attachment(b"\0\1", maintype="application", subtype="pdf", filename="a.pdf")
    whole.add_attachment(message("inner"))
    for _ in range(count):
        text, _ = text_of(mutate(whole.as_bytes(), rng))
        text.encode("utf-8")


def check_import(source, out):
    refused_or_done(convert_import, source, out)
    if out.exists():  # it was harmless
        assert (out / "checkpoints" / "0" / "params").is_dir()
        shutil.rmtree(out)
    assert not list(out.parent.glob(f".{out.name}.*"))


@pytest.mark.parametrize("count", [FEW // 2, MANY])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folders_of_models(tmp_path, file, count):
    rng = random.Random(3)
    folder_of(tmp_path / "model")
    path = tmp_path / "model" / file
    whole = path.read_bytes()
    for number in range(count // 4):
        if file.endswith("json") and number % 2:
            data = json.dumps(mutate_tree(json.loads(whole), rng)).encode()
        elif file.endswith("safetensors"):  # most of what can go wrong is at its beginning
            head = 8 + int.from_bytes(whole[:8], "little")
            data = mutate(whole[:head], rng) + whole[head:]
        else:
            data = mutate(whole, rng)
        path.write_bytes(data)
        check_import(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("count", [FEW // 2, MANY])
def test_gguf_files(tmp_path, count):
    rng, path = random.Random(4), tmp_path / "model.gguf"
    write_gguf(path, "llama", MODEL, init_params(MODEL, 384, jax.random.key(1)))
    whole = path.read_bytes()
    for _ in range(count // 4):
        path.write_bytes(mutate(whole[:4000], rng) + whole[4000:])
        check_import(path, tmp_path / "out")


@pytest.mark.parametrize("count", [FEW, MANY])
def test_results(results, tmp_path, count):  # noqa: F811
    rng = random.Random(5)
    for _ in range(count):
        refused_or_done(write_report, mutate_tree(results, rng), tmp_path / "report.html")
