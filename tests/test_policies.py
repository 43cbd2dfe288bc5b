"""Policies, anchors, scopes and replacements: what each promises, read off the decoded text."""

import collections
import re

import numpy as np
import pytest
from documents import bank_of, blocks_of, random_texts, tagged
from test_masking import mask

from rmft_jax.config import PiiConfig, load_config
from rmft_jax.data.blocks import Blocks, Corpus
from rmft_jax.errors import UserError
from rmft_jax.kernels import SURROGATE, Rule
from rmft_jax.pii.detector import Detector, detect
from rmft_jax.training.masking import masking_rules


@pytest.fixture(scope="module")
def corpus(prepared):
    texts = random_texts(200, seed=5)
    spans, _, records = tagged(texts, prepared.tokenizer)
    return texts, spans, records


def shown(blocks, bank, epochs, **rule):
    """Return how often each identity was shown in each epoch, int [epochs, identities]."""
    identities = 1 + blocks.corpus.span["identity"].max()
    out = np.zeros((epochs, identities), int)
    for epoch in range(epochs):
        rows = [blocks[i] | {"epoch": np.int32(epoch)} for i in range(len(blocks))]
        masked = mask(rows, bank, length=blocks.width + 8, **rule)
        identity = np.stack([row["span_identity"] for row in rows])
        np.add.at(out[epoch], identity[masked.shown], 1)
    return out


@pytest.fixture(scope="module")
def whole(corpus):
    """One document a block, so that no border cuts a span."""
    _, _, records = corpus
    return blocks_of(records, stride=sum(len(record["tokens"]) for record in records))


def true_counts(whole):
    span = whole.corpus.span
    return np.bincount(span["identity"][1:])


def test_keep_random_shows_each_identity_once_an_epoch_and_not_always_the_same_occurrence(prepared, whole):
    assert (shown(whole, prepared.bank, 3, policy="keep_random") == 1).all()
    origins = []
    for epoch in range(8):
        masked = mask([whole[0] | {"epoch": np.int32(epoch)}], prepared.bank, length=whole.width + 8, policy="keep_random")
        rank, identity = whole[0]["span_rank"], whole[0]["span_identity"]
        origins.append({int(i): int(r) for i, r, s in zip(identity, rank, masked.shown[0], strict=True) if s})
    repeating = [i for i, count in enumerate(true_counts(whole)) if count >= 4]
    assert repeating and all(len({origin[i] for origin in origins}) > 1 for i in repeating)


@pytest.mark.parametrize("k", [0, 1, 3, 40])
def test_cap_shows_each_identity_at_most_k_times_over_all_epochs(prepared, whole, k):
    total = shown(whole, prepared.bank, 4, policy="cap", k=k).sum(0)
    np.testing.assert_array_equal(total, np.minimum(k, 4 * true_counts(whole)))


def test_all_shows_nothing_and_bernoulli_its_share(prepared, whole):
    assert shown(whole, prepared.bank, 1, policy="all").sum() == 0
    many = shown(whole, prepared.bank, 20, policy="bernoulli", p=0.3).sum()
    total = 20 * true_counts(whole).sum()
    assert abs(many - 0.7 * total) < 4 * np.sqrt(0.21 * total)
    assert shown(whole, prepared.bank, 1, policy="bernoulli", p=1.0).sum() == 0
    assert (shown(whole, prepared.bank, 1, policy="bernoulli", p=0.0)[0] == true_counts(whole)).all()


def replacements(corpus, prepared, scope, epoch, **rule):
    """Return, for each (document, identity), the surrogate texts of its occurrences in the epoch."""
    _, spans, records = corpus
    blocks = Blocks(Corpus(records, scope=scope), stride=sum(len(r["tokens"]) for r in records))
    row = blocks[0] | {"epoch": np.int32(epoch)}
    masked = mask([row], prepared.bank, length=4 * blocks.width, policy="all", **rule)
    token_span = row["component_span"][row["component"]]
    inside = masked.source[0] < blocks.width
    owner = np.where(inside, token_span[np.minimum(masked.source[0], blocks.width - 1)], 0)
    document = np.repeat(np.arange(len(spans)), [len(found) for found in spans])
    out = collections.defaultdict(list)
    for number in range(1, 1 + len(document)):
        text = prepared.tokenizer.decode(masked.tokens[0][owner == number])
        out[int(document[number - 1]), int(row["span_identity"][number])].append(text)
    return out


def test_scope_says_which_occurrences_share_a_surrogate(corpus, prepared):
    scopes = ("occurrence", "document", "corpus")
    found = {scope: replacements(corpus, prepared, scope, 0, anchor="none") for scope in scopes}
    repeated = [key for key, texts in found["document"].items() if len(texts) > 1]
    assert repeated
    assert all(len(set(found["document"][key])) == 1 for key in repeated)
    assert all(len(set(found["occurrence"][key])) == len(found["occurrence"][key]) for key in repeated)
    for scope, apart in (("document", True), ("corpus", False)):
        by_identity = collections.defaultdict(set)
        for (_, identity), texts in found[scope].items():
            by_identity[identity] |= set(texts)
        assert (max(map(len, by_identity.values())) > 1) == apart


def test_in_document_scope_a_value_is_shown_in_whole_documents(corpus, prepared):
    """keep_first then shows every occurrence in the first document that holds a value, cap(k) those of k documents."""
    _, spans, records = corpus
    blocks = Blocks(Corpus(records, scope="document"), stride=sum(len(r["tokens"]) for r in records))
    document = np.repeat(np.arange(len(spans)), [len(found) for found in spans])
    identity = blocks.corpus.span["identity"][1:]
    for rule, most in (({"policy": "keep_first"}, 1), ({"policy": "cap", "k": 3}, 3)):
        masked = mask([blocks[0]], prepared.bank, length=2 * blocks.width, **rule)
        is_shown = masked.shown[0][1 : 1 + len(identity)]
        holders = collections.defaultdict(list)
        for number, holder in zip(identity, document, strict=True):
            holders[number].append(holder)
        for number, holder, shown_here in zip(identity, document, is_shown, strict=True):
            assert shown_here == (holder in sorted(set(holders[number]))[:most])


def test_static_surrogates_stay_and_fresh_ones_change(corpus, prepared):
    for fresh in (True, False):
        first, second = (replacements(corpus, prepared, "occurrence", epoch, fresh=fresh, anchor="none") for epoch in (0, 1))
        same = [first[key] == second[key] for key in first]
        assert all(same) if not fresh else np.mean(same) < 0.01


def test_anchor_none_keeps_nothing_and_shared_keeps_what_many_have_but_never_all(prepared):
    texts = [f"mail ann.{name}@alder.example.com now" for name in ("oak", "elm", "ash", "fir")]
    texts.append("ann.oak@birch.example.com")
    spans, _, records = tagged(texts, prepared.tokenizer)
    row = blocks_of(records, stride=sum(len(r["tokens"]) for r in records))[0]
    masked = mask([row], prepared.bank, length=300, policy="all", anchor="shared", shared_by=4)
    text = prepared.tokenizer.decode(masked.tokens[0])
    assert text.count("ann.") == 5 and text.count("@alder.example.com") == 4  # 5 and 4 identities have them
    assert not any(rare in text for rare in ("oak", "elm", "ash", "fir", "birch"))
    # where all parts are shared, the rarest one goes all the same
    masked = mask([row], prepared.bank, length=300, policy="all", anchor="shared", shared_by=1)
    text = prepared.tokenizer.decode(masked.tokens[0])
    assert not any(span.value in text for found in spans for span in found)
    masked = mask([row], prepared.bank, length=300, policy="all", anchor="none")
    text = prepared.tokenizer.decode(masked.tokens[0])
    assert not any(part in text for part in ("ann", "alder", "example.com", "birch"))
    assert (masked.origin == SURROGATE).sum() > 0


def joined(masked):
    """Return the tokens of all rows in order; the first place of a row repeats the last one of the row before."""
    keep = (masked.segment_ids > 0) & ((masked.source > 0) | (np.arange(len(masked.tokens)) == 0)[:, None])
    return masked.tokens[keep]


def people(count, seed=1):
    """Texts with addresses of few first and last names, so that a recombination is often somebody's own address."""
    rng = np.random.default_rng(seed)
    names = [[f"{end}{letter}" for letter in "abcdefgh"] for end in ("an", "lee")]
    return [f"To: {rng.choice(names[0])}.{rng.choice(names[1])}@alder.example.com\n" for _ in range(count)]


@pytest.mark.parametrize("stock", ["recombined", "look_alike"])
def test_surrogates_of_real_parts_are_never_a_real_value(prepared, stock):
    texts = people(40)
    spans, _, records = tagged(texts, prepared.tokenizer)
    real = {span.value for found in spans for span in found}
    having = collections.Counter(part for value in real for part in value.split("@")[0].split("."))
    alone = {part for part, count in having.items() if count == 1}
    assert alone  # else nothing shows that they stay out
    parts = set(having) - (alone if stock == "look_alike" else set())
    bank = bank_of(texts, spans, prepared.tokenizer)
    seen, others = collections.Counter(), 0
    for stride in (20_000, 11):  # whole documents; and blocks that cut most addresses in two
        blocks = Blocks(Corpus(records), stride=stride)
        for epoch in range(40):
            rows = [blocks[i] | {"epoch": np.int32(epoch)} for i in range(len(blocks))]
            masked = mask(rows, bank, length=blocks.width + 40, policy="all", anchor="shared", stock=stock)
            text = prepared.tokenizer.decode(joined(masked))
            for value in (span.value for span in detect(text)):
                assert value not in real
                local, host = value.split("@")
                assert host == "alder.example.com"  # shared by all
                seen.update(part for part in local.split(".") if part in having)
                others += any(part not in having for part in local.split("."))
    assert set(seen) == parts
    assert others > 100  # what was somebody's own gave way


def test_stocks_have_the_distribution_of_the_corpus(prepared):
    names = ["ann"] * 30 + ["bob"] * 10 + ["cid", "dee"]
    texts = [f"{first}.x{n}@alder.example.com" for n, first in enumerate(names)]
    bank = bank_of(texts, tagged(texts, prepared.tokenizer)[0], prepared.tokenizer)
    number = Detector(PiiConfig()).kinds.number(0, "first")
    found = {}
    for stock in ("recombined", "look_alike"):
        kind = getattr(bank, stock)[number]
        rows = [prepared.tokenizer.decode(bank.entry(kind, row)) for row in range(bank.counts[kind])]
        found[stock] = collections.Counter(rows)
    assert found["recombined"] == {"ann": 30, "bob": 10, "cid": 1, "dee": 1}
    assert [found["look_alike"][name] for name in ("ann", "bob", "cid", "dee")] == [30, 10, 0, 0]


def test_digits_of_what_one_value_alone_has_are_drawn_anew(prepared):
    own = [f"jo{n}" for n in range(100, 150)]
    texts = [f"{name}@alder.example.com" for name in (*own, "team42", "kim")] + ["team42@birch.example.org"]
    bank = bank_of(texts, tagged(texts, prepared.tokenizer)[0], prepared.tokenizer)
    kind = bank.recombined[Detector(PiiConfig()).kinds.number(0, "local")]
    rows = [prepared.tokenizer.decode(bank.entry(kind, row)) for row in range(bank.counts[kind])]
    drawn = [row for row in rows if row not in ("team42", "kim")]
    assert sorted(set(rows) - set(drawn)) == ["kim", "team42"] and rows.count("team42") == 2
    assert len(drawn) == 50 and all(re.fullmatch(r"jo\d{3}", row) for row in drawn) and not set(drawn) & set(own)


def test_redaction_writes_one_placeholder_for_each_value(prepared):
    texts = ["from ann.lee@alder.example.com to bob@birch.example.org, thanks", "none here"]
    spans, _, records = tagged(texts, prepared.tokenizer)
    for stride in (200, 9):  # whole, and cut within addresses
        blocks = blocks_of(records, stride=stride)
        rows = [blocks[i] for i in range(len(blocks))]
        masked = mask(rows, prepared.bank, length=blocks.width + 8, policy="all", replacement="placeholder")
        assert prepared.tokenizer.decode(joined(masked)) == "from [EMAIL] to [EMAIL], thanksnone here"


def test_rules_differ_by_type(prepared, whole):
    """Two types in one batch, each under its own rule, equal the batches that are under one rule throughout."""
    row = whole[0]
    second = (np.arange(len(row["span_type"])) % 2).astype(np.int32)
    two_types = row | {"span_type": second}
    bank = prepared.bank._replace(anchors=np.repeat(prepared.bank.anchors[:1], 2))
    mixed = (Rule("all", anchor="none"), Rule("cap", k=2))
    both = mask_rules([two_types], bank, mixed)
    apart = [mask_rules([row], bank, (rule,)) for rule in mixed]
    for type, one in enumerate(apart):
        np.testing.assert_array_equal(both.shown[0][second == type], one.shown[0][second == type])


def mask_rules(rows, bank, rules):
    import jax
    from test_masking import KEY

    from rmft_jax.data.blocks import as_batch
    from rmft_jax.kernels import mask_batch

    function = jax.jit(mask_batch, static_argnames=("rules", "length"))
    return jax.tree.map(np.asarray, function(as_batch(rows), bank, KEY, rules=rules, length=rows[0]["tokens"].size + 8))


def test_config_builds_a_rule_for_each_type():
    config = load_config(None, ["masking.policy=cap", "masking.k=3", "masking.types.email.anchor=none"])
    assert config.masking.types["email"].k == 3  # inherited
    assert masking_rules(config) == (Rule("cap", k=3, anchor="none"),)
    with pytest.raises(UserError, match=r"masking.types.email.policy is 'capp': .*did you mean cap"):
        load_config(None, ["masking.types.email.policy=capp"])
    with pytest.raises(UserError, match=r"unknown key masking.types.email.polcy"):
        load_config(None, ["masking.types.email.polcy=cap"])
    with pytest.raises(UserError, match=r"masking.p is 2.0"):
        load_config(None, ["masking.p=2"])
