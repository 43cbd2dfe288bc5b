"""The data set that `prepare` writes: the same on any number of cores, by Beam, and however often it was interrupted."""

import contextlib
import dataclasses
import json
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from rmft_jax.config import SourceConfig, load_config, to_yaml
from rmft_jax.data.corpus_values import corpus_values
from rmft_jax.data.pool import peak_memory, run_in_order
from rmft_jax.data.prepare import load_prepared, number_shards, prepare
from rmft_jax.data.ranks import rank_shards
from rmft_jax.data.shards import Shard
from rmft_jax.data.sources import read_documents
from rmft_jax.data.synthetic import synthetic_mail
from rmft_jax.data.tagged_corpus import read_corpus, serialize
from rmft_jax.data.tagged_shards import Job
from rmft_jax.data.tagging import Identities
from rmft_jax.data.work import work_folder
from rmft_jax.errors import UserError
from rmft_jax.files import write_arrays
from rmft_jax.pii.bank import build_bank
from rmft_jax.pii.detector import Detector
from rmft_jax.pii.values import keyed_hash

RMFT = [sys.executable, "-c", "from rmft_jax.cli import main; main()"]
ENRON = Path(__file__).parents[2] / "shared" / "data" / "enron_train.jsonl.gz"
MAILS = ["source.format=jsonl", f"source.path={ENRON}", "source.text_field=raw"]

def test_records_are_those_of_tfds():
    rng = np.random.default_rng(0)
    features = {"tokens": np.int32, "component_value": np.int32, "duplicate": np.uint8, "document": np.int64}
    counts = np.array([0, 1, 5, 300, 0])
    values = {
        "tokens": rng.integers(0, [128, 2**14, 2**31 - 1], size=(306, 3)).T[1].astype(np.int32),
        "component_value": rng.integers(-(2**31), 2**31, 306).astype(np.int32),
        "duplicate": rng.integers(0, 3, 306).astype(np.uint8),
        "document": rng.integers(0, 2**62, 306),
    }
    for top in (2, 128, 129, 2**14, 2**14 + 1, 2**31 - 1):
        values["tokens"] = rng.integers(0, top, 306).astype(np.int32)
        ours = serialize({name: (array, counts) for name, array in values.items()})
        specs = {name: tfds.features.Tensor(shape=(None,), dtype=dtype) for name, dtype in features.items()}
        serializer = ExampleSerializer(tfds.features.FeaturesDict(specs).get_serialized_info())
        cuts = {name: np.split(array, np.cumsum(counts)[:-1]) for name, array in values.items()}
        for number, record in enumerate(ours):
            example = serializer.get_tf_example({name: parts[number] for name, parts in cuts.items()})
            assert record == example.SerializeToString(deterministic=True)


MAIL = {
    "maildir/lay-k/inbox/1.": b"From: a@alder.example.com\nSubject: one\n\nHello\n",
    "maildir/lay-k/sent/1.": b"From: b@b.example.org\nSubject: \xff\xfe\n\nnot \xe9 UTF-8\n",
    "maildir/ring-a/inbox/2.": b"",
}


@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_the_builder_of_enron_emails(tmp_path, kind):
    """What tfds.testing.DatasetBuilderTestCase checks, which itself needs TensorFlow."""
    from rmft_jax.data.enron_emails import EnronEmails

    for name, raw in MAIL.items():
        path = tmp_path / "manual" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    if kind == "archive":
        with tarfile.open(tmp_path / "manual/enron_mail_20150507.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "manual/maildir", "maildir")
        shutil.rmtree(tmp_path / "manual/maildir")
    assert "enron_emails" in tfds.list_builders(with_community_datasets=False)
    builder = tfds.builder("enron_emails", data_dir=tmp_path / "tfds")
    assert isinstance(builder, EnronEmails) and str(builder.version) == "1.0.0"
    (url, registered), = builder.url_infos.items()
    assert url.startswith("https://www.cs.cmu.edu/") and (registered.size, len(registered.checksum)) == (443254787, 64)
    config = tfds.download.DownloadConfig(manual_dir=tmp_path / "manual")
    builder.download_and_prepare(download_config=config)
    assert builder.info.splits["train"].num_examples == 3 and builder.info.splits["train"].num_bytes > 0
    source = tfds.data_source("enron_emails", data_dir=tmp_path / "tfds", split="train")
    found = {record["id"].decode(): record for record in source}
    assert {f"maildir/{id}": record["raw"] for id, record in found.items()} == MAIL
    assert {record["mailbox"] for record in found.values()} == {b"lay-k", b"ring-a"}
    again = tfds.builder("enron_emails", data_dir=tmp_path / "tfds")
    again.download_and_prepare()  # is there: nothing is done
    assert again.info.splits["train"].shard_lengths == builder.info.splits["train"].shard_lengths
    documents = read_documents(SourceConfig(
        format="tfds", path=str(builder.data_path), text_field="raw", mail=True, limit=0, heldout_fraction=0.4,
    ))  # fmt: skip
    assert len(documents.train) + len(documents.heldout) == 2 and documents.faults["empty"] == 1


def test_somebody_elses_program_reads_the_data(prepared):
    script = Path(__file__).parents[1] / "docs" / "read_tagged_corpus.py"
    check = f"import runpy, sys; sys.argv = ['x', {str(prepared.directory)!r}]; runpy.run_path({str(script)!r}); " + (
        "assert not {'tensorflow', 'rmft_jax', 'jax'} & set(sys.modules), 'more was imported'"
    )
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    train = prepared.manifest["train"]
    assert lines[0].startswith(f"{train['documents']} documents, {train['pii_occurrences'] - prepared.identities} repeated")
    first = next(read_corpus(prepared.directory, "train"))
    assert done.stdout.partition("\n")[2] == prepared.tokenizer.decode(first["tokens"]) + "\n"


def test_tfds_lists_and_describes_the_data(prepared):
    builder = tfds.builder("tagged_corpus", data_dir=prepared.directory)
    assert str(builder.version) == "1.1.0" and "personal data" in builder.info.description
    assert builder.info.features["span_rank"].np_dtype == np.int32
    for split in ("train", "heldout"):
        assert builder.info.splits[split].num_examples == prepared.manifest[split]["documents"]
        assert builder.info.splits[split].num_bytes > 0
    whole = tfds.data_source("tagged_corpus", data_dir=prepared.directory, split="train[50%:]")
    assert len(whole) == pytest.approx(prepared.manifest["train"]["documents"] / 2, abs=1)


def test_no_tensorflow_is_imported_anywhere(tmp_path):
    """From reading the source to reading the data, and by the builders."""
    program = f"""
import sys
from rmft_jax.config import load_config
from rmft_jax.data.prepare import load_prepared, prepare
from rmft_jax.data.tagged_corpus import read_corpus
import rmft_jax.data.enron_emails
config = load_config(None, ["source.limit=60", "tokenizer.vocab_size=400", "out={tmp_path}", "source.shard_characters=9000"])
prepare(config)
assert len(list(read_corpus(load_prepared(config).directory, "train"))) == 54
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SETTINGS = ["source.limit=150", "tokenizer.vocab_size=400", "source.shard_characters=12000", "pii.types=[email,phone]",
            "canary.count=1", "canary.repetitions=[1,3]"]  # fmt: skip


def files_of(directory):
    """Return all that prepared data consist of; not what their secret makes different each time."""
    found = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    out = {name: path.read_bytes() for name, path in found.items() if name not in ("identity.key", "identities.npz")}
    with np.load(directory / "identities.npz") as arrays:
        return out | {name: arrays[name].tobytes() for name in arrays if name != "hashes"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the files of data that one process has prepared in one go."""
    config = load_config(None, [*SETTINGS, f"out={tmp_path_factory.mktemp('undisturbed')}"])
    prepare(config, workers=1)
    return files_of(config.data_dir)


def test_three_processes_write_what_one_writes(undisturbed, tmp_path):
    config = load_config(None, [*SETTINGS, f"out={tmp_path}"])
    prepare(config, workers=3)
    assert files_of(config.data_dir) == undisturbed
    assert sum(name.startswith("tagged_corpus/1.1.0/tagged_corpus-train") for name in undisturbed) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_one_shard_holds_what_many_hold(undisturbed, tmp_path):
    config = load_config(None, [*SETTINGS, f"out={tmp_path}", "source.shard_characters=1000000"])
    prepare(config)
    assert files_of(config.data_dir)["bank.npz"] == undisturbed["bank.npz"]
    many = load_config(None, [*SETTINGS, f"out={tmp_path / 'many'}"])
    prepare(many, workers=1)
    for split in ("train", "heldout"):
        pairs = zip(read_corpus(config.data_dir, split), read_corpus(many.data_dir, split), strict=True)
        assert all(np.array_equal(one[name], other[name]) for one, other in pairs for name in one)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_call_that_is_killed_at_any_moment_is_gone_on_with(undisturbed, tmp_path, kills):
    config = load_config(None, [*SETTINGS, f"out={tmp_path / 'out'}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [*RMFT, "prepare", str(tmp_path / "config.yaml"), "--workers", "2"]
    work, rng, redone, finished, killed = config.data_dir.with_name(".data.partial"), random.Random(5), 0, {}, 0
    while killed < kills:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        stage = ("texts", "tokenizer", "tagged", "ranks", "records", "final")[killed % 6]
        while process.poll() is None and not (work / stage).exists():
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if config.data_dir.exists():  # it was done
            assert files_of(config.data_dir) == undisturbed
            shutil.rmtree(config.data_dir)
            finished = {}
            continue
        wait_for_the_end_of(process.pid)  # its workers end with the shard they are at
        redone += sum((work / name).stat().st_mtime_ns != when for name, when in finished.items() if (work / name).exists())
        finished = {
            str(path.relative_to(work)): path.stat().st_mtime_ns
            for stage in ("texts", "tagged", "records") for path in work.glob(f"{stage}/[!.]*")
        }  # fmt: skip
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert files_of(config.data_dir) == undisturbed and not redone
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data"]


def wait_for_the_end_of(group: int) -> None:
    """Wait until no process of a session is left, 10 seconds at most: where nobody asks for them, the dead stay listed."""
    end = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.01)


def test_what_is_left_of_other_settings_is_not_gone_on_with(undisturbed, tmp_path):
    other = load_config(None, [*SETTINGS, f"out={tmp_path}", "source.limit=40"])
    with work_folder(other.data_dir, [], []) as folder:
        (folder / "texts").mkdir()
        (folder / "texts/read.json").write_text("{}")
        with pytest.raises(UserError, match="another call"), work_folder(other.data_dir, [], []):
            pass
        shutil.copytree(folder, tmp_path / "kept")
    shutil.move(tmp_path / "kept", folder)
    config = load_config(None, [*SETTINGS, f"out={tmp_path}"])
    prepare(config, workers=1)
    assert files_of(config.data_dir) == undisturbed


def test_a_grain_source_is_read_again_only_when_it_is_another(tmp_path, monkeypatch):
    """And its data are those of the same texts in a file."""
    mails = [item["text"] for item in synthetic_mail(60, seed=0)]
    code = f"""
mails, reads = {mails!r}, []

class Mails:
    def __len__(self):
        return len(mails)
    def __getitem__(self, number):
        reads.append(number)
        return {{"text": mails[number]}}
"""
    (tmp_path / "mails_of_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import mails_of_test

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in mails))
    settings = [*SETTINGS, "source.shard_characters=9000", "source.limit=0"]
    of_grain = [*settings, "source.format=grain", "source.path=mails_of_test:Mails", f"out={tmp_path / 'grain'}"]

    def stop(*_):
        raise RuntimeError("cut off")

    def cut_off(*more):
        before = len(mails_of_test.reads)  # of all calls
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut off"):
            patch.setattr("rmft_jax.data.prepare.flag_duplicates", stop)
            prepare(load_config(None, [*of_grain, *more]), workers=1)
        return len(mails_of_test.reads) - before

    assert [cut_off(), cut_off(), cut_off("source.version=2"), cut_off("source.version=2")] == [60, 0, 60, 0]
    with (tmp_path / "mails_of_test.py").open("a") as file:
        file.write("\n")
    assert cut_off("source.version=2") == 60
    mails_of_test.mails.append("One more.")
    assert cut_off("source.version=2") == 61
    mails_of_test.mails.pop()
    found = prepare(load_config(None, [*of_grain, "source.version=2"]), workers=2)
    other = prepare(load_config(None, [*settings, "source.format=jsonl", f"source.path={tmp_path}/a.jsonl",
                                       f"out={tmp_path / 'jsonl'}"]), workers=1)  # fmt: skip
    assert found["content_hash"] == other["content_hash"]


def test_a_worker_that_dies_is_named():
    with pytest.raises(RuntimeError, match="exit code 3"):
        list(run_in_order(operator.call, os._exit, [3, 3], 2))
    with pytest.raises(ValueError, match="invalid literal"):  # an error of the work is raised as it is
        list(run_in_order(operator.call, int, ["1", "x", "2"], 2))
    assert list(run_in_order(operator.call, int, ["1", "2", "3"], 2)) == [1, 2, 3]


@pytest.mark.parametrize("documents", [300, pytest.param(12_000, marks=pytest.mark.slow)])
@pytest.mark.skipif(not ENRON.exists(), reason="the Enron sample is not beside the project")
def test_round_trip_on_enron(tmp_path, documents):
    """Tokens decode to the text, spans to the values; all values are tagged; ranks and identities are a dictionary's."""
    settings = [*MAILS, f"source.limit={documents}", f"source.shard_characters={documents * 100}"]
    config = load_config(None, [*settings, "tokenizer.vocab_size=2000", f"out={tmp_path}"])
    prepare(config)
    prepared, texts = load_prepared(config), read_documents(config.source)
    decode, identities = prepared.tokenizer.decode, Identities.empty()
    numbers = {"train": identities.add, "heldout": identities.look_up}
    for split in ("train", "heldout"):
        own, checked = getattr(texts, split), 0
        found = Detector(config.pii).detect_many(own)
        for text, spans, record in zip(own, found, read_corpus(config.data_dir, split), strict=True):
            assert decode(record["tokens"]) == text
            for name, values in numbers[split](spans).items():
                assert record[name].tolist() == values
            component = record["component"]
            owner = np.append(record["component_span"], -1)[component - 1]
            for number, span in enumerate(spans):
                tokens = record["tokens"][(component > 0) & (owner == number)]
                assert decode(tokens) == text[span.start : span.end]
            checked += len(spans)
        assert checked == prepared.manifest[split]["pii_occurrences"] > 0
    assert prepared.identity_counts.tolist() == identities.counts
    assert list(prepared.identity_hashes) == [keyed_hash(value, prepared.identity_key) for value in identities.index]


@pytest.mark.parametrize("source", ["synthetic", pytest.param("enron", marks=pytest.mark.slow)])
def test_beam_writes_what_one_machine_writes(tmp_path, source):
    pytest.importorskip("apache_beam", reason="needs rmft-jax[beam], an environment of its own")
    enron = [*MAILS, "source.limit=0", "tokenizer.vocab_size=4096", "source.shard_characters=2000000"]
    settings = SETTINGS if source == "synthetic" else enron
    found = []
    for runner in ("local", "beam"):
        config = load_config(None, [*settings, f"out={tmp_path / runner}"])
        manifest = prepare(config, runner=runner, beam_options=["--runner=DirectRunner"])
        found.append(files_of(config.data_dir))
    assert found[0] == found[1] and manifest["pii_identities"] > 100


def test_an_unknown_runner_is_refused(tmp_path):
    with pytest.raises(UserError, match="choose one of local, beam"):
        prepare(load_config(None, [*SETTINGS, f"out={tmp_path / 'x'}"]), runner="spark")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("fault, says", [
    (["source.format=jsonl", "source.path=none.jsonl"], "none.jsonl cannot be read"),
    (["source.format=jsonl", "source.path={bad}"], "line 2 is not valid JSON"),
    (["source.format=jsonl", "source.path={empty}"], "has no training documents"),
    (["tokenizer.vocab_size=90000"], "vocab_size 90000 is more than"),
    (["tokenizer.path={bad}"], "not a SentencePiece model"),
])  # fmt: skip
def test_a_fault_of_the_input_leaves_nothing_behind(tmp_path, fault, says):
    names = {name: tmp_path / f"{name}.jsonl" for name in ("bad", "empty")}
    names["bad"].write_bytes(b'{"text": "a"}\n{"text": \n')
    names["empty"].write_bytes(b"")
    config = load_config(None, [*SETTINGS, f"out={tmp_path / 'some/where'}", *(item.format(**names) for item in fault)])
    with pytest.raises(UserError, match=says):
        prepare(config, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "empty.jsonl"]


def test_a_large_corpus_is_not_searched_for_duplicates_and_says_so(tmp_path):
    config = load_config(None, [*SETTINGS, f"out={tmp_path}", "dedup.most_tokens=1000"])
    manifest = prepare(config, workers=1)
    assert manifest["duplicates"]["removed_tokens"] is None
    assert not any(record["duplicate"].any() for record in read_corpus(config.data_dir, "train"))
    load_prepared(config)
    with pytest.raises(UserError, match="larger dedup.most_tokens"):
        load_prepared(dataclasses.replace(config, dedup=dataclasses.replace(config.dedup, policy="near")))


def test_a_corpus_too_large_for_repeated_substrings_has_the_same_near_duplicates(tmp_path):
    settings = [*SETTINGS, "dedup.near_threshold=0.4"]
    every = load_config(None, [*settings, f"out={tmp_path / 'every'}"])
    near = load_config(None, [*settings, f"out={tmp_path / 'near'}", f"dedup.most_tokens={60 * 139}"])
    found = [prepare(config, workers=1) for config in (every, near)]
    assert found[0]["train"]["documents"] == 139 and found[0]["train"]["tokens"] > 60 * 139
    duplicates = [manifest["duplicates"] for manifest in found]
    assert duplicates[0]["near_documents"] == duplicates[1]["near_documents"] > 5 and duplicates[1]["removed_tokens"] is None
    pairs = zip(read_corpus(every.data_dir, "train"), read_corpus(near.data_dir, "train"), strict=True)
    assert all((one["duplicate"] == 1).tolist() == other["duplicate"].tolist() for one, other in pairs)
    load_prepared(dataclasses.replace(near, dedup=dataclasses.replace(near.dedup, policy="near")))
    with pytest.raises(UserError, match="not searched for duplicates"):
        load_prepared(dataclasses.replace(near, dedup=dataclasses.replace(near.dedup, policy="near_exact")))


def rank_a_large_corpus(folder, shards, new=4000, shared=6000):
    """Do what the main process does on tables of made-up values; print its peak of memory in MiB."""
    config = load_config(None, [f"out={folder}"])
    job, rng, values = Job(folder, config), np.random.default_rng(0), new + shared
    pool = rng.integers(0, 2**63, (10 * shared, 2)).astype(np.uint64)
    kinds = Detector(config.pii).kinds.names
    numbers = [Shard(number, np.arange(10), np.zeros(0, np.int64)) for number in range(shards)]
    for shard in numbers:
        known = pool[rng.choice(len(pool), shared, replace=False)]
        digests = np.concatenate([known, rng.integers(0, 2**63, (new, 2)).astype(np.uint64)])
        text = "\0".join(f"w{digest % 100_000}\0.\0stone\0@\0alder\0.\0com" for digest in digests[:, 0].tolist())
        write_arrays(job.tagged(shard), {
            "value_hash": digests, "value_count": rng.integers(1, 9, values), "value_parts": np.full(values, 7),
            "part_kind": np.tile([2, 0, 3, 0, 4, 0, 5], values), "part_text": np.frombuffer(text.encode(), np.uint8),
            "part_value": rng.integers(-(2**31), 2**31, 7 * values).astype(np.int32),
            "canary_place": np.zeros(0, np.int64), "pieces": np.zeros(0, np.int64), "text_bytes": np.int64(1),
            "kinds": np.frombuffer(json.dumps(kinds).encode(), np.uint8), "train_kinds": np.int64(len(kinds)),
            "train_document_spans": np.full(10, 4000), "train_document_tokens": np.full(10, 300_000),
        }, compress=False)  # fmt: skip
    rank_shards(job, numbers, 2)
    number_shards(job, numbers)
    found = corpus_values(job, numbers)
    build_bank(lambda texts: [[1]] * len(texts), found.sample, found.detector, rows=4096, seed=0,
               also=sorted(found.stocked), real=found.real)  # fmt: skip
    print(f"{len(found.hashes)} {peak_memory()[0]:.0f}")


@pytest.mark.parametrize("shards, most", [(8, 900), pytest.param(600, 2000, marks=pytest.mark.slow)])
def test_tables_of_a_large_corpus_fit_in_memory(tmp_path, shards, most):
    program = f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_prepare; "
    program += f"test_prepare.rank_a_large_corpus(pathlib.Path({str(tmp_path / 'job')!r}), {shards})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    identities, peak = map(int, done.stdout.split())
    print(f"{shards} shards, {identities:,} values: {peak} MiB")
    assert identities > 4000 * shards and peak < most
