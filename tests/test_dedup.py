"""Test deduplication against brute force, exact Jaccard and datasketch."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmft_jax.data.dedup import _choose_bands, datasketch_nearest, near_duplicates, repeated_substrings
from rmft_jax.data.synthetic import synthetic_mail
from rmft_jax.errors import UserError

THRESHOLD = 0.8
ENRON = Path(__file__).parents[2] / "shared" / "data" / "enron_train.jsonl.gz"
GENERATED_DIGEST_SCRIPT = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from test_dedup import generate_texts
from rmft_jax.data.dedup import near_duplicates
print(hashlib.sha256(near_duplicates(generate_texts(3), seed=7).tobytes()).hexdigest())
"""


# Repeated substrings


def window_starts(tokens, document_ids, length):
    """Map each window inside one document (as a tuple) to its starts, lowest first."""
    found = defaultdict(list)
    for start in range(len(tokens) - length + 1):
        if len(set(document_ids[start : start + length])) == 1:
            found[tuple(tokens[start : start + length])].append(start)
    return found


def brute_force(tokens, document_ids, length, *, gap):
    """Mark the windows that equal a window starting at least `gap` tokens earlier."""
    marked = np.zeros(len(tokens), dtype=bool)
    for starts in window_starts(list(map(int, tokens)), list(map(int, document_ids)), length).values():
        for start in starts:
            if any(earlier + gap <= start for earlier in starts):
                marked[start : start + length] = True
    return marked


def random_documents(rng, size, alphabet, mean_length):
    tokens = rng.integers(0, alphabet, size)
    return tokens, np.cumsum(rng.random(size) < 1 / mean_length)


def test_matches_brute_force_on_random_arrays():
    rng = np.random.default_rng(0)
    marked = 0
    for _ in range(1200):
        size, alphabet, length = int(rng.integers(0, 40)), int(rng.integers(1, 4)), int(rng.integers(1, 7))
        tokens, ids = random_documents(rng, size, alphabet, float(rng.integers(1, 20)))
        expected = brute_force(tokens, ids, length, gap=length)
        np.testing.assert_array_equal(repeated_substrings(tokens, ids, min_tokens=length), expected)
        marked += expected.sum()
    assert marked > 1000  # Otherwise the comparison proves little.


@settings(max_examples=150, deadline=None)
@given(
    documents=st.lists(st.lists(st.sampled_from([0, 7, 255, 256, 99_999]), max_size=12), max_size=6),
    length=st.integers(1, 5),
    dtype=st.sampled_from([np.int32, np.uint32, np.int64, ">i4"]),
)
def test_matches_brute_force_for_wide_ids(documents, length, dtype):
    tokens = np.array([token for document in documents for token in document], dtype=dtype)
    ids = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    expected = brute_force(tokens, ids, length, gap=length)
    np.testing.assert_array_equal(repeated_substrings(tokens, ids, min_tokens=length), expected)


def test_any_lower_start_counts_where_windows_cannot_overlap_themselves():
    """Compare with the plain definition (any lower start) where no token occurs twice in a document."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        runs = [np.roll(np.arange(6), rng.integers(6))[: rng.integers(2, 7)] for _ in range(8)]
        tokens, ids = np.concatenate(runs), np.repeat(np.arange(8), [len(run) for run in runs])
        for length in (2, 3, 5):
            expected = brute_force(tokens, ids, length, gap=1)
            np.testing.assert_array_equal(repeated_substrings(tokens, ids, min_tokens=length), expected)


def test_first_occurrence_stays_and_later_ones_go_in_full():
    run = np.arange(100, 110)
    tokens = np.concatenate([[1, 2], run, [3], run, [4, 5], run[:4], [6]])
    marked = repeated_substrings(tokens, np.zeros(tokens.size, int), min_tokens=5)
    assert np.flatnonzero(marked).tolist() == list(range(13, 23))  # The run of 4 is too short.
    assert repeated_substrings(tokens, np.zeros(tokens.size, int), min_tokens=4).sum() == 14


def test_matches_do_not_cross_document_borders():
    tokens = np.array([1, 2, 3, 4, 9, 1, 2, 3, 4])
    one = np.zeros(9, int)
    assert repeated_substrings(tokens, one, min_tokens=4).tolist() == [False] * 5 + [True] * 4
    for border in (2, 7):  # In the first copy, then in the second.
        ids = (np.arange(9) >= border).astype(int)
        assert not repeated_substrings(tokens, ids, min_tokens=4).any()
    ids = (np.arange(9) >= 5).astype(int)
    assert repeated_substrings(tokens, ids, min_tokens=4).sum() == 4
    # A first copy that a border splits must not shield the next one, nor be taken as the first.
    tokens, ids = np.tile([1, 2, 3], 3), np.array([0, 1, 1, 2, 2, 2, 3, 3, 3])
    assert np.flatnonzero(repeated_substrings(tokens, ids, min_tokens=3)).tolist() == [6, 7, 8]


def test_returning_document_id_is_a_border():
    tokens, ids = np.array([1, 2, 8, 1, 2]), np.array([0, 0, 1, 0, 0])
    assert repeated_substrings(tokens, ids, min_tokens=2).tolist() == [False, False, False, True, True]
    assert not repeated_substrings(tokens, np.array([0, 0, 1, 1, 0]), min_tokens=2).any()


@pytest.mark.parametrize("length", [1, 2, 3, 10])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_self_repeat_keeps_at_least_one_window(length, period):
    tokens = np.resize(np.arange(period), 60)
    marked = repeated_substrings(tokens, np.zeros(60, int), min_tokens=length)
    kept = -(-length // period) * period
    assert np.flatnonzero(~marked).tolist() == list(range(kept))


def test_accepts_read_only_and_strided_arrays_and_leaves_them_alone():
    backing = np.repeat(np.array([5, 6, 5, 6], dtype=np.uint16), 2)
    tokens = backing[::2]
    tokens.flags.writeable = False
    marked = repeated_substrings(tokens, np.zeros(4, np.int32), min_tokens=2)
    assert marked.dtype == bool and marked.tolist() == [False, False, True, True]
    assert backing.tolist() == [5, 5, 6, 6, 5, 5, 6, 6]


def test_corpus_shorter_than_a_window():
    for size in (0, 1, 4):
        marked = repeated_substrings(np.zeros(size, np.int32), np.zeros(size, np.int32), min_tokens=5)
        assert marked.shape == (size,) and marked.dtype == bool and not marked.any()


@pytest.mark.parametrize(
    ("tokens", "ids", "length"),
    [
        (np.zeros(3, int), np.zeros(3, int), 0),
        (np.zeros(3, int), np.zeros(2, int), 1),
        (np.zeros((3, 1), int), np.zeros((3, 1), int), 1),
        (np.zeros(3), np.zeros(3, int), 1),
        (np.zeros(3, int), np.zeros(3), 1),
    ],
)
def test_bad_token_arguments(tokens, ids, length):
    with pytest.raises(ValueError):
        repeated_substrings(tokens, ids, min_tokens=length)


# Near-duplicates


def generate_texts(seed, groups=80, versions=4):
    """Generate a shuffled corpus: groups of documents that differ in a share of words drawn per version."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(groups):
        base = rng.integers(0, 20_000, int(rng.integers(20, 200)))
        for share in [0.0, *rng.choice([0.0, 0.02, 0.04, 0.1, 0.25, 0.5], versions - 1)]:
            words = np.where(rng.random(base.size) < share, rng.integers(0, 20_000, base.size), base)
            texts.append(" ".join(f"w{word}" for word in rng.permutation(words)))
    return [texts[i] for i in rng.permutation(len(texts))]


def exact_jaccard(texts):
    """Return float [n, n], the exact Jaccard similarity of the token sets."""
    sets = [set(text.lower().split()) for text in texts]
    vocabulary = {word: i for i, word in enumerate(set().union(*sets))}
    present = np.zeros((len(sets), len(vocabulary)), dtype=np.float32)
    for row, words in enumerate(sets):
        present[row, [vocabulary[word] for word in words]] = 1
    shared = present @ present.T
    sizes = present.sum(1)
    return shared / (sizes[:, None] + sizes[None] - shared)


def test_copies_found_disjoint_kept_first_stays():
    texts = ["the quick brown fox", "lorem ipsum dolor sit", "fox  BROWN the\tQuick the", "one two three"]
    assert near_duplicates(texts + texts[1:2]).tolist() == [False, False, True, False, True]
    assert near_duplicates(texts[::-1]).tolist() == [False, False, False, True]


def test_empty_texts_are_kept():
    assert near_duplicates(["", "a b", " \n", "", "A  b"]).tolist() == [False, False, False, False, True]
    assert near_duplicates([]).shape == (0,)
    assert near_duplicates([""]).dtype == bool


def test_only_kept_documents_are_compared():
    """A chain a ~ b ~ c with a !~ c: b goes, and c stays as its only near neighbour is not kept."""
    chain = [" ".join(f"w{i}" for i in range(start, start + 1000)) for start in (0, 60, 120)]
    similarity = exact_jaccard(chain)
    assert similarity[0, 1] > 0.88 and similarity[1, 2] > 0.88 and similarity[0, 2] < 0.79
    threshold = 0.84  # Estimates have a standard deviation near 0.03; the seed fixes them.
    assert near_duplicates(chain, threshold=threshold).tolist() == [False, True, False]
    assert near_duplicates(chain[1:], threshold=threshold).tolist() == [False, True]


def test_agrees_with_exact_jaccard():
    recalled = wanted = flagged = 0
    for seed in range(3):
        texts = generate_texts(seed)
        marked = near_duplicates(texts, threshold=THRESHOLD)
        earlier = np.tril(exact_jaccard(texts), -1)
        best_kept = np.where(~marked[None], earlier, 0).max(1)  # With the nearest earlier kept one.
        near = best_kept >= 0.9
        wanted, recalled = wanted + near.sum(), recalled + (near & marked).sum()
        flagged += marked.sum()
        assert not (marked & (best_kept < 0.6)).any()
    assert wanted > 200 and flagged < 3 * 320 * 0.75
    assert recalled / wanted >= 0.95


def test_agrees_with_exact_jaccard_pair_by_pair():
    """Test lone pairs, so that an earlier document cannot hide a miss."""
    rng = np.random.default_rng(5)
    hits = {True: [], False: []}
    for _ in range(600):
        base = [f"w{i}" for i in rng.integers(0, 10**6, 60)]
        changed = int(rng.choice([2, 3, 16, 18]))  # Jaccard about .93, .90, .58 and .54.
        other = [f"x{i}" for i in range(changed)] + base[changed:]
        similarity = len(set(base) & set(other)) / len(set(base) | set(other))
        if similarity >= 0.9 or similarity < 0.6:
            hits[similarity >= 0.9].append(near_duplicates([" ".join(base), " ".join(other)])[1])
    assert len(hits[True]) > 200 and len(hits[False]) > 200
    assert np.mean(hits[True]) >= 0.95
    assert not any(hits[False])


def test_agrees_with_datasketch():
    datasketch = pytest.importorskip("datasketch")
    texts = generate_texts(4)
    index, expected = datasketch.MinHashLSH(num_perm=128, params=(16, 8)), []
    sketches = {}
    for row, text in enumerate(texts):
        sketch = datasketch.MinHash(num_perm=128, seed=1)
        sketch.update_batch([word.encode() for word in set(text.split())])
        expected.append(any(sketches[key].jaccard(sketch) >= THRESHOLD for key in index.query(sketch)))
        if not expected[-1]:
            index.insert(row, sketch)
            sketches[row] = sketch
    marked = near_duplicates(texts, threshold=THRESHOLD)
    assert 0.2 < np.mean(expected) < 0.8
    assert abs(marked.mean() - np.mean(expected)) < 0.03
    assert (marked == expected).mean() > 0.93


def straight_datasketch(texts, threshold=0.8, num_perm=128):
    """Return (flags, for each text the earlier kept ones that share a band) as the README of datasketch would have it."""
    datasketch = pytest.importorskip("datasketch")
    index, flags, shared = datasketch.MinHashLSH(threshold=threshold, num_perm=num_perm), [], []
    for number, text in enumerate(texts):
        sketch = datasketch.MinHash(num_perm=num_perm)
        for word in set(text.lower().split()):
            sketch.update(word.encode("utf8"))
        found = index.query(sketch) if text.split() else []
        flags.append(bool(found))
        shared.append(set(found))
        if text.split() and not found:
            index.insert(number, sketch)
    return np.array(flags), shared


@pytest.mark.parametrize("source", ["generated", "0.5 of 64", "mail", "enron"])
def test_the_datasketch_mode_is_datasketch(source):
    threshold, num_perm, rng = 0.8, 128, np.random.default_rng(8)
    texts = generate_texts(9)
    if source == "0.5 of 64":
        threshold, num_perm = 0.5, 64
    elif source == "mail":
        mails = [item["text"] for item in synthetic_mail(150, seed=3)]
        replies = [f"{mails[number]} Thank you, {number}" for number in rng.integers(0, 150, 60)]
        texts = [mails[0], "", *mails, " \n", *replies]
    elif source == "enron":
        if not ENRON.exists():
            pytest.skip("the Enron sample is not beside the project")
        with gzip.open(ENRON, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["raw"] for line in itertools.islice(file, 600)]
    expected, shared = straight_datasketch(texts, threshold, num_perm)
    nearest = datasketch_nearest(texts, threshold=threshold, num_perm=num_perm)
    np.testing.assert_array_equal(nearest >= 0, expected)
    assert all(int(one) in found for one, found in zip(nearest, shared, strict=True) if one >= 0)
    assert 15 < expected.sum() < len(texts) - 15


def test_prepared_data_and_their_copy_can_be_those_of_datasketch(tmp_path, monkeypatch):
    from rmft_jax.config import load_config
    from rmft_jax.data.dedup_report import dedup
    from rmft_jax.data.prepare import load_prepared, prepare
    from rmft_jax.data.sources import read_documents
    from rmft_jax.data.tagged_corpus import read_corpus

    settings = ["source.limit=200", "tokenizer.vocab_size=400", "dedup.minhash=datasketch", "dedup.near_threshold=0.4"]
    config = load_config(None, [*settings, f"out={tmp_path / 'out'}"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasketch", None)
        with pytest.raises(UserError, match=r"needs datasketch: pip install 'rmft-jax\[datasketch\]'"):
            prepare(config, workers=1)
    high = dataclasses.replace(config, dedup=dataclasses.replace(config.dedup, near_threshold=1.0))
    with pytest.raises(UserError, match="datasketch refuses dedup.near_threshold 1.0 .*lower the threshold"):
        prepare(high, workers=1)
    assert not (tmp_path / "out").exists()
    manifest = prepare(config, workers=1)
    expected, shared = straight_datasketch(read_documents(config.source).train, threshold=0.4)
    near = [bool((record["duplicate"] == 1).all()) for record in read_corpus(config.data_dir, "train")]
    assert near == expected.tolist() and 10 < expected.sum() < 170
    assert manifest["duplicates"]["minhash"] == f"datasketch {importlib.metadata.version('datasketch')}"
    clusters = dedup(config, load_prepared(config))["clusters"]
    assert sorted(number for cluster in clusters for number in cluster[1:]) == np.flatnonzero(expected).tolist()
    assert all(first in shared[number] for first, *others in clusters for number in others)


def test_threshold_moves_the_share_flagged():
    texts = generate_texts(6)
    shares = [near_duplicates(texts, threshold=threshold).mean() for threshold in (0.3, 0.6, 0.8, 0.95, 1.0)]
    assert (np.diff(shares) < 0).all()


def test_deterministic_across_processes():
    here = Path(__file__).resolve().parent
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(here.parent)}
        script = GENERATED_DIGEST_SCRIPT.format(tests=str(here))
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout.strip())
    digests.add(hashlib.sha256(near_duplicates(generate_texts(3), seed=7).tobytes()).hexdigest())
    assert len(digests) == 1


def test_seed_matters_near_the_threshold():
    texts = generate_texts(3)
    assert (near_duplicates(texts, seed=7) != near_duplicates(texts, seed=8)).any()


@pytest.mark.parametrize(("threshold", "bands"), [(0.8, 16), (1.0, 1)])
def test_bands(threshold, bands):
    assert _choose_bands(threshold, 128) == bands


@pytest.mark.parametrize("num_perm", [1, 37, 100])
def test_bands_divide_any_signature(num_perm):
    assert num_perm % _choose_bands(0.8, num_perm) == 0
    assert near_duplicates(["a b c", "c b a", "x y"], num_perm=num_perm).tolist()[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": 0.0},
        {"threshold": 1.01},
        {"threshold": -0.1},
        {"threshold": float("nan")},
        {"num_perm": 0},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_bad_minhash_arguments(arguments):
    with pytest.raises(ValueError):
        near_duplicates(["a"], **arguments)


def test_a_copy_without_duplicates(tiny, prepared, capsys):
    """What `rmft dedup` writes is what training reads under near_exact, and each near-duplicate is in a cluster once."""
    from rmft_jax.config import SourceConfig
    from rmft_jax.data.dedup_report import dedup
    from rmft_jax.data.sources import read_documents
    from rmft_jax.data.tagged_corpus import read_corpus

    config = tiny()
    report = dedup(config, prepared)
    records = list(read_corpus(prepared.directory, "train"))
    near = [number for number, record in enumerate(records) if (record["duplicate"] == 1).all()]
    assert near and sorted(number for cluster in report["clusters"] for number in cluster[1:]) == near
    firsts = [cluster[0] for cluster in report["clusters"]]
    assert len(set(firsts)) == len(firsts) and not set(firsts) & set(near)
    words = lambda number: set(prepared.tokenizer.decode(records[number]["tokens"]).lower().split())  # noqa: E731
    similar = [len(words(a) & words(b)) / len(words(a) | words(b)) for a, *others in report["clusters"] for b in others]
    assert min(similar) > 0.65  # estimates from 128 hashes against a threshold of 0.8
    path = f"{config.out}/dedup/documents.jsonl.gz"
    documents = read_documents(SourceConfig(format="jsonl", path=path, limit=0, heldout_fraction=0.0, heldout_path=path))
    kept = [record["tokens"][record["duplicate"] == 0] for record in records]
    expected = [text for tokens in kept if len(tokens) and (text := prepared.tokenizer.decode(tokens)).strip()]
    assert documents.train == expected and report["kept_tokens"] == sum(map(len, kept))
    assert "@" not in (Path(config.out) / "dedup" / "dedup.json").read_text()
