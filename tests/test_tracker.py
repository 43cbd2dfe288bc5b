"""What is counted as memorized: against a count by hand, on any split of the batch, in what runs and `rmft track` write."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from documents import SMALL
from test_cli import rmft

from rmft_jax.config import load_config
from rmft_jax.data.blocks import Corpus
from rmft_jax.data.loader import batches
from rmft_jax.data.prepare import load_prepared, prepare
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.errors import UserError
from rmft_jax.kernels import (
    SURROGATE,
    example_counts,
    first_memorized,
    mask_batch,
    memorized,
    run_lengths,
    slice_counts,
    target_mask,
)
from rmft_jax.memorization.tracker import load_examples, track
from rmft_jax.models.gpt import forward
from rmft_jax.training import loop
from rmft_jax.training.checkpoints import Checkpoints
from rmft_jax.training.loop import put, train
from rmft_jax.training.masking import masking_key, masking_rules
from rmft_jax.training.mesh import batch_sharding, make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks, load_run_config
from rmft_jax.training.step import compile_train_step, init_state
from rmft_jax.training.tracker import TrackerShape, init_tracker, tracker_shape, update_tracker
from rmft_jax.training.tracker_log import TrackerLog

ROOT = Path(__file__).parent.parent
TRACK = [*SMALL, "tracker.enabled=true", "training.sequence_length=32", "training.batch_size=40", "training.log_every=3"]


class ByHand:
    """The counters of a tracker, counted token by token."""

    def __init__(self, shape: TrackerShape):
        self.hits, self.targets = np.zeros((2, shape.rounds, shape.slices), int)
        self.lengths = np.zeros((shape.rounds, shape.bins), int)
        self.of_examples = np.zeros((2, shape.examples), int)
        self.first = np.full(shape.examples, -1)

    def add(self, batch, masked, hit, step):
        for b in range(len(hit)):
            round, run, whole = batch.epoch[b] % len(self.hits), 0, []
            for t in range(1, masked.tokens.shape[1] + 1):  # one beyond the end, where the last run ends
                inside = t < masked.tokens.shape[1] and 0 < masked.segment_ids[b, t] == masked.segment_ids[b, t - 1]
                origin = masked.origin[b, t] if inside else SURROGATE
                if inside:
                    tag = batch.tag[b, masked.source[b, t]] if origin != SURROGATE else 0
                    for slice in (origin, 2 + tag) if tag else (origin,):
                        self.targets[round, slice] += 1
                        self.hits[round, slice] += hit[b, t - 1]
                true_hit = origin != SURROGATE and hit[b, t - 1]
                if inside and origin != SURROGATE:
                    whole.append(true_hit)
                if true_hit:
                    run += 1
                elif run:
                    self.lengths[round, min(run, self.lengths.shape[1]) - 1] += 1
                    run = 0
            self.of_examples[:, batch.example[b]] += sum(whole), len(whole)
            if whole and all(whole) and self.first[batch.example[b]] < 0:
                self.first[batch.example[b]] = step

    def check(self, tracker):
        counts, examples = jax.device_get((tracker["counts"], tracker["examples"]))
        for name in ("hits", "targets", "lengths"):
            np.testing.assert_array_equal(counts[name], getattr(self, name), err_msg=name)
        np.testing.assert_array_equal([examples["hits"], examples["targets"]], self.of_examples)
        np.testing.assert_array_equal(examples["first"], self.first)
        assert counts["whole"] == (self.first >= 0).sum()


def test_runs_are_maximal_and_end_where_a_document_or_a_row_does():
    rng = np.random.default_rng(0)
    right = rng.random((3, 5, 40)) < 0.7
    segments = np.cumsum(rng.random((3, 5, 40)) < 0.1, axis=-1)
    for bins in (40, 4):
        runs = jax.jit(jax.vmap(lambda right, segments: run_lengths(right, segments, bins)))(right, segments)  # noqa: B023
        for place in np.ndindex(3, 5):
            both = zip(segments[place], right[place], strict=True)
            lengths = np.array([len(list(group)) for (_, is_right), group in itertools.groupby(both) if is_right])
            expected = np.bincount(np.minimum(lengths, bins), minlength=bins + 1)[1:]
            np.testing.assert_array_equal(runs.histogram[place], expected)
            found = runs.count[place], runs.total[place], runs.longest[place]
            assert found == (len(lengths), lengths.sum(), lengths.max(initial=0))
    whole = run_lengths(jnp.ones((2, 6), bool), jnp.array([[1, 1, 1, 2, 2, 2]] * 2), 6)
    assert whole.count.tolist() == [2, 2] and whole.longest.tolist() == [3, 3]  # not 12, and not 6


def test_counts_of_slices_and_examples():
    rng = np.random.default_rng(1)
    hit, target, weights = rng.random((3, 6, 20)) < 0.5
    ids = rng.integers(-1, 6, (6, 20))  # -1 and 5 are no slices
    hits, targets = jax.jit(slice_counts, static_argnums=3)(hit, target, ids, 5)
    assert hits.tolist() == [(hit & target & (ids == n)).sum() for n in range(5)]
    assert targets.tolist() == [(target & (ids == n)).sum() for n in range(5)]
    np.testing.assert_array_equal(memorized(hit, target, weights.astype(float)), hit & target & weights)
    np.testing.assert_array_equal(example_counts(hit, target), [(hit & target).sum(1), target.sum(1)])
    first = first_memorized(jnp.array([-1, 4, -1, -1]), jnp.array([1, 3, 3, 0, 9]), jnp.array([1, 1, 0, 0, 1], bool), 7)
    assert first.tolist() == [-1, 4, -1, 7]


def random_batch(rng, template, masked, shape):
    """Return a tagged and a masked batch of ragged packed rows, in the form of the given ones, and hits."""
    rows, width = masked.tokens.shape
    tags = shape.slices - 3
    segments = np.cumsum(rng.random((rows, width)) < 0.1, axis=1) + 1
    segments[np.arange(width) >= rng.integers(2, width + 1, (rows, 1))] = 0
    masked = masked._replace(
        segment_ids=segments.astype(np.int32),
        origin=rng.choice(3, (rows, width), p=[0.7, 0.2, 0.1]).astype(np.int32),
        source=np.sort(rng.integers(0, template.tag.shape[1], (rows, width)), axis=1).astype(np.int32),
    )
    batch = template._replace(
        tag=rng.integers(0, tags + 1, template.tag.shape).astype(np.int32),
        epoch=rng.integers(0, 5, rows).astype(np.int32),
        example=rng.integers(0, shape.examples, rows).astype(np.int32),  # some of them twice
    )
    return batch, masked, rng.random((rows, width - 1)) < rng.choice([0.3, 0.8, 1.0], (rows, 1))


@pytest.mark.parametrize("devices", [1, 8])
def test_counters_equal_a_count_by_hand_on_any_number_of_devices(tiny, prepared, devices):
    config = tiny(*SMALL, "training.batch_size=16", "training.sequence_length=32")
    blocks, _ = load_blocks(config, prepared)
    template = next(batches(blocks, batch_size=16, seed=0))
    masked = mask_batch(template, prepared.bank, jax.random.key(0), length=33, rules=masking_rules(config))
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    rows, whole = batch_sharding(mesh), replicated(mesh)
    update = jax.jit(update_tracker, in_shardings=(whole, rows, rows, rows, whole), out_shardings=whole)
    rng = np.random.default_rng(devices)
    shape = TrackerShape(rounds=3, slices=5, bins=8, examples=24)
    tracker, by_hand = jax.device_put(init_tracker(shape), whole), ByHand(shape)
    for step in range(1, 6):
        batch, shown, hit = random_batch(rng, template, jax.device_get(masked), shape)
        tracker = jax.block_until_ready(update(tracker, batch, shown, hit, np.int32(step)))
        by_hand.add(batch, shown, hit, step)
    by_hand.check(tracker)
    assert by_hand.lengths[:, -1].sum() > 0 and (by_hand.first > 0).sum() > 3


def begin(config, prepared, devices=1):
    """Return everything that steps with a tracker need."""
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:devices]), make_optimizer(config.training, 50)
    blocks, _ = load_blocks(config, prepared)
    shape = tracker_shape(config, len(blocks))
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, shape)
    source = batches(blocks, batch_size=config.training.batch_size, seed=config.seed)
    bank = jax.device_put(prepared.bank, replicated(mesh))
    return mesh, optimizer, jax.device_put(state, shardings_for(state, mesh)), source, bank, len(blocks)


@pytest.fixture(scope="module")
def learned(tiny, prepared):
    """Return parameters that have learned a little, as numpy arrays."""
    config = tiny(*TRACK, "training.warmup_steps=0", "training.learning_rate=0.01", "tracker.enabled=false")
    mesh, optimizer, state, source, bank, _ = begin(config, prepared)
    step = compile_train_step(config, optimizer, mesh, state)
    for _ in range(20):
        state, _ = jax.block_until_ready(step(state, put([next(source)], mesh), bank))
    return jax.device_get(state["params"])


def argmax_hits(params, config, tokens, segments):
    """Return bool [B, N-1]: which next tokens a plain forward pass takes for the likeliest."""
    logits = jax.jit(lambda params, *rows: forward(params, config.model, *rows))(params, tokens[:, :-1], segments[:, :-1])
    return np.asarray(logits.argmax(-1) == tokens[:, 1:])


@pytest.mark.parametrize(("devices", "accumulation"), [(1, 4), (8, 1)])
def test_the_step_counts_what_its_model_predicts(tiny, prepared, learned, devices, accumulation):
    config = tiny(*TRACK, "masking.policy=keep_first", f"training.accumulation={accumulation}")
    mesh, optimizer, state, source, bank, _ = begin(config, prepared, devices)
    state["params"] = jax.device_put(learned, shardings_for(learned, mesh))
    step, batch = compile_train_step(config, optimizer, mesh, state), next(source)
    by_hand = ByHand(tracker_shape(config, state["tracker"]["examples"]["first"].size))
    masked = mask_batch(batch, prepared.bank, masking_key(config.seed), length=33, rules=masking_rules(config))
    hit = argmax_hits(learned, config, masked.tokens, masked.segment_ids)
    by_hand.add(batch, jax.device_get(masked), hit, 1)
    state, _ = jax.block_until_ready(step(state, put([batch], mesh), bank))
    by_hand.check(state["tracker"])
    assert (by_hand.targets.sum(0) > 0).all() and by_hand.hits.sum() > 50


def test_reports_do_not_depend_on_steps_per_dispatch_and_nothing_is_read_between_them(tiny, prepared, learned, tmp_path):
    config = tiny(*TRACK, "training.learning_rate=0")  # the same model in both, whatever the order of sums
    files = []
    for steps in (1, 8):
        mesh, optimizer, state, source, bank, blocks = begin(config, prepared)
        state["params"] = jax.device_put(learned, shardings_for(learned, mesh))
        step = compile_train_step(config, optimizer, mesh, state, steps=steps)
        (tmp_path / str(steps)).mkdir()
        log = TrackerLog(tmp_path / str(steps), config, blocks, 0, state["tracker"]["counts"])
        for last in range(steps, 25, steps):
            batch = put([next(source) for _ in range(steps)], mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch, bank)
                jax.block_until_ready(state)
                counts = metrics["tracker"]
                if steps == 1 and last % 3:  # no report is due of this step
                    counts = jax.tree.map(lambda _: Unreadable(), counts)
            log.add(last, steps, counts)
        log.flush()
        files.append((tmp_path / str(steps) / "memorization.jsonl").read_text().splitlines())
    assert files[0] == files[1]
    intervals = [record for record in map(json.loads, files[0]) if record["kind"] == "interval"]
    assert {record["step"] for record in intervals} == set(range(3, 25, 3)) and intervals[-1]["slices"]["all"]["m"] > 0.02


class Unreadable:
    """Stands for an array on the device that must not be fetched."""

    def __array__(self, *_, **__):
        raise AssertionError("the counters were read where no report is due")


def test_differences_are_right_beyond_the_end_of_32_bits(tiny, tmp_path):
    config = tiny(*TRACK)
    near = np.full((2, 3), 2**32 - 4, np.uint32), np.full((2, 32), 2**32 - 1, np.uint32)
    counts = {"hits": near[0], "targets": near[0], "lengths": near[1], "whole": np.int32(0)}
    log = TrackerLog(tmp_path, config, 40 * 100, 0, counts)
    add = {"hits": [7, 1, 0], "targets": [9, 2, 5]}
    new = counts | {name: near[0] + np.array([values, [0] * 3], np.uint32) for name, values in add.items()}
    new["lengths"] = near[1] + np.eye(2, 32, dtype=np.uint32) * np.array([[8], [0]], np.uint32)
    log.add(3, 1, new)
    log.flush()
    record = json.loads((tmp_path / "memorization.jsonl").read_text().splitlines()[-1])
    assert {name: (value["hits"], value["targets"]) for name, value in record["slices"].items()} == {
        "all": (8, 11), "text": (7, 9), "pii": (1, 2), "surrogate": (0, 5),
    }  # fmt: skip
    assert record["runs"] == {"count": 8, "mean": 1.0, "longest": 1, "histogram": [8]}


def test_surrogates_are_neither_hits_nor_targets_of_what_they_replace(tiny, prepared):
    """A model that predicts all that it is shown has memorized no address that it was not shown."""
    config = tiny(*TRACK, "masking.policy=all", "masking.anchor=none", "tracker.tags=x", "tracker.tag_names=[addresses]")
    blocks, _ = load_blocks(dataclasses.replace(config, tracker=tiny().tracker), prepared)
    batch = next(batches(blocks, batch_size=40, seed=0))
    batch = batch._replace(tag=(batch.component > 0).astype(np.int32))
    masked = mask_batch(batch, prepared.bank, masking_key(0), length=33, rules=masking_rules(config))
    hit = jnp.ones_like(masked.tokens[:, 1:], bool)
    counts = jax.jit(update_tracker)(init_tracker(tracker_shape(config, len(blocks))), batch, masked, hit, 1)["counts"]
    text, pii, surrogate, addresses = counts["hits"][0]
    is_target, origin = target_mask(masked.segment_ids), masked.origin[:, 1:]
    assert surrogate == (is_target & (origin == SURROGATE)).sum() > 50
    kept = np.take_along_axis(batch.tokens, np.minimum(masked.source, batch.tokens.shape[1] - 1), axis=1) == masked.tokens
    assert text + pii <= (is_target & kept[:, 1:]).sum() and pii == addresses < 0.5 * surrogate  # literal text of addresses
    assert (counts["lengths"][0] * np.arange(1, 33)).sum() == text + pii


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Return a function that makes a config for a few documents, prepared, whose epochs are short."""
    settings = [*TINY, "source.limit=8", f"out={tmp_path_factory.mktemp('few')}"]
    prepare(load_config(None, settings))
    return lambda *overrides: load_config(None, [*settings, *overrides])


@pytest.fixture(scope="module")
def whole(few):
    """Return a run with a tracker, over some epochs."""
    return train(few(*RUN, "name=tracked"))


RUN = [*TRACK, "training.steps=20", "checkpoint.count=2", "checkpoint.every_steps=4", "checkpoint.keep_last=2",
       "training.learning_rate=0.01", "training.warmup_steps=0"]  # fmt: skip


def test_a_resumed_run_writes_the_same_curves(few, whole, tmp_path, monkeypatch):
    config = few(*RUN, "name=tracked", f"out={tmp_path}", f"data={few().data_dir}")
    original = loop.MetricsLog.add

    def dies(self, step, count, metrics):
        if step == 14:
            raise KeyboardInterrupt
        original(self, step, count, metrics)

    monkeypatch.setattr(loop.MetricsLog, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    checkpoints, newest = Checkpoints.open(config.run_dir)
    checkpoints.close()
    assert newest == 12
    resumed = train(config)
    files = [(run / "memorization.jsonl").read_text() for run in (whole, resumed)]
    assert files[0] == files[1]
    a, b = load_examples(whole), load_examples(resumed)
    assert all(np.array_equal(a[name], b[name]) for name in ("hits", "targets", "first"))


def test_every_target_is_counted_once_an_epoch_however_batches_fall(whole):
    config = load_run_config(whole)
    blocks, _ = load_blocks(config, load_prepared(config))
    assert len(blocks) % config.training.batch_size
    header, *records = map(json.loads, (whole / "memorization.jsonl").read_text().splitlines())
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert header["examples"] == len(blocks) and len(epochs) == 20 * config.training.batch_size // len(blocks) >= 2
    targets = len(blocks.corpus.tokens) - (blocks.corpus.document.max() + 1)
    pii = sum(int((target_mask(row["segment_ids"][None])[0] & (row["component"][1:] > 0)).sum()) for row in blocks)
    for number, epoch in enumerate(epochs):
        slices, runs = epoch["slices"], epoch["runs"]
        assert epoch["epoch"] == number and slices["all"]["targets"] == targets and slices["pii"]["targets"] == pii
        assert slices["text"]["targets"] + pii == targets and slices["surrogate"]["m"] is None
        assert np.dot(runs["histogram"], np.arange(1, runs["longest"] + 1)) == slices["all"]["hits"]
    assert epochs[-1]["slices"]["all"]["m"] > 3 * epochs[0]["slices"]["all"]["m"]
    examples = load_examples(whole)
    assert examples["targets"].sum() == sum(r["slices"]["all"]["targets"] for r in records if r["kind"] == "interval")
    assert (examples["first"] > 0).sum() == records[-1]["examples_memorized"]


def test_track_counts_saved_checkpoints_as_a_plain_pass_does(whole, capsys):
    config = load_run_config(whole)
    code, out, _ = rmft("track", whole, "--json", capsys=capsys)
    (result,) = json.loads(out)
    assert code == 0 and result == json.loads((whole / "track.json").read_text())
    blocks, _ = load_blocks(config, load_prepared(config))
    checkpoints, step = Checkpoints.open(whole)
    params = checkpoints._manager.restore(step)["params"]["params"]
    checkpoints.close()
    rows = [blocks[number] for number in range(len(blocks))]
    tokens, segments = (np.stack([row[name] for row in rows]) for name in ("tokens", "segment_ids"))
    right = argmax_hits(params, config, tokens, segments) & np.asarray(target_mask(segments))
    entry = result["checkpoints"][-1]
    assert entry["step"] == step == 20 and entry["slices"]["all"]["hits"] == right.sum() > 100
    lengths = [len(list(group)) for row in right for is_right, group in itertools.groupby(row) if is_right]
    assert entry["runs"]["count"] == len(lengths) and entry["runs"]["longest"] == max(lengths)
    code, out, _ = rmft("track", whole, capsys=capsys)
    assert code == 0 and f"{100 * entry['slices']['pii']['m']:.2f}" in out


def test_a_run_without_a_tracker_can_be_tracked_afterwards(few):
    run = train(few(*SMALL, "training.batch_size=8", "training.steps=1", "checkpoint.count=1", "name=untracked"))
    assert not (run / "memorization.jsonl").exists()
    assert track([run])[0]["checkpoints"][0]["slices"]["all"]["targets"] > 1000
    with pytest.raises(UserError, match="has not followed examples"):
        load_examples(run)


def test_tags_follow_their_tokens_through_deduplication(tiny):
    records = list(read_corpus(tiny().data_dir, "train"))
    tokens = np.concatenate([record["tokens"] for record in records])
    corpus = Corpus(records, drop_near=True, drop_exact=True, tags=tokens)
    assert len(corpus.tokens) < len(tokens) and np.array_equal(corpus.tag, corpus.tokens)


def test_tags_that_do_not_fit_are_refused(tiny, prepared, tmp_path):
    path, names = tmp_path / "tags.npy", ["tracker.tag_names=[names, dates]"]
    config = tiny(*TRACK, f"tracker.tags={path}", *names)
    with pytest.raises(UserError, match="cannot be read"):
        load_blocks(config, prepared)
    np.save(path, np.zeros(5, int))
    with pytest.raises(UserError, match=r"has int64 \[5\]: give one array of integers of the"):
        load_blocks(config, prepared)
    np.save(path, np.full(prepared.manifest["train"]["tokens"], 3))
    with pytest.raises(UserError, match="tags from 3 to 3: use 0"):
        load_blocks(config, prepared)
    with pytest.raises(UserError, match="go together"):
        tiny(*TRACK, *names)
    with pytest.raises(UserError, match="give different names, none of all, text"):
        tiny(*TRACK, "tracker.tags=x", "tracker.tag_names=[pii]")
    with pytest.raises(UserError, match="privacy .* and tracker.enabled are both set"):
        tiny(*TRACK, "privacy.noise_multiplier=1")


def test_canaries_are_a_slice(tmp_path):
    config = load_config(None, ["source.limit=20", "tokenizer.vocab_size=600", "canary.count=3", "canary.repetitions=[2]",
                                f"out={tmp_path}", "tracker.enabled=true"])  # fmt: skip
    prepare(config)
    blocks, _ = load_blocks(config, prepared := load_prepared(config))
    text = prepared.tokenizer.decode(blocks.corpus.tokens[blocks.corpus.tag == 1])
    assert text.count("@host") == text.count(".example") == 6  # 3 addresses, twice each, and nothing else
    assert tracker_shape(config, len(blocks)).slices == 4


def test_somebody_elses_loop_follows_memorization():
    script = ROOT / "docs" / "track_your_own_loop.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert "0 rows known" in first and last.startswith("step 59: M 1.00, 1.00 of the halves") and "32 rows known" in last
