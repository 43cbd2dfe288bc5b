"""Several corpora in one run: exact shares, a stream that goes on anywhere, values and surrogates that do not collide."""

import gzip
import itertools
import json
from fractions import Fraction

import jax
import numpy as np
import pytest
from test_cli import rmft

from rmft_jax.cli import _print_replay
from rmft_jax.config import load_config, to_yaml
from rmft_jax.data.blocks import as_batch
from rmft_jax.data.loader import Mixture, batches, examples_of, shares, shuffled
from rmft_jax.data.prepare import load_prepared, prepare, read_prepared
from rmft_jax.data.sources import read_documents
from rmft_jax.errors import UserError
from rmft_jax.kernels import Rule, mask_batch
from rmft_jax.memorization.compare import compare
from rmft_jax.memorization.extraction import audit
from rmft_jax.pii.detector import detect
from rmft_jax.report.model_card import model_card
from rmft_jax.studies import run_study
from rmft_jax.training.loop import train
from rmft_jax.training.plan import plan
from rmft_jax.training.replay import replay
from rmft_jax.training.setup import load_blocks, load_mixture, load_run_config, set_up
from rmft_jax.training.step import train_step

WEIGHT = 0.3


def addresses(texts):
    return {span.value for text in texts for span in detect(text)}


@pytest.fixture(scope="module")
def general(tiny, tmp_path_factory):
    """Prepare a second corpus with the tokenizer of the first, with some of its addresses; return its config."""
    out = tmp_path_factory.mktemp("general")
    own = sorted(addresses(read_documents(tiny().source).train))[:9]
    texts = read_documents(load_config(None, ["source.limit=50", "source.seed=7"]).source).train
    texts += [f"Write to {value.upper()} or {value}, not to somebody{number}@quagga{number}.net." for number, value in
              enumerate(own)]  # fmt: skip
    with gzip.open(out / "mail.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    config = load_config(None, ["source.format=jsonl", f"source.path={out}/mail.jsonl.gz", f"out={out}",
                                f"tokenizer.path={tiny().data_dir}/tokenizer.model"])  # fmt: skip
    prepare(config)
    return config


@pytest.fixture(scope="module")
def mixed(tiny, general):
    """Return a function that makes a config of both corpora."""
    mix = f"training.mix=[{{data: {general.data_dir}, weight: {WEIGHT}}}]"
    return lambda *overrides: tiny(mix, *overrides)


@pytest.mark.parametrize("weights", [(0.3,), (1 / 3,), (0.123456,), (0.999,), (0.5, 0.25, 0.2), (0.1,) * 9])
def test_shares_are_those_of_the_weights_after_any_number_of_examples(weights):
    rng = np.random.default_rng(0)
    exact = [Fraction(repr(weight)) for weight in weights]
    for count in (*range(200), *rng.integers(10**9, size=300).tolist()):
        found = shares(weights, count)
        assert sum(found) == count and min(found) >= 0
        off = [abs(have - count * share) for have, share in zip(found, (1 - sum(exact), *exact), strict=True)]
        assert max(off) < (1 if len(weights) == 1 else 2)


def blocks_of_both(mixed, prepared, *settings):
    return load_mixture(mixed(*settings), prepared)[2]


def test_each_corpus_is_shuffled_and_counts_its_epochs_by_itself(mixed, prepared):
    mixture = blocks_of_both(mixed, prepared)
    own, other = mixture.sources
    assert len(mixture) == len(own) + len(other)
    stream = [mixture.order(5)[place] for place in range(4 * len(mixture))]
    for place in (1, 17, len(mixture), len(stream)):
        is_other = [number >= len(own) for number, _ in stream[:place]]
        assert [place - sum(is_other), sum(is_other)] == shares((WEIGHT,), place)
    parts = [[pair for pair in stream if (pair[0] >= len(own)) == side] for side in (False, True)]
    assert parts[0] == [shuffled(len(own), 5)[place] for place in range(len(parts[0]))]  # as without the other
    for part, source in zip(parts, (own, other), strict=True):
        assert [epoch for _, epoch in part] == [place // len(source) for place in range(len(part))]
        epochs = [[number for number, epoch in part if epoch == e] for e in (0, 1)]
        assert len({*epochs[0]}) == len({*epochs[1]}) == len(source) and epochs[0] != epochs[1]


def test_the_rest_of_the_stream_is_the_same_on_any_number_of_hosts(mixed, prepared):
    mixture = blocks_of_both(mixed, prepared)

    def rows(start, steps, process=0, processes=1):
        source = batches(mixture, batch_size=8, seed=3, start=start, process=process, processes=processes)
        taken = itertools.islice(source, steps)
        return [sorted(zip(*(x.tolist() for x in (b.example, b.epoch, b.tokens)), strict=True)) for b in taken]

    whole = rows(0, 60)
    assert {example < 0 for batch in whole for example, *_ in batch} == {False, True}
    for start, hosts in itertools.product((0, 7, 41), (1, 2, 4)):
        parts = [rows(start, 60 - start, host, hosts) for host in range(hosts)]
        assert [sorted(itertools.chain(*shared)) for shared in zip(*parts, strict=True)] == whole[start:]


def test_one_corpus_alone_is_read_as_ever(prepared, tiny):
    blocks, _ = load_blocks(tiny(), prepared)
    order = shuffled(len(blocks), 3)
    first = next(batches(blocks, batch_size=8, seed=3))
    assert first.example.tolist() == [order[place][0] for place in range(8)] and (first.example >= 0).all()
    assert examples_of(Mixture([blocks]), batch_size=8, seed=3, step=1) == [order[place] for place in range(8)]


def values_of(prepared, corpus):
    """Return the value of each span of a corpus, as its tokens spell it."""
    bounds = zip(corpus.span_first[1:], corpus.span_last[1:], strict=True)
    return [prepared.tokenizer.decode(corpus.tokens[first : last + 1]).lower() for first, last in bounds]


def test_nothing_of_two_corpora_has_the_same_number_but_equal_values(mixed, prepared, general):
    mixture = blocks_of_both(mixed, prepared)
    plain, alone = load_blocks(mixed(), prepared)[0].corpus, load_blocks(mixed(), read_prepared(general.data_dir))[0].corpus
    own, other = (source.corpus for source in mixture.sources)
    for name in own.span:
        np.testing.assert_array_equal(own.span[name], plain.span[name], err_msg=name)
    np.testing.assert_array_equal(own.component_kind, plain.component_kind)
    ids = np.concatenate([corpus.span["id"][1:] for corpus in (own, other)])
    assert len(np.unique(ids)) == len(ids)
    meant = {}  # identity -> value
    values = [values_of(prepared, corpus) for corpus in (own, other)]
    for corpus, of_corpus in zip((own, other), values, strict=True):
        for identity, value in zip(corpus.span["identity"][1:].tolist(), of_corpus, strict=True):
            assert meant.setdefault(identity, value) == value
    assert len(set(meant.values())) == len(meant)
    in_both = np.array([value in set(values[0]) for value in values[1]])
    assert in_both.sum() >= 14 and (~in_both).any()
    assert (other.span["identity"][1:][in_both] < prepared.identities).all()
    assert (other.span["identity"][1:][~in_both] >= prepared.identities).all()
    np.testing.assert_array_equal(other.span["rank"][1:][~in_both], alone.span["rank"][1:][~in_both])
    rows = [mixture[number] for number in range(len(mixture))]
    examples = [int(row["example"]) for row in rows]
    assert [number % len(mixture) for number in examples] == list(range(len(mixture)))


@pytest.mark.parametrize("rule", [Rule("keep_first"), Rule("keep_random"), Rule("cap", k=2)], ids=lambda rule: rule.policy)
def test_a_value_of_both_corpora_is_shown_true_no_more_often_than_in_one(mixed, prepared, rule):
    both, _, mixture, _ = load_mixture(mixed("training.sequence_length=256"), prepared)
    own, other = (source.corpus for source in mixture.sources)
    shared = np.intersect1d(own.span["identity"][1:], other.span["identity"][1:])
    rows = as_batch([mixture[number] for number in range(len(mixture))])
    mask = jax.jit(lambda rows: mask_batch(rows, both.bank, jax.random.key(0), length=360, rules=rule))
    times, epochs = np.zeros(own.span["identity"].max() + 1 + len(other.span["identity"]), int), 2
    for epoch in range(epochs):
        masked = mask(rows._replace(epoch=np.full(len(rows.tokens), epoch, np.int32)))
        np.add.at(times, rows.span_identity[np.asarray(masked.shown)], 1)
        text = [prepared.tokenizer.decode(np.asarray(row)) for row in masked.tokens[len(mixture.own) :]]
        known = {value for value, identity in zip(values_of(prepared, own), own.span["identity"][1:], strict=True)
                 if identity in shared}  # fmt: skip
        assert len(known) >= 7 and not addresses(text) & known
    most = 2 if rule.policy == "cap" else epochs
    assert len(shared) >= 7 and times.max() == most and times[shared].max() <= most


def test_scope_corpus_gives_a_value_one_surrogate_in_both_corpora(mixed, prepared):
    mixture = blocks_of_both(mixed, prepared, "masking.scope=corpus")
    spans = np.concatenate([np.stack([s.corpus.span["identity"][1:], s.corpus.span["id"][1:]], 1) for s in mixture.sources])
    pairs = np.unique(spans, axis=0)
    assert len(pairs) == len(np.unique(spans[:, 0])) == len(np.unique(spans[:, 1]))


def test_surrogates_are_those_of_each_corpus_and_real_in_none(mixed, prepared, general):
    both, others, mixture, _ = load_mixture(mixed(), prepared)
    (other,), bank = others, both.bank
    entries = lambda bank, kind: {tuple(bank.entry(kind, row).tolist()) for row in range(int(bank.counts[kind]))}  # noqa: E731
    texts = [prepared.tokenizer.decode(np.concatenate([[0], source.corpus.tokens]).tolist()) for source in mixture.sources]
    parts = lambda local, _, domain: {*local.split("."), *domain.split(".", 1)}  # noqa: E731
    words = [set().union(*(parts(*value.partition("@")) for value in addresses([text]))) for text in texts]
    tables = len(prepared.bank.counts)
    for first, own, others_words in ((0, prepared, words[1]), (tables, other, words[0])):
        for kind, name in enumerate(own.manifest["surrogates"], 1):
            before, after = entries(own.bank, kind), entries(bank, first + kind)
            assert after and after <= before
            if name != "email tld":
                gone = {prepared.tokenizer.decode(ids) for ids in before - after}
                assert not {prepared.tokenizer.decode(ids) for ids in after} & others_words and gone <= others_words
            else:
                assert after == before
            for stock in ("recombined", "look_alike"):
                its, new = int(getattr(own.bank, stock)[kind]), int(getattr(bank, stock)[first + kind])
                assert (its == kind and new == first + kind) or entries(own.bank, its) == entries(bank, new)
    assert len(both.bank.counts) == tables + len(other.bank.counts)
    assert set(bank.real.tolist()) == {*prepared.bank.real.tolist(), *other.bank.real.tolist()}
    rows = as_batch([mixture[number] for number in range(len(mixture.own), len(mixture))])
    mask = jax.jit(lambda rows: mask_batch(rows, bank, jax.random.key(1), length=100, rules=Rule("all", anchor="none")))
    shown = addresses(prepared.tokenizer.decode(np.asarray(row)) for row in mask(rows).tokens)
    assert len(shown) > 50 and not shown & addresses(texts)


RUN = ["model.layers=1", "model.width=16", "model.heads=1", "training.epochs=1.5", "training.batch_size=64",
       "checkpoint.count=2", "training.log_every=1", "masking.policy=none"]  # fmt: skip


@pytest.fixture(scope="module")
def run(mixed):
    config = mixed(*RUN, "name=mixed", "tracker.enabled=true", "training.skip_above=1.0005", "training.learning_rate=1e-4")
    return config, train(config)


def test_a_run_on_two_corpora_counts_epochs_of_its_own(run, general):
    config, directory = run
    about = json.loads((directory / "run.json").read_text())
    made = set_up(config)
    own, other = map(len, made.blocks.sources)
    assert about["steps"] == round(1.5 * own / (64 * (1 - WEIGHT))) and about["epochs"] == pytest.approx(1.5, rel=0.05)
    (part,) = about["mix"]
    assert part["content_hash"] == read_prepared(general.data_dir).manifest["content_hash"] and part["blocks"] == other
    assert part["source"] == "mail.jsonl.gz"
    assert part["epochs"] == pytest.approx(about["steps"] * 64 * WEIGHT / other, abs=1 / other)
    assert made.shapes["seen"].shape == (made.prepared.identities,)


def test_a_replay_takes_the_same_batches_again_and_names_their_corpora(run, general, capsys):
    config, directory = run
    about, made = json.loads((directory / "run.json").read_text()), set_up(config)
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    step = about["checkpoint_steps"][0] + 3  # from the checkpoint on, the same batches again
    again = replay(directory, step)
    assert again["from_step"] == step - 3 and again["loss"] == metrics[step - 1]["loss"]
    assert {row["data"] for row in again["rows"]} == {str(config.data_dir), str(general.data_dir)}
    pairs = examples_of(made.blocks, batch_size=64, seed=config.seed, step=step)
    wanted = sorted((str(general.data_dir if source else config.data_dir), block, epoch)
                    for (number, epoch) in pairs for source, block in [made.blocks.locate(number)])  # fmt: skip
    assert sorted((row["data"], row["block"], row["epoch"]) for row in again["rows"]) == wanted
    assert again["left_out"] == (step in {record["step"] for record in left_out(directory)})
    _print_replay(again)
    assert "data" in capsys.readouterr().out


def test_the_audit_is_of_the_own_corpus_and_reports_name_the_others(run, tiny, tmp_path):
    config, directory = run
    (part,), prepared = json.loads((directory / "run.json").read_text())["mix"], load_prepared(tiny())
    (found,) = audit([directory], ["audit.sets=[heldout]", "audit.metrics=[]"])
    assert found["content_hash"] == prepared.manifest["content_hash"] and found["identities"] == prepared.identities
    assert all(entry["seen_identities"] <= prepared.identities for entry in found["checkpoints"])
    results = compare([directory], tmp_path / "results.json")
    assert results["runs"]["mixed"]["mix"] == [{key: part[key] for key in ("source", "weight", "epochs", "content_hash")}]
    card = model_card(results)
    assert "mixed was also trained on other text, of which nothing was attacked: 30 % of its sequences from mail.j" in card


def left_out(directory):
    return [json.loads(line) for line in (directory / "skipped.jsonl").read_text().splitlines()]


def test_what_was_left_out_is_noted_with_its_corpus(run):
    config, directory = run
    blocks = set_up(config).blocks
    assert left_out(directory)
    for record in left_out(directory):
        pairs = examples_of(blocks, batch_size=64, seed=config.seed, step=record["step"])
        assert list(zip(record["corpora"], record["blocks"], strict=True)) == [blocks.locate(number) for number, _ in pairs]


def test_the_tracker_follows_the_own_corpus_alone(run, tiny):
    _, directory = run
    alone = train(tiny(*RUN, "name=alone", "tracker.enabled=true"))
    read = lambda run: [json.loads(line) for line in (run / "memorization.jsonl").read_text().splitlines()]  # noqa: E731
    first = [next(record for record in read(run) if record["kind"] == "epoch") for run in (directory, alone)]
    assert [record["epoch"] for record in first] == [0, 0] and first[0]["step"] > first[1]["step"]
    assert first[0]["slices"]["text"]["targets"] == first[1]["slices"]["text"]["targets"] > 0
    assert first[0]["slices"]["pii"]["targets"] == first[1]["slices"]["pii"]["targets"] > 0
    assert read(directory)[0]["examples"] == read(alone)[0]["examples"]


def test_targets_of_early_learning_are_kept_for_the_rows_of_each_corpus(mixed):
    made = set_up(mixed("loss.elr_weight=1", "loss.elr_top=4", "masking.policy=none"))
    state, source = made.begin(), batches(made.blocks, batch_size=8, seed=0)
    step = jax.jit(lambda state, batch: train_step(state, batch, made.prepared.bank, config=made.config,
                                                   optimizer=made.optimizer))  # fmt: skip
    for _ in range(3):
        state, _ = step(state, next(source))
    noted = {name: np.flatnonzero(np.asarray(values).reshape(len(made.blocks), -1).any(1)) for name, values in
             state["elr"].items()}  # fmt: skip
    shown = sorted({number for n in (1, 2, 3) for number, _ in examples_of(made.blocks, batch_size=8, seed=0, step=n)})
    assert any(number >= len(made.blocks.own) for number in shown)
    assert any(rows.tolist() == shown for rows in noted.values())


def test_the_plan_counts_both_corpora(mixed, tiny, general):
    made, found = set_up(mixed()), plan(mixed())
    assert found["steps"] == made.plan.steps > plan(tiny())["steps"]
    assert f"30% of the sequences from {len(made.blocks.sources[1])} in {general.data_dir}" in found["data"]
    assert found["memory"]["arguments"]["batch and surrogates"] > plan(tiny())["memory"]["arguments"]["batch and surrogates"]


def test_bad_mixtures_end_with_one_line(mixed, tiny, general, tmp_path, capsys):
    mix = lambda *parts: "training.mix=[" + ", ".join(f"{{data: {data}, weight: {weight}}}" for data, weight in parts) + "]"  # noqa: E731
    for settings, says in (
        ([mix(("''", 0.5))], "training.mix.0.data is empty"),
        ([mix(("x", 1))], "training.mix.0.weight is 1.0: set it above 0 and below 1"),
        ([mix(("x", 0))], "training.mix.0.weight is 0.0"),
        ([mix(("x", 0.5), ("y", 0.5))], "add up to 1, which leaves nothing for the run's own data: lower them"),
        ([mix(*((name, 0.1) for name in "abcdefghij"))], "add up to 1, which leaves nothing"),  # not as floats
        (["training.mix=x"], "must be a list of sections"),
        ([mix(("x", 0.5)), "privacy.noise_multiplier=1"], "privacy .DP-SGD. and training.mix are both set"),
    ):
        with pytest.raises(UserError, match=says):
            tiny(*settings)
    with pytest.raises(UserError, match="`rmft study scaling` trains on one corpus"):
        run_study("scaling", mixed(), command="")
    other_words = tiny(f"out={tmp_path}/words", "source.limit=40", "tokenizer.vocab_size=400")
    more_types = tiny(f"out={tmp_path}/types", "source.limit=40", "pii.types=[email,url]",
                      f"tokenizer.path={tiny().data_dir}/tokenizer.model")  # fmt: skip
    for config in (other_words, more_types):
        prepare(config)
    for parts, says in (
        ([(tmp_path / "none", 0.5)], "is no prepared data: name a folder that `rmft prepare` wrote"),
        ([(other_words.data_dir, 0.5)], "has another tokenizer than the run's own data: prepare it with tokenizer.path="),
        ([(more_types.data_dir, 0.5)], "has personal data of the types email, url, the run's own data of email: prep"),
        ([(tiny().data_dir, 0.5)], "holds the same documents as the run's own data"),
        ([(general.data_dir, 0.5), (general.data_dir, 0.2)], "training.mix.1.data .* holds the same documents"),
    ):
        config = tiny(mix(*parts), "name=never")
        with pytest.raises(UserError, match=says) as error:
            train(config)
        assert "\n" not in str(error.value) and not config.run_dir.exists()
    capsys.readouterr()
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(mixed("name=never")).replace(str(general.data_dir), str(tmp_path / "none")))
    code, _, err = rmft("train", path, capsys=capsys)
    assert code == 2 and err.startswith("error: training.mix.0.data") and err.count("\n") == 1


def test_another_mixture_is_another_run(run, mixed):
    _, directory = run
    assert load_run_config(directory).training.weights == (WEIGHT,)
    with pytest.raises(UserError, match="holds a run with another training"):
        train(mixed(*RUN, "name=mixed", "tracker.enabled=true", "training.skip_above=1.0005", "training.learning_rate=1e-4",
                    "training.mix=[]"))  # fmt: skip
