"""What a run's directory says of who was in the training text: file names and plain metadata, nothing."""

import json
import re

import pytest

from rmft_jax.config import load_config
from rmft_jax.data.prepare import prepare
from rmft_jax.training.loop import train

# what a model makes of its texts: averages over batches or over the held-out text, times, and random numbers of a start
MEASURED = {"metrics.jsonl", "memorization.jsonl", "evaluation.json", "goodput.json"}
RANDOM = re.compile(r"[0-9a-f]{32}|\d{10}\.\S+")  # of array files; the time and host of TensorBoard's


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Train on two corpora that differ in one document, of another person, with as many tokens."""
    folder = tmp_path_factory.mktemp("twins")
    runs = []
    for name in ("ann3", "ann4"):
        texts = [f"Document {number}: see the notes of day {number}.\n" * 4 for number in range(40)]
        texts[7] = f"From: {name}@alder.example.com\nPlease call me. {name}@alder.example.com\n" * 2
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(texts))
        settings = [f"out={folder / name}", "source.format=text", f"source.path={folder / name}.txt",
                    "tokenizer.vocab_size=320", "model.layers=1", "model.width=16", "model.heads=2",
                    "training.batch_size=8", "training.steps=3", "training.sequence_length=64", "checkpoint.count=1",
                    "tracker.enabled=true", "name=twin"]  # fmt: skip
        config = load_config(None, settings)
        prepare(config)
        runs.append(train(config))
    return runs


def plain_files(run):
    return sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())


def test_file_names_are_the_same_whoever_was_in_the_text(twins):
    one, two = ({RANDOM.sub("*", str(path)) for path in plain_files(run)} for run in twins)
    assert one == two
    numbers = [set(re.findall(r"[0-9a-f]{32}", " ".join(map(str, plain_files(run))))) for run in twins]
    assert numbers[0] and not numbers[0] & numbers[1]  # random, no sums of what is in them


def test_plain_metadata_are_the_same_whoever_was_in_the_text(twins):
    for path in plain_files(twins[0]):
        if path.name in MEASURED or "checkpoints" in path.parts or "tensorboard" in path.parts:
            continue
        one, two = ((run / path).read_text() for run in twins)
        assert one.replace("ann3", "*") == two.replace("ann4", "*"), path  # the paths that the user chose
    for name in ("metrics.jsonl", "evaluation.json"):
        keys = [sorted(leaves(json.loads((run / name).read_text().splitlines()[0] if "jsonl" in name else
                                         (run / name).read_text()))) for run in twins]  # fmt: skip
        assert keys[0] == keys[1]


def leaves(value, at=""):
    """Yield the place of each number and text, and the texts themselves."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{at}.{key}")
    else:
        yield f"{at}={value}" if isinstance(value, str) else at
