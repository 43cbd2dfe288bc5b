"""From text to blocks without loss: round trips, ranks, and every token a target exactly once."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from documents import blocks_of, check_round_trip, random_texts, tagged

from rmft_jax.config import SourceConfig, load_config
from rmft_jax.data import loader
from rmft_jax.data.blocks import Blocks, Corpus
from rmft_jax.data.loader import batches, sequential_batches
from rmft_jax.data.packing import best_fit
from rmft_jax.data.prepare import load_prepared, prepare
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.data.sources import read_documents
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.errors import UserError
from rmft_jax.kernels import target_mask
from rmft_jax.pii.detector import detect
from rmft_jax.training.setup import load_blocks

ENRON = Path(__file__).parents[2] / "shared" / "data" / "enron_train.jsonl.gz"


def test_round_trip_on_random_documents(prepared):
    check_round_trip(random_texts(500, seed=1), prepared.tokenizer)


def test_round_trip_on_bundled_mail(prepared, tiny):
    check_round_trip(read_documents(tiny().source).train, prepared.tokenizer)


@pytest.mark.skipif(not ENRON.exists(), reason="the Enron sample is not beside the project")
def test_round_trip_on_enron():
    config = load_config(None, ["source.format=jsonl", f"source.path={ENRON}", "source.text_field=raw", "source.limit=400"])
    texts = read_documents(config.source).train
    tokenizer = SentencePieceTokenizer.train([text for text in texts if "@" not in text] + texts, config.tokenizer)
    check_round_trip(texts, tokenizer)


def test_no_piece_of_the_vocabulary_holds_pii(prepared, tiny):
    values = {span.value for text in read_documents(tiny().source).train for span in detect(text)}
    pieces = [prepared.tokenizer.decode([id]) for id in range(prepared.tokenizer.vocab_size)]
    assert not any("@" in piece and len(piece) > 1 for piece in pieces)
    assert not any(piece.strip().lower() in values for piece in pieces)


def test_no_surrogate_is_a_real_component(prepared, tiny):
    texts = read_documents(tiny().source).train
    real = {word for text in texts for span in detect(text) for word in span.value.partition("@")[0].split(".")}
    bank = prepared.bank
    words = {prepared.tokenizer.decode(bank.entry(1, row)) for row in range(int(bank.counts[1]))}
    assert len(words) > 300 and not words & real


def test_every_token_is_a_target_once(prepared):
    for stride in (7, 40, 10_000):
        blocks = blocks_of(tagged(random_texts(60, seed=5), prepared.tokenizer)[2], stride=stride)
        targets, documents = [], []
        for batch, owner in sequential_batches(blocks, batch_size=4):
            is_target = np.asarray(target_mask(batch.segment_ids))
            targets += batch.tokens[:, 1:][is_target].tolist()
            documents += owner[:, 1:][is_target].tolist()
        first = np.concatenate([[True], np.diff(blocks.corpus.document) > 0])
        assert targets == blocks.corpus.tokens[~first].tolist()
        assert documents == blocks.corpus.document[~first].tolist()


def test_loader_is_a_permutation_each_epoch_split_without_loss_and_resumable(prepared):
    blocks = blocks_of(tagged(random_texts(200, seed=6), prepared.tokenizer)[2], stride=20)
    size = len(blocks)
    original = [blocks[i]["tokens"].tolist() for i in range(size)]

    def rows(start=0, steps=2 * size // 8, process=0, processes=1):
        source = batches(blocks, batch_size=8, seed=3, start=start, process=process, processes=processes)
        return [
            [(row.tolist(), int(epoch)) for row, epoch in zip(batch.tokens, batch.epoch, strict=True)]
            for _, batch in zip(range(steps), source, strict=False)
        ]

    whole = rows()
    flat = [row for batch in whole for row in batch]
    for epoch in (0, 1):
        got = [row for row, e in flat if e == epoch]
        assert sorted(got) == sorted(original)[: len(got)] or set(map(tuple, got)) <= set(map(tuple, original))
    assert sorted(row for row, _ in flat[:size]) == sorted(original)
    assert [row for row, _ in flat[:size]] != original
    assert [row for row, _ in flat[:size]] != [row for row, _ in flat[size : 2 * size]]
    assert rows(start=5, steps=4) == whole[5:9]
    for hosts in (1, 2, 4):  # goes on after 5 steps, to the end of the epoch and beyond
        left = len(whole) - 5
        parts = [rows(start=5, steps=left, process=host, processes=hosts) for host in range(hosts)]
        for step in range(left):
            assert sorted(row for part in parts for row in part[step]) == sorted(whole[5 + step])


@pytest.mark.parametrize("stride", [9, 30, 200])
def test_best_fit_keeps_short_documents_whole_and_every_token_a_target_once(prepared, stride):
    records = tagged(random_texts(300, seed=8), prepared.tokenizer)[2]
    lengths = np.array([len(record["tokens"]) for record in records])
    order, edges = best_fit(lengths, stride)
    blocks = Blocks(Corpus([records[number] for number in order]), stride=stride, edges=edges)
    targets, rows_of = {number: [] for number in range(len(records))}, {number: set() for number in range(len(records))}
    filled = rows = 0
    for index in range(len(blocks)):
        row, owner = blocks[index], blocks.documents(index)
        is_target = np.asarray(target_mask(row["segment_ids"][None]))[0]
        for token, document in zip(row["tokens"][1:][is_target], owner[1:][is_target], strict=True):
            targets[document].append(token)
            rows_of[document].add(index)
        assert (owner >= 0).sum() == (row["segment_ids"] > 0).sum() > 1
        filled, rows = filled + (owner >= 0).sum(), rows + 1
    for number, record in enumerate(records):
        assert targets[number] == record["tokens"][1:].tolist()
        assert len(rows_of[number]) == max(1, -(-(len(record["tokens"]) - 1) // stride))
    assert filled >= rows * (stride + 1) / 2
    if lengths.max() <= stride + 1:
        assert rows <= 11 / 9 * -(-lengths.sum() // (stride + 1)) + 1


def test_best_fit_in_training_data_takes_tags_along(prepared, tiny, tmp_path):
    tags = np.concatenate([np.full(len(record["tokens"]), record["document"] % 3) for record in
                           read_corpus(prepared.directory, "train")])  # fmt: skip
    np.save(tmp_path / "tags.npy", tags)
    settings = ["training.packing=best_fit", "dedup.policy=near_exact", f"tracker.tags={tmp_path / 'tags.npy'}"]
    blocks, _ = load_blocks(tiny(*settings, "tracker.tag_names=[a,b]"), prepared)
    plain, _ = load_blocks(tiny("dedup.policy=near_exact"), prepared)
    assert (blocks.corpus.tag == blocks.corpus.document % 3).all() and len(blocks) > len(plain)
    assert sorted(blocks.corpus.tokens.tolist()) == sorted(plain.corpus.tokens.tolist())
    spans = lambda corpus: sorted(zip(*(corpus.span[name].tolist() for name in ("identity", "rank", "id")), strict=True))  # noqa: E731
    assert spans(blocks.corpus) == spans(plain.corpus)


def test_prepared_data_are_read_by_plain_tfds_without_tensorflow(prepared):
    import sys

    import tensorflow_datasets as tfds

    folder = prepared.directory / "tagged_corpus" / "1.1.0"
    source = tfds.builder_from_directory(str(folder)).as_data_source("train")
    assert len(source) == prepared.manifest["train"]["documents"]
    assert set(source[0]) >= {"tokens", "component", "span_rank", "document"}
    assert "tensorflow" not in sys.modules


def test_prepare_counts_and_repeats_itself(tiny, tmp_path):
    config = load_config(None, ["source.limit=60", "tokenizer.vocab_size=600", f"out={tmp_path}/a"])
    manifest = prepare(config)
    documents = read_documents(config.source)
    found = [span.value for text in documents.train for span in detect(text)]
    assert manifest["train"]["pii_occurrences"] == len(found)
    assert manifest["pii_identities"] == len(set(found))
    assert manifest["pii_repeating_pct"] == pytest.approx(100 * (1 - len(set(found)) / len(found)))
    again = prepare(load_config(None, ["source.limit=60", "tokenizer.vocab_size=600", f"out={tmp_path}/b"]))
    assert again["content_hash"] == manifest["content_hash"]
    with pytest.raises(UserError, match="source.limit"):
        load_prepared(load_config(None, ["source.limit=61", "tokenizer.vocab_size=600", f"out={tmp_path}/a"]))
    assert (tmp_path / "a/data/identity.key").stat().st_mode & 0o077 == 0


def test_dedup_leaves_out_what_was_flagged(tiny, prepared):
    from rmft_jax.training.setup import load_blocks

    records = list(read_corpus(prepared.directory, "train"))
    for policy, kept in (("none", {0, 1, 2}), ("near", {0, 2}), ("near_exact", {0})):
        blocks, _ = load_blocks(tiny(f"dedup.policy={policy}"), prepared)
        expected = np.concatenate([r["tokens"][np.isin(r["duplicate"], list(kept))] for r in records])
        assert blocks.corpus.tokens.tolist() == expected.tolist()
    assert sum((r["duplicate"] == 1).any() for r in records) > 0 < sum((r["duplicate"] == 2).any() for r in records)


def test_sources(tmp_path):
    path = tmp_path / "mail.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "two"}\nnot json\n{"text": "three"}\n{"body": "four\\n"}\n')
    base = ["source.format=jsonl", f"source.path={path}", "source.text_field=body", "source.heldout_fraction=0.3"]
    with pytest.raises(UserError, match="line 4 is not valid JSON"):
        read_documents(load_config(None, base).source)
    documents = read_documents(load_config(None, [*base, "source.on_error=skip"]).source)
    assert sorted(documents.train + documents.heldout) == ["four\n", "one", "two"] and documents.skipped == 2
    text = tmp_path / "plain.txt"
    text.write_bytes("a\nb\n<|endoftext|>\nc\r\nd\n<|endoftext|>\n \xff\n".encode("latin-1"))
    base = ["source.format=text", f"source.path={text}", "source.heldout_fraction=0.3"]
    documents = read_documents(load_config(None, base).source)
    assert sorted(documents.train + documents.heldout) == [" \ufffd\n", "a\nb\n", "c\r\nd\n"]
    with pytest.raises(UserError, match="no training documents|no held-out documents"):
        (tmp_path / "empty.jsonl").write_text("")
        read_documents(load_config(None, ["source.format=jsonl", f"source.path={tmp_path}/empty.jsonl"]).source)


def test_detection_of_addresses():
    cases = {
        "to Ann.Lee@Example.COM.": ["ann.lee@example.com"],
        "<a@b.co>,c_d@e-f.org;x": ["a@b.co", "c_d@e-f.org"],
        "f..brawner@enron.com": ["f..brawner@enron.com"],
        "'o'neil@x.com'": ["o'neil@x.com"],
        "evans@thyme and @home.com and a@b": [],
        "=20joe@x.com": ["20joe@x.com"],
        "mailto:joe+tag@mail.x.co.uk?subject": ["joe+tag@mail.x.co.uk"],
        "x" * 100_000 + "@" + "y" * 100: [],
    }
    for text, values in cases.items():
        assert [span.value for span in detect(text)] == values, text[:40]
    assert json.dumps([s.value for s in detect("a@b.co A@B.CO", ignore=frozenset({"a@b.co"}))]) == "[]"


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Prepare a small data set of TFDS, as somebody else would; return its folder."""
    import tensorflow_datasets as tfds

    class SomeTexts(tfds.core.GeneratorBasedBuilder):
        """Texts in two splits."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, description="Texts.", features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("read", 6), "validation": self._generate_examples("kept", 2)}

        def _generate_examples(self, word, count):
            for number in range(count):
                yield number, {"text": f"{word} {number} naïve"}

    builder = SomeTexts(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def test_documents_come_from_a_data_set_of_tfds(tfds_folder):
    config = SourceConfig(format="tfds", path=tfds_folder, heldout_path="validation")
    documents = read_documents(config)
    assert sorted(documents.train) == [f"read {number} naïve" for number in range(6)]
    assert sorted(documents.heldout) == ["kept 0 naïve", "kept 1 naïve"]
    sliced = read_documents(dataclasses.replace(config, split="train[:50%]", heldout_limit=1))
    assert (len(sliced.train), len(sliced.heldout)) == (3, 1)


def test_a_data_set_of_tfds_that_cannot_be_read_is_named(tfds_folder):
    for settings, says in (
        ({"path": "no_such_data_set_anywhere"}, "no_such_data_set_anywhere"),
        ({"split": "test"}, "split test"),
        ({"text_field": "body"}, "fields: text"),
    ):
        with pytest.raises(UserError, match=says) as error:
            read_documents(SourceConfig(**{"format": "tfds", "path": tfds_folder} | settings))
        assert "\n" not in str(error.value)


def test_the_help_topics_of_python_are_a_source():
    from pydoc_data.topics import topics

    documents = read_documents(SourceConfig(format="python_docs", limit=5, heldout_fraction=0.4))
    assert len(documents.train) == 3 and len(documents.heldout) == 2
    assert {*documents.train, *documents.heldout} == {topics[name] for name in sorted(topics)[:5]}


def test_rows_that_are_kept_are_those_that_are_made(prepared, tiny, monkeypatch):
    blocks, _ = load_blocks(tiny(), prepared)
    taken = lambda: list(itertools.islice(batches(blocks, batch_size=8, seed=3), 2 * len(blocks) // 8))  # noqa: E731
    kept = taken()
    monkeypatch.setattr(loader, "_KEPT_BYTES", 0)
    for one, two in zip(kept, taken(), strict=True):
        for name, value in one._asdict().items():
            np.testing.assert_array_equal(value, getattr(two, name), err_msg=name)
            assert value.dtype == np.int32
