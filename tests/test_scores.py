"""The scores of extraction and membership: hand-computed vectors, plain numpy, scipy, statsmodels, rapidfuzz."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats
from statsmodels.stats.proportion import proportion_confint

from rmft_jax.config import ModelConfig, load_config
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.kernels import (
    all_hit,
    exposure_by_rank,
    extraction_strength,
    filtered_log_prob,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    n_p_discoverable,
    queries_needed,
    reference_score,
    vocabulary_statistics,
    zlib_score,
)
from rmft_jax.memorization.exposure import CHANCE, exposure_by_fit
from rmft_jax.memorization.membership import auc, separation, tpr_at_fpr
from rmft_jax.memorization.metrics import METRICS, Subject, k_eidetic, likeness, similarity
from rmft_jax.memorization.samples import Samples
from rmft_jax.memorization.scoring import FIELDS, Model, Sampling, make_rows
from rmft_jax.models.gpt import forward, init_params


def test_exposure_by_hand():
    references = jnp.arange(1.0, 17.0)
    perplexity = jnp.array([0.0, 3.5, 1.0, 16.0, 99.0])
    expected = [4.0, 2.0, 4.0, 0.0, 4 - np.log2(17)]  # ranks 1, 4, 1 (equal is not lower), 16, 17
    assert exposure_by_rank(perplexity, jnp.broadcast_to(references, (5, 16))).tolist() == pytest.approx(expected)


def test_a_random_value_has_the_stated_exposure_on_average():
    rng = np.random.default_rng(0)
    values, references = rng.normal(size=20_000), rng.normal(size=(20_000, 200))
    uniform = np.log2(200) - np.log2(np.arange(1, 202)).mean()  # every rank from 1 to 201 is equally likely
    assert float(exposure_by_rank(values, references).mean()) == pytest.approx(uniform, abs=0.04)
    assert np.log2(10**6) - np.log2(np.arange(1, 10**6 + 2)).mean() == pytest.approx(CHANCE, abs=1e-4)
    fits = [exposure_by_fit(v, r) for v, r in zip(values[:150], references[:150], strict=True)]
    assert np.mean(fits) == pytest.approx(CHANCE, abs=0.35)  # standard error 0.12


@pytest.mark.parametrize("shape", [-3.0, 0.0, 2.0])
def test_exposure_by_fit_equals_the_integral_of_the_true_density(shape):
    true = stats.skewnorm(shape, loc=30, scale=4)
    references = true.rvs(size=4000, random_state=1)
    for quantile in (0.5, 0.05, 0.002):
        value = float(true.ppf(quantile))
        expected = -np.log2(integrate.quad(true.pdf, -np.inf, value)[0])
        assert exposure_by_fit(value, references) == pytest.approx(expected, abs=0.3, rel=0.1)
    assert exposure_by_fit(-1e6, references, 33.2) == 33.2  # never more than the space has
    assert exposure_by_fit(1e6, references) == pytest.approx(0, abs=1e-9)
    assert exposure_by_fit(1.0, np.full(5, 2.0), 10.0) == 10.0 and exposure_by_fit(3.0, np.full(5, 2.0)) == 0


def test_n_p_by_hand():
    for p_z, p, n in [(0.01, 0.5, 69), (0.01, 0.9, 230), (0.001, 0.5, 693), (0.6, 0.5, 1), (0.5, 0.9, 4)]:
        assert float(queries_needed(jnp.log(p_z), p)) == n
        assert bool(n_p_discoverable(jnp.log(p_z), n, p)) and (n == 1 or not n_p_discoverable(jnp.log(p_z), n - 1, p))
    assert queries_needed(jnp.array([0.0, -jnp.inf]), 0.5).tolist() == [1, np.inf]
    assert n_p_discoverable(jnp.array([0.0, -jnp.inf]), 1000, 0.9).tolist() == [True, False]


def test_n_p_far_below_the_least_float():
    """At log p_z = -200, p_z itself is 0 in float32; n is ln 2 / p_z to first order."""
    log_p_z = np.array([-200.0, -90.0, -20.0, -14.9, -3.0, -1e-4])
    needed = np.asarray(queries_needed(log_p_z, 0.5)).astype(float)
    exact = np.log(np.log(2)) - np.log(-np.log1p(-np.exp(log_p_z)))
    assert np.isinf(needed[0]) and np.log(needed[2:4]) == pytest.approx(exact[2:4], abs=1e-4)
    assert needed[4:].tolist() == np.ceil(np.exp(exact[4:])).tolist()
    assert not n_p_discoverable(-200.0, 1e30, 0.5) and n_p_discoverable(-200.0, 1e30, 1e-30)[()] in (True, False)


def test_extraction_strength_and_all_hit_by_hand():
    hits = np.array([[0, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    valid = np.ones_like(hits)
    valid[3, 3] = False  # padding: that miss does not count
    assert extraction_strength(hits, valid).tolist() == pytest.approx([3 / 4, 1 / 4, 0, 2 / 3, 1, 0])
    assert all_hit(hits[:, 1:], valid[:, 1:]).tolist() == [True, False, False, True, True, False]


def test_membership_scores_by_hand():
    log_probs = jnp.array([[-1.0, -4.0, -2.0, -3.0, -9.0], [-1.0, -2.0, -3.0, -50.0, -60.0]])
    valid = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    assert loss_score(log_probs, valid).tolist() == pytest.approx([-3.8, -2.0])
    assert reference_score(log_probs, log_probs - 0.5, valid).tolist() == pytest.approx([0.5, 0.5])
    assert zlib_score(log_probs, valid, jnp.array([38, 4])).tolist() == pytest.approx([-0.1, -0.5])
    assert min_k_score(log_probs, valid, 0.4).tolist() == pytest.approx([-6.5, -3.0])  # lowest 2 of 5, 1 of 3
    assert min_k_score(log_probs, valid, 0.01).tolist() == pytest.approx([-9.0, -3.0])  # never none
    assert min_k_score(log_probs, valid, 1.0).tolist() == pytest.approx([-3.8, -2.0])
    mean, deviation = jnp.full((2, 5), -2.0), jnp.array([[1.0, 2, 1, 1, 7], [1, 4, 0.5, 1, 1]])
    # z: 1, -1, 0, -1, -1 and 1, 0, -2
    assert min_k_plus_plus_score(log_probs, mean, deviation, valid, 0.6).tolist() == pytest.approx([-1.0, -2.0])
    hundred = min_k_score(jnp.arange(-100.0, 0.0), jnp.ones(100, bool), 0.29)  # 0.29 x 100 is below 29 in binary
    assert float(hundred) == pytest.approx(np.arange(-100, -71).mean())


def test_vocabulary_statistics_are_those_of_a_sample():
    logits = np.random.default_rng(0).normal(size=30) * 2
    log_p = special.log_softmax(logits)
    draws = np.random.default_rng(1).choice(log_p, 400_000, p=np.exp(log_p))
    mean, deviation = vocabulary_statistics(jnp.array(logits))
    assert float(mean) == pytest.approx(draws.mean(), abs=0.01)
    assert float(deviation) == pytest.approx(draws.std(), abs=0.01)
    assert float(vocabulary_statistics(jnp.zeros(7))[1]) == pytest.approx(0, abs=1e-6)


def plain_filter(logits, target, temperature, top_k, top_p):
    """Filter one row of logits, step by step."""
    p = special.softmax(logits / temperature)
    order = list(np.argsort(-p, kind="stable"))
    if top_k:
        order = order[:top_k]
    total, kept = p[order].sum(), []
    for token in order:
        if sum(p[k] for k in kept) / total >= top_p:
            break
        kept.append(token)
    return np.log(p[target] / p[kept].sum()) if target in kept else -np.inf


@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.01])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_filtered_log_prob_equals_a_plain_loop(top_k, top_p, temperature):
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(size=(6, 60)) * 2, rng.integers(60, size=6)
    targets[0] = logits[0].argmax()
    ours = filtered_log_prob(jnp.array(logits), jnp.array(targets), temperature=temperature, top_k=top_k, top_p=top_p)
    expected = [plain_filter(row, t, temperature, top_k, top_p) for row, t in zip(logits, targets, strict=True)]
    assert np.asarray(ours).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_equals_mann_whitney(ties):
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.4, 1, 70), rng.normal(0, 1, 50)
    if ties:
        a, b = a.round(), b.round()
    expected = stats.mannwhitneyu(a, b).statistic / (70 * 50)
    result = separation(a, b, count=500, seed=0, confidence=0.95)
    assert auc(a, b) == pytest.approx(expected) == result["auc"]
    low, high = result["auc_ci"]
    # the standard error of Hanley & McNeil 1982
    q1, q2 = expected / (2 - expected), 2 * expected**2 / (1 + expected)
    variance = (expected * (1 - expected) + 69 * (q1 - expected**2) + 49 * (q2 - expected**2)) / (70 * 50)
    assert low < expected < high and high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.25)


def test_tpr_at_fpr_equals_a_walk_over_all_thresholds():
    rng = np.random.default_rng(6)
    for size in (30, 100, 2500):
        a, b = rng.normal(1, 1, 200).round(1), rng.normal(0, 1, size).round(1)
        for fpr in (0.001, 0.01, 0.1, 1.0):
            allowed = [np.mean(a > t) for t in [*a, *b, -np.inf] if np.mean(b > t) <= fpr + 1e-12]
            assert tpr_at_fpr(a, b, fpr) == pytest.approx(max(allowed))
    assert tpr_at_fpr(np.array([3.0, 1.0, 0.5]), np.array([1.0, 0.0]), 0.01) == pytest.approx(1 / 3)


def levenshtein(a: str, b: str) -> int:
    """Count edits by the textbook table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_likeness_equals_a_plain_levenshtein():
    rng = np.random.default_rng(7)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("ab.@"), rng.integers(0, 12))) for _ in range(2))
        expected = 1 - levenshtein(a, b) / max(len(a), len(b)) if a or b else 1.0
        assert likeness(a, b) == pytest.approx(expected)
    assert likeness("ann@x.com", "anne@x.com") == pytest.approx(0.9)


CONFIG = ModelConfig(layers=2, width=32, heads=2)
PARAMS = init_params(CONFIG, 61, jax.random.key(4))
PARAMS["embed"] = PARAMS["embed"] * 3
MODEL = Model(CONFIG, PARAMS, 61, batch_size=4)


def test_scores_of_padded_batches_equal_one_row_at_a_time():
    rng = np.random.default_rng(8)
    rows = make_rows([rng.integers(3, 61, length) for length in (9, 3, 9, 3, 9)], np.array([1, 1, 6, 2, 8]))
    sampling = Sampling(0.8, 10, 0.9)
    scores = MODEL.score(rows, tuple(FIELDS), sampling)
    for number, (tokens, start, end) in enumerate(zip(*rows, strict=True)):
        ids = jnp.array([tokens[:end]])
        logits = np.asarray(forward(PARAMS, CONFIG, ids, jnp.ones_like(ids)))[0, :-1].astype(float)
        log_p = special.log_softmax(logits, axis=-1)
        p, targets, at = np.exp(log_p), tokens[1:end], np.arange(end - 1)
        mean = (p * log_p).sum(-1)
        expected = {
            "log_prob": log_p[at, targets],
            "hit": log_p.argmax(-1) == targets,
            "mean": mean,
            "deviation": np.sqrt((p * log_p**2).sum(-1) - mean**2),
            "filtered_log_prob": [plain_filter(row, t, *sampling) for row, t in zip(logits, targets, strict=True)],
        }
        for name, values in expected.items():
            assert scores[name][number, start:end] == pytest.approx(np.asarray(values)[start - 1 :], abs=2e-4), name
            assert not scores[name][number, :start].any() and not scores[name][number, end:].any()


def test_all_hit_is_what_greedy_decoding_returns():
    """A prefix and what greedy decoding makes of it are extracted; with any other token in its place they are not."""
    rng = np.random.default_rng(9)
    prefix = rng.integers(3, 61, (5, 6)).astype(np.int32)
    decode = make_greedy_decoder(CONFIG, new_tokens=7, end_id=-1)
    whole = np.concatenate([prefix, np.asarray(decode(PARAMS, prefix, np.ones_like(prefix, bool)))], axis=1)
    other = whole.copy()
    other[:, 10] = 3 + (other[:, 10] - 2) % 58
    for tokens, extracted, strength in ((whole, True, 7 / 13), (other, False, 0)):
        hits = MODEL.score(make_rows(list(tokens)), ["hit"])["hit"]
        assert all_hit(hits[:, 6:], np.ones((5, 7), bool)).tolist() == [extracted] * 5
        found = extraction_strength(hits, np.ones_like(hits))
        assert (found >= strength - 1e-6).all() and (extracted or (found <= 2 / 13 + 1e-6).all())


def subject(prepared, config, **found):
    return Subject(MODEL, Samples(config, prepared), **found)


def test_similarity_by_hand(tiny, prepared):
    generated, answers = [["ann@x.com", "anne@x.co"], [], ["q"]], ["anne@x.com", "b@y.org", "q"]
    result = similarity(subject(prepared, tiny(), generated=generated, answers=answers))
    assert result["mean"] == pytest.approx((0.9 + 0 + 1) / 3) and result["prompts"] == 3
    low, high = result["mean_ci"]
    assert 0 <= low < result["mean"] < high <= 1
    assert similarity(subject(prepared, tiny())) is None


def test_k_eidetic_equals_a_recount(tiny, prepared):
    from rmft_jax.data.sources import read_documents
    from rmft_jax.pii.detector import detect
    from rmft_jax.pii.values import keyed_hash

    holders = {}
    for number, text in enumerate(read_documents(tiny().source).train):
        for span in detect(text):
            holders.setdefault(keyed_hash(span.value, prepared.identity_key), set()).add(number)
    held = [len(holders[digest]) for digest in prepared.identity_hashes]
    leaked = frozenset(range(0, len(held), 3))
    buckets = k_eidetic(subject(prepared, tiny(), leaked=leaked))["buckets"]
    assert [bucket["documents"] for bucket in buckets] == ["1", "2", "3-5", "6-10", "11+"]
    assert sum(bucket["values"] for bucket in buckets) == len(held)
    for bucket, (low, high) in zip(buckets, [(1, 1), (2, 2), (3, 5), (6, 10), (11, 10**9)], strict=True):
        inside = [number for number, count in enumerate(held) if low <= count <= high]
        extracted = len(leaked.intersection(inside))
        assert (bucket["values"], bucket["extracted"]) == (len(inside), extracted)
        assert bucket["k_eidetic"] == sum(held[number] <= high for number in leaked)
        expected = proportion_confint(extracted, len(inside), method="beta")
        assert bucket["rate_pct_ci"] == pytest.approx([100 * bound for bound in np.nan_to_num(expected)], abs=1e-9)


def test_the_config_names_all_metrics():
    assert tuple(METRICS) == load_config().audit.metrics
