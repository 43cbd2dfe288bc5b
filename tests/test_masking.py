"""The device path against plain Python, and the promises of RMFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import blocks_of, random_texts, tagged
from scipy import stats

from rmft_jax.config import MeshConfig, PiiConfig
from rmft_jax.data.blocks import as_batch
from rmft_jax.kernels import (
    PII,
    SURROGATE,
    Rule,
    SurrogateBank,
    TaggedBatch,
    draw_surrogates,
    mask_batch,
    splice,
    splice_reference,
    uniform_below,
)
from rmft_jax.pii.detector import Detector, detect
from rmft_jax.pii.reference import mask_text
from rmft_jax.training.masking import masking_key
from rmft_jax.training.mesh import batch_sharding, make_mesh

KEY = masking_key(7)


@pytest.fixture(scope="module")
def corpus(prepared):
    texts = random_texts(1000, seed=3)
    return texts, *tagged(texts, prepared.tokenizer)


def mask(rows, bank, *, length, policy="keep_first", key=KEY, **rule):
    function = jax.jit(mask_batch, static_argnames=("rules", "length"))
    return jax.tree.map(np.asarray, function(as_batch(rows), bank, key, rules=Rule(policy, **rule), length=length))


def with_epoch(row, epoch):
    return row | {"epoch": np.int32(epoch)}


def test_splice_equals_its_reference_on_random_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, 120).astype(np.int32)
    tokens = rng.integers(1000, 2000, lengths.sum()).astype(np.int32)
    none = np.zeros(1, np.int32)
    counts = np.array([40, 40, 40], np.int32)
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int32)
    first = np.array([0, 40, 80], np.int32)
    bank = SurrogateBank(tokens, begins, lengths, none, first, counts, *[none] * 7)
    fast = jax.jit(splice, static_argnames="length")
    seen_lengths = set()
    for _ in range(300):
        width, components = 32, 12
        borders = np.sort(rng.choice(np.arange(1, width), components - 1, replace=False))
        component = np.searchsorted(borders, np.arange(width), side="right").astype(np.int32)
        component = np.where(rng.random(components) < 0.4, 0, np.arange(components))[component].astype(np.int32)
        begin = np.array([np.argmax(component == c) if (component == c).any() else -1 for c in range(components)], np.int32)
        if component[0] and rng.random() < 0.5:
            begin[component[0]] = -1  # cut by the border of the block before
        begin[0] = -1
        kind = rng.integers(1, 3, components).astype(np.int32)
        replaced = (rng.random(components) < 0.6) & (np.arange(components) > 0)
        row = rng.integers(0, 40, components).astype(np.int32)
        valid = np.arange(width) < rng.integers(1, width + 1)
        text = rng.integers(1, 1000, width).astype(np.int32)
        for length in (24, 32, 48):
            expected = splice_reference(text, valid, component, begin, kind, replaced, row, bank, length=length)
            got = fast(text, valid, component, begin, kind, replaced, row, bank, length=length)
            inside = np.asarray(got.source) < width
            assert np.asarray(got.tokens)[inside].tolist() == expected
            assert inside.sum() == len(expected) and not np.asarray(got.tokens)[~inside].any()
            seen_lengths.add(np.sign(int(got.ends[-1]) - valid.sum()))
    assert seen_lengths == {-1, 0, 1}  # shorter, equal and longer results all came up


def test_device_tokens_equal_the_text_reference_on_a_thousand_documents(prepared, corpus):
    """Same draws, same tokens: documents cut into blocks, masked on the device and joined again are the masked texts."""
    texts, spans, numbering, records = corpus
    tokenizer, bank = prepared.tokenizer, prepared.bank
    blocks = blocks_of(records, stride=23)  # short, so that borders cut many spans
    rows = [with_epoch(blocks[i], 5) for i in range(len(blocks))]
    masked = mask(rows, bank, length=24 * 4)
    assert masked.cut.sum() == 0
    joined = []
    for i in range(len(blocks)):
        use = (masked.source[i] < blocks.width) & ((masked.source[i] > 0) | (i == 0))  # the first token is context
        joined.extend(masked.tokens[i][use].tolist())

    detector = Detector(PiiConfig())
    drawn = jax.jit(jax.vmap(lambda row: draw_surrogates(KEY, row, bank)))
    assert sum((row["component_begin"] < 0).sum() - 1 for row in rows) > 100  # components that a border cut
    expected, changed, deltas = [], 0, set()
    single = blocks_of(records, stride=4096)
    assert len(single) < 40
    draws = {}
    big = as_batch([with_epoch(single[i], 5) for i in range(len(single))])
    anchors, entries = (np.asarray(x) for x in drawn(big))
    for i in range(len(single)):
        for c in np.flatnonzero(big.component_span[i]):
            s = big.component_span[i, c]
            draws[int(big.span_id[i, s]), int(big.component_index[i, c])] = (int(anchors[i, s]), int(entries[i, c]))
    for text, found, numbers in zip(texts, spans, numbering, strict=True):
        ids = numbers["span_id"]

        def word(span, index, kind, ids=ids):
            return tokenizer.decode(bank.entry(kind, draws[ids[span], index][1]))

        parts = mask_text(text, found, numbers["span_rank"], detector, lambda s, n, ids=ids: draws[ids[s], 0][0], word)
        changed += "".join(parts) != text
        deltas.add(np.sign(len("".join(parts)) - len(text)))
        expected += [tokenizer.bos_id, *(token for part in tokenizer.encode(parts) for token in part), tokenizer.eos_id]
    assert joined == expected
    assert changed > 500 and deltas == {-1, 0, 1}


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_masked_tokens_do_not_depend_on_devices_or_batch_split(prepared, corpus, devices):
    blocks = blocks_of(corpus[3], stride=40)
    rows = [with_epoch(blocks[i], i % 3) for i in range(32)]
    alone = [mask([row], prepared.bank, length=49) for row in rows]
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    batch = jax.device_put(as_batch(rows), batch_sharding(mesh))
    function = jax.jit(mask_batch, static_argnames=("rules", "length"))
    together = function(batch, prepared.bank, KEY, rules=Rule("keep_first"), length=49)
    assert len(together.tokens.sharding.device_set) == devices
    assert together.asked is None
    for name in (name for name in together._fields if name != "asked"):
        expected = np.concatenate([getattr(one, name) for one in alone])
        np.testing.assert_array_equal(np.asarray(getattr(together, name)), expected, err_msg=name)


def one_span(prepared, text="hi ann.lee@alder.example.com bye", copies=10_000):
    """Rows of one document with one address of rank 1, each an occurrence of its own."""
    spans, numbering, records = tagged([text], prepared.tokenizer)
    row = blocks_of(records, stride=len(records[0]["tokens"]) - 1)[0]
    rank, ids = row["span_rank"].copy(), row["span_id"].copy()
    rank[1] = 1
    rows = []
    for number in range(copies):
        ids = ids.copy()
        ids[1] = number
        rows.append(row | {"span_rank": rank, "span_id": ids})
    return rows, row["tokens"]


def test_anchor_is_uniform_and_every_surrogate_is_an_address(prepared):
    rows, _ = one_span(prepared)
    masked = mask(rows, prepared.bank, length=64)
    kept = {"local": 0, "domain": 0, "tld": 0}
    first_word = {}
    for tokens, source in zip(masked.tokens, masked.source, strict=True):
        text = prepared.tokenizer.decode(tokens[source < len(rows[0]["tokens"])])
        (found,) = detect(text)  # exactly one address
        assert text == f"hi {text[found.start : found.end]} bye"
        local, _, host = found.value.partition("@")
        domain, _, tld = host.partition(".")
        same = {"local": local == "ann.lee", "domain": domain == "alder", "tld": tld == "example.com"}
        assert sum(same.values()) == 1, found.value  # replaced but for its anchor
        kept[next(name for name, is_same in same.items() if is_same)] += 1
        if not same["local"]:
            assert local.count(".") == 1
            first_word[local.split(".")[0]] = first_word.get(local.split(".")[0], 0) + 1
    assert stats.chisquare(list(kept.values())).pvalue > 1e-4, kept
    rows_in_bank = int(prepared.bank.counts[1])
    total = sum(first_word.values())
    assert len(first_word) > 0.8 * rows_in_bank * (1 - np.exp(-total / rows_in_bank))  # the whole bank is drawn from
    assert max(first_word.values()) < 12 + 4 * total / rows_in_bank


def test_epochs_and_occurrences_draw_afresh_and_the_first_stays(prepared, corpus):
    texts, spans, numbering, records = corpus
    blocks = blocks_of(records, stride=60)
    both = [mask([with_epoch(blocks[i], epoch) for i in range(64)], prepared.bank, length=90) for epoch in (0, 1)]
    rank = np.stack([blocks[i]["span_rank"] for i in range(64)])
    identity = np.stack([blocks[i]["span_identity"] for i in range(64)])
    first_shown = identity[both[0].shown]
    assert len(set(first_shown.tolist())) == len(first_shown)  # nothing is shown twice
    assert (rank[both[0].shown] == 0).all()
    naive, seen = [], set()
    for found in spans:
        for span in found:
            naive.append(span.value not in seen)
            seen.add(span.value)
    ranks = [rank for numbers in numbering for rank in numbers["span_rank"]]
    assert [rank == 0 for rank in ranks] == naive
    changed = same = 0
    for a, b in zip(*(list(zip(m.tokens, m.origin, strict=True)) for m in both), strict=True):
        if (a[1] == SURROGATE).any():
            changed += a[0].tolist() != b[0].tolist()
            same += a[0].tolist() == b[0].tolist()
    assert changed > 30 and same <= 1


def test_no_replaced_occurrence_survives(prepared, corpus):
    """In the decoded batch a value stands as often as it was kept, however the surrogates fell."""
    _, _, _, records = corpus
    blocks = blocks_of(records, stride=4000)
    rows = [blocks[i] for i in range(len(blocks))]
    masked = mask(rows, prepared.bank, length=8000)
    values = []
    for row in masked.tokens:
        for document in np.split(row, np.flatnonzero(row == prepared.tokenizer.eos_id)):
            values += [span.value for span in detect(prepared.tokenizer.decode(document))]
    true = {span.value for text in corpus[0] for span in detect(text)}
    cut_by_a_border = sum(int((row["span_end"][1:] < 0).sum()) for row in rows)
    survivors = [value for value in values if value in true]
    assert len(survivors) <= len(true) + cut_by_a_border
    assert len(values) > 2000 and len(set(survivors)) > 0.9 * len(true)


def test_policy_none_equals_a_splice_that_replaces_nothing(prepared, corpus):
    blocks = blocks_of(corpus[3], stride=40)
    rows = [blocks[i] for i in range(16)]
    unranked = [row | {"span_rank": np.zeros_like(row["span_rank"])} for row in rows]
    for length in (30, 41, 50):
        short = mask(rows, prepared.bank, length=length, policy="none")
        long = mask(unranked, prepared.bank, length=length)
        for name in short._fields:
            np.testing.assert_array_equal(getattr(short, name), getattr(long, name), err_msg=name)
    assert (short.origin == PII).any()


def test_masking_does_not_depend_on_where_blocks_are_cut(prepared, corpus):
    streams = []
    for stride in (17, 40):
        blocks = blocks_of(corpus[3][:200], stride=stride)
        masked = mask([blocks[i] for i in range(len(blocks))], prepared.bank, length=5 * stride)
        inside = (masked.source < blocks.width) & (masked.source > 0)
        streams.append(masked.tokens[inside].tolist())
    assert streams[0] == streams[1]


def test_unknown_policy_is_refused(prepared, corpus):
    blocks = blocks_of(corpus[3][:5], stride=40)
    with pytest.raises(KeyError):
        mask([blocks[0]], prepared.bank, length=41, policy="keep_none")


def test_uniform_below_is_floor_of_bits_times_n_over_2_to_32():
    rng = np.random.default_rng(1)
    bits = np.concatenate([rng.integers(0, 2**32, 5000), [0, 2**32 - 1, 2**16, 2**31]]).astype(np.uint32)
    for n in (1, 2, 3, 58, 4096, 65535):
        got = np.asarray(uniform_below(jnp.asarray(bits), jnp.full(bits.shape, n)))
        assert got.tolist() == [int(b) * n >> 32 for b in bits]


def test_rows_have_the_documented_shapes(prepared, corpus):
    blocks = blocks_of(corpus[3], stride=40)
    batch = as_batch([blocks[0], blocks[1]])
    assert set(batch._fields) == set(TaggedBatch._fields)
    assert batch.tokens.shape == (2, 41) and all(array.dtype == np.int32 for array in batch)
