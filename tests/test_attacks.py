"""Canaries and the metrics of an audit, from the planted document to the audit's numbers."""

import collections
import json

import numpy as np
import pytest

from rmft_jax.config import load_config
from rmft_jax.data.canaries import SPACE_BITS, make_canaries, places_of, tokenize
from rmft_jax.data.dedup import near_duplicates
from rmft_jax.data.prepare import load_prepared, prepare
from rmft_jax.data.sources import read_documents
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.errors import UserError
from rmft_jax.memorization.extraction import audit
from rmft_jax.memorization.prompts import build_prompts
from rmft_jax.memorization.samples import Samples
from rmft_jax.memorization.scoring import Rows
from rmft_jax.pii.detector import detect
from rmft_jax.pii.values import keyed_hash
from rmft_jax.training.loop import train

SETTINGS = [
    "source.limit=60", "source.heldout_fraction=0.5", "source.max_characters=500", "tokenizer.vocab_size=500",
    "canary.count=6", "canary.repetitions=[1, 12]", "canary.references=100", "masking.policy=none", "model.layers=2",
    "model.width=48", "model.heads=2", "training.batch_size=16", "training.sequence_length=64", "training.epochs=7",
    "training.learning_rate=0.006", "training.warmup_steps=10", "checkpoint.count=1", "audit.sets=[discoverable]",
    "audit.prompts=16", "audit.new_tokens=12", "audit.samples=40", "audit.bootstrap=200",
]  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Return a config with canaries and its prepared data."""
    config = load_config(None, [*SETTINGS, f"out={tmp_path_factory.mktemp('canaries')}"])
    prepare(config)
    return config, load_prepared(config)


@pytest.fixture(scope="module")
def audited(planted):
    """Train a small model without a defence, audit it, return what was written of its checkpoint."""
    run = train(planted[0])
    audit([run])
    return run, json.loads((run / "audit.json").read_text())


def test_canaries_are_reproducible_addresses_of_a_known_space_and_nobodys():
    config = load_config(None, ["canary.count=5"])
    canaries = make_canaries(config.canary, 3)
    assert canaries == make_canaries(config.canary, 3) != make_canaries(config.canary, 4)
    assert collections.Counter(c.repetitions for c in canaries) == dict.fromkeys((1, 2, 4, 8, 16), 5)
    assert abs(SPACE_BITS - np.log2(1e10)) < 1e-9
    for canary in canaries:
        spans = detect(canary.text)
        assert [span.value for span in spans] == [canary.address] and canary.address.endswith(".example")
        assert not detect(canary.phrase)
    assert len({canary.address for canary in canaries}) == len({canary.phrase for canary in canaries}) == 25
    # two canaries are no near-duplicates of each other, the copies of one are
    assert not any(near_duplicates([c.text for c in canaries], threshold=0.8, num_perm=128, seed=0))
    copies = near_duplicates([canaries[0].text] * 3, threshold=0.8, num_perm=128, seed=0)
    assert list(copies) == [False, True, True]


def test_insertion_keeps_the_documents_and_plants_every_copy():
    canaries = make_canaries(load_config(None, ["canary.count=3"]).canary, 0)
    documents = [f"document {number}" for number in range(40)]

    def insert(documents, canaries, seed):
        places, copies = places_of(canaries, len(documents), seed)
        texts = np.array([canaries[number].text for number in copies], object)
        return np.insert(np.array(documents, object), places, texts).tolist()

    texts = insert(documents, canaries, 5)
    assert [text for text in texts if text.startswith("document")] == documents
    counts = collections.Counter(texts)
    assert all(counts[canary.text] == canary.repetitions for canary in canaries)
    assert len(texts) == 40 + 3 * 31 and texts != insert(documents, canaries, 6)
    assert insert(documents, [], 5) == documents


def test_planted_values_are_detected_ranked_and_counted_apart(planted):
    config, prepared = planted
    canaries = make_canaries(config.canary, config.source.seed)
    numbers = prepared.canary_identities
    hashes = [keyed_hash(canary.address, prepared.identity_key) for canary in canaries]
    assert [prepared.identity_hashes[number] for number in numbers] == hashes
    assert prepared.identity_counts[numbers].tolist() == [canary.repetitions for canary in canaries]
    assert prepared.is_canary.sum() == len(canaries) == prepared.manifest["canaries"]["count"]
    own = {span.value for text in read_documents(config.source).train for span in detect(text)}
    assert prepared.manifest["pii_identities"] == len(own) == prepared.identities - len(canaries)
    assert prepared.manifest["train"]["documents"] == 30 + 6 * 13
    ranks = [
        rank
        for record in read_corpus(prepared.directory, "train")
        for identity, rank in zip(record["span_identity"], record["span_rank"], strict=True)
        if identity == numbers[-1]
    ]
    assert ranks == list(range(12))  # so every defence treats them as it treats any address
    for name in ("identities.npz", "identity.key"):
        assert (prepared.directory / name).stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="canary"):
        load_prepared(load_config(None, [*SETTINGS, f"out={config.out}", "canary.count=5"]))
    with pytest.raises(UserError, match="canary"):
        load_prepared(load_config(None, [*SETTINGS, f"out={config.out}", "canary.count=0"]))


def test_no_canary_is_a_prompt_a_member_or_a_window(planted):
    config, prepared = planted
    addresses = {canary.address for canary in make_canaries(config.canary, config.source.seed)}
    samples, decode = Samples(config, prepared), prepared.tokenizer.decode
    prompts = build_prompts(config, prepared)
    assert prompts["discoverable"].answers and not addresses & set(prompts["discoverable"].answers)
    kinds = (prompts["discoverable"], samples.windows, samples.documents.rows, samples.addresses)
    assert not any("@host" in decode(row) for rows in kinds for row in rows.tokens)
    assert samples.documents_of[prepared.canary_identities].tolist() == [0] * len(addresses)


def test_canary_rows_are_the_tokens_of_training(planted):
    config, prepared = planted
    canaries = make_canaries(config.canary, config.source.seed)
    trained = {tuple(record["tokens"]) for record in read_corpus(prepared.directory, "train")}
    samples = Samples(config, prepared).canaries
    for canary, (tokens, start) in zip(canaries, tokenize([c.text for c in canaries], prepared.tokenizer), strict=True):
        assert any(row[: len(tokens)] == tuple(tokens) for row in trained)
        assert prepared.tokenizer.decode(tokens[start:]) == canary.address
        assert prepared.tokenizer.decode(tokens[:start]) == canary.phrase
    texts = [prepared.tokenizer.decode(row[:end]) for row, end in zip(samples.rows.tokens, samples.rows.end, strict=True)]
    assert [text + ".\n" for text in texts[: len(canaries)]] == [canary.text for canary in canaries]
    references = np.array(texts[len(canaries) :]).reshape(len(canaries), 100).tolist()
    for canary, texts in zip(canaries, references, strict=True):
        assert all(text.startswith(canary.phrase) for text in texts) and len(set(texts)) == 100


def test_made_up_addresses_have_the_form_of_the_true_ones(planted):
    config, prepared = planted
    rows = Samples(config, prepared).addresses
    true, made_up = (Rows(*(np.split(part, 2)[half] for part in rows)) for half in (0, 1))
    decode = prepared.tokenizer.decode
    known = set(prepared.identity_hashes)
    assert (true.start == made_up.start).all()
    for ours, theirs, start, end, other in zip(true.tokens, made_up.tokens, true.start, true.end, made_up.end, strict=True):
        assert ours[:start].tolist() == theirs[:start].tolist()
        a, b = decode(ours[start:end]).lower(), decode(theirs[start:other]).lower()
        assert keyed_hash(a, prepared.identity_key) in known and keyed_hash(b, prepared.identity_key) not in known
        for part in (str.partition, str.rpartition):
            assert part(a, "@")[0].count(".") == part(b, "@")[0].count(".")
        assert a.partition("@")[2].partition(".")[2] == b.partition("@")[2].partition(".")[2]


def test_general_prompts_open_documents_of_a_file(planted, tmp_path):
    config, prepared = planted
    texts = [f"text {number} " + " ".join(f"w{number}x{i}" for i in range(20)) for number in range(30)]
    (tmp_path / "general.txt").write_text("\n<|endoftext|>\n".join([*texts, "too short"]))
    overrides = ["audit.sets=[general]", f"audit.general_path={tmp_path}/general.txt", f"out={config.out}"]
    prompts = build_prompts(load_config(None, [*SETTINGS, *overrides]), prepared)["general"]
    found = {prepared.tokenizer.decode(tokens[valid]) for tokens, valid in zip(prompts.tokens, prompts.valid, strict=True)}
    openings = {" ".join(text.split()[:10]) for text in texts}
    assert len(found) == 16 and all(any(opening.endswith(text) for opening in openings) for text in found)
    assert not build_prompts(load_config(None, [*SETTINGS, "audit.sets=[general]", "audit.general_path="]), prepared)


def test_exposure_rises_with_repetitions(audited):
    _, result = audited
    exposure = result["checkpoints"][-1]["metrics"]["exposure"]
    groups = {group["repetitions"]: group for group in exposure["repetitions"]}
    assert set(groups) == {1, 12} and all(group["canaries"] == 6 for group in groups.values())
    for kind in ("by_rank", "by_fit"):
        assert groups[1][kind] < groups[12][kind] and groups[1][f"{kind}_ci"][1] < groups[12][f"{kind}_ci"][0]
    assert exposure["chance"] < groups[12]["by_rank_ci"][0] <= groups[12]["by_rank"] <= np.log2(100)


def test_members_are_told_from_non_members(audited):
    _, result = audited
    membership = result["checkpoints"][-1]["metrics"]["membership"]
    assert membership["members"] == membership["non_members"] > 10
    assert membership["attacks"]["loss"]["auc_ci"][0] > 0.5
    for attack in membership["attacks"].values():
        assert attack["auc_ci"][0] <= attack["auc"] <= attack["auc_ci"][1]
        assert [entry["fpr_pct"] for entry in attack["tpr"]] == [0.1, 1.0]


def test_audit_holds_every_metric_with_intervals_and_counts_no_canary(audited, planted):
    run, result = audited
    config, prepared = planted
    entry = result["checkpoints"][-1]
    assert list(entry["metrics"]) == list(config.audit.metrics) and None not in entry["metrics"].values()
    for name, value in (("similarity", "mean"), ("log_probability_gap", "mean"), ("extraction_strength", "mean"),
                        ("discoverable_50", "rate_pct")):  # fmt: skip
        low, high = entry["metrics"][name][f"{value}_ci"]
        assert low <= entry["metrics"][name][value] <= high
    assert entry["metrics"]["discoverable_50"]["prefix_tokens"] == 32  # half a sequence, where that is less than 50
    rates = entry["metrics"]["n_p"]["rates"]
    assert all(a["extractable"] <= b["extractable"] for a, b in zip(rates, rates[1:], strict=False) if a["p"] == b["p"])
    assert result["identities"] == prepared.identities - 12
    assert entry["prompts"]["all"]["true_leaked"] == sum(b["extracted"] for b in entry["metrics"]["k_eidetic"]["buckets"])
    planted_hashes = {prepared.identity_hashes[number] for number in prepared.canary_identities}
    assert not any(record["hash"] in planted_hashes for records in entry["leaks"].values() for record in records)
    assert "@" not in (run / "audit.json").read_text()


def test_a_reference_model_adds_its_attack(audited, planted):
    """Against itself as reference every score is 0, so the attack is a coin toss."""
    run, _ = audited
    settings = ["audit.metrics=[membership]", f"audit.reference={run}"]
    attacks = audit([run], settings)[0]["checkpoints"][-1]["metrics"]["membership"]["attacks"]
    assert attacks["reference"]["auc"] == 0.5 and attacks["loss"]["auc"] != 0.5
    with pytest.raises(UserError, match="is not a checkpoint"):
        audit([run], ["audit.reference=nowhere"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["canary.repetitions=[1, two]"], "whole numbers"),
        (["canary.repetitions=2", "canary.count=-1"], "canary.count"),
        (["canary.count=1", "canary.repetitions=[0, 1]"], "each 1 or more"),
        (["canary.count=1", "canary.repetitions=[2, 2]"], "different numbers"),
        (["canary.count=1", "canary.repetitions=[]"], "canary.repetitions"),
        (["audit.metrics=[exposures]"], "did you mean exposure?"),
        (["audit.top_p=0"], "audit.top_p"),
    ],
)
def test_what_is_wrong_is_said(overrides, says):
    with pytest.raises(UserError, match=None) as error:
        load_config(None, overrides)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert load_config(None, ["canary.repetitions=3"]).canary.repetitions == (3,)
