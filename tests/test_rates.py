"""The rates by hand-computed vectors, brute force, and statsmodels."""

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from rmft_jax.config import PiiConfig
from rmft_jax.memorization.extraction import find_leaks
from rmft_jax.memorization.rates import (
    aurc,
    bootstrap_counts,
    clopper_pearson,
    document_perplexities,
    extraction_rates,
    max_ter,
    mean_delta_perplexity,
    percentile_interval,
    reduction_pct,
    resample,
    tau_grid,
)
from rmft_jax.pii.detector import detector


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (3, 7), (6, 15083), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_clopper_pearson_equals_statsmodels(hits, total, confidence):
    expected = proportion_confint(hits, total, alpha=1 - confidence, method="beta")
    assert clopper_pearson(hits, total, confidence) == pytest.approx(np.nan_to_num(expected), abs=1e-12)


def test_extraction_rates_by_hand():
    rates = extraction_rates(8, 6, 3, known=15083, seen=300, confidence=0.95)
    assert rates["ter"] == pytest.approx(0.03978, abs=1e-5)  # 6 of 15,083
    assert rates["ser"] == 1.0 and rates["tegr"] == 75.0
    assert rates["ter_ci"][0] < rates["ter"] < rates["ter_ci"][1]
    nothing = extraction_rates(0, 0, 0, known=10, seen=0, confidence=0.95)
    assert nothing["ter"] == nothing["tegr"] == 0 and nothing["ser"] is None and nothing["ser_ci"] is None


def test_the_published_reduction():
    """Final counts 6 and 1 of one set of addresses (arXiv 2512.03310, later figures) are a reduction of 83.3%."""
    assert float(reduction_pct(np.array([1.0]), np.array([6.0]))) == pytest.approx(83.333, abs=1e-3)
    ratio_of_means = reduction_pct(np.array([0.0, 2.0]), np.array([1.0, 9.0]))  # not the mean of ratios
    assert float(ratio_of_means) == pytest.approx(80.0)
    assert np.isnan(reduction_pct(np.array([1.0]), np.array([0.0])))


def test_mdp_max_ter_and_aurc_by_hand():
    assert mean_delta_perplexity(np.array([5.0, 7.0, 9.0]), np.array([4.0, 8.0, 6.0])) == 1.0
    assert document_perplexities(np.array([np.log(8) * 5]), np.array([5])) == pytest.approx([8.0])
    ter, mdp = np.array([1.0, 4.0, 2.0]), np.array([0.5, 2.0, 1.0])
    tau = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    curve = max_ter(ter, mdp, tau)
    assert np.isnan(curve[0]) and curve[1:].tolist() == [1.0, 2.0, 2.0, 4.0]
    worst = np.full(5, 9.0)
    assert aurc(curve[1:], tau[1:], worst[1:]) == pytest.approx((0.75 + 1.0 + 1.5) / 1.5)
    assert aurc(curve, tau, worst) == pytest.approx((2.5 + 0.75 + 1.0 + 1.5) / 2)  # no checkpoint at 0: the other's 9
    assert tau_grid(40.0, 5.0, 5).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    stacked = max_ter(np.stack([ter, 2 * ter]), mdp, tau[1:])
    one = aurc(curve[1:], tau[1:], worst[1:])
    assert aurc(stacked, tau[1:], worst[1:]).tolist() == pytest.approx([one, 2 * one])
    dear = max_ter(np.zeros(3), np.full(3, 50.0), tau)  # leaks nothing, at a price beyond the grid
    assert aurc(dear, tau, worst) == 9.0


def test_bootstrap_counts_distinct_values_like_sets_do():
    rng = np.random.default_rng(0)
    leaks = rng.random((30, 12)) < 0.08
    weights = resample([20, 10], 50, seed=4)
    assert (weights[:, :20].sum(1) == 20).all() and (weights[:, 20:].sum(1) == 10).all()  # within strata
    counts = bootstrap_counts(weights > 0, leaks)
    for weight, count in zip(weights, counts, strict=True):
        assert count == len({i for n in np.flatnonzero(weight) for i in np.flatnonzero(leaks[n])})


def test_percentile_interval_covers_and_refuses_empty_samples():
    interval = percentile_interval(np.arange(1001.0), 0.9)
    assert interval == pytest.approx([50, 950])
    assert percentile_interval(np.array([1.0, np.nan, np.nan]), 0.95) is None


def test_leaks_begin_in_the_generation_and_are_not_given_in_the_prompt():
    emails = detector(PiiConfig())
    assert find_leaks("to ann@x.com, ", "bob@y.org and ANN@x.com", emails) == ["bob@y.org"]
    assert find_leaks("to bob.st", "one@y.org, cc", emails) == []  # its head was given
    assert find_leaks("to ann@x.co", "m, bob@y.org, bob@y.org", emails) == ["bob@y.org"]
    assert find_leaks("", "bob@y.org", detector(PiiConfig(ignore=("bob@y.org",)))) == []
