"""Memorization scores: kernels against scipy and closed forms, folds against single runs, both studies as a whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from rmft_jax.config import load_config, with_changes
from rmft_jax.data.blocks import Blocks, Corpus
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.errors import UserError
from rmft_jax.kernels import importance_weighted_log_likelihood, logmeanexp, m_score
from rmft_jax.models.vae import ConvVAE, DenseVAE, elbo, gaussian_log_density
from rmft_jax.report.html import claims_table, render, text_table
from rmft_jax.studies import run_study
from rmft_jax.studies.m_score import neighbour_ratio
from rmft_jax.study_config import FoldedImagesConfig
from rmft_jax.training.folds import FoldTrainer, fold_rows, log_likelihood


def test_logmeanexp_and_m_score_are_scipys():
    rng = np.random.default_rng(0)
    values, where = 300 * rng.normal(size=(6, 5)).astype(np.float32), np.arange(30).reshape(6, 5) % 3 > 0
    np.testing.assert_allclose(logmeanexp(values), logsumexp(values, axis=0) - np.log(6), rtol=1e-6)
    weighted = [logsumexp(values[w, n]) - np.log(w.sum()) for n, w in enumerate(where.T)]
    np.testing.assert_allclose(logmeanexp(values, where=where), weighted, rtol=1e-6)
    others = [logsumexp(values[~w, n]) - np.log((~w).sum()) for n, w in enumerate(where.T)]
    np.testing.assert_allclose(m_score(values, where), np.array(weighted) - others, rtol=1e-5)
    same = np.broadcast_to(values[:1], values.shape)
    np.testing.assert_allclose(m_score(same, where), 0, atol=1e-4)  # identical runs memorize nothing
    assert np.isnan(logmeanexp(values, where=np.zeros_like(where))).all()


def test_importance_sampling_comes_to_the_closed_form_of_a_linear_gaussian_model():
    rng = np.random.default_rng(1)
    w, s, x = rng.normal(size=(6, 2)), 0.7, rng.normal(size=(3, 6))
    exact = multivariate_normal(np.zeros(6), w @ w.T + s**2 * np.eye(6)).logpdf(x)
    precision = np.eye(2) + w.T @ w / s**2
    mean = x @ w @ np.linalg.inv(precision) / s**2

    class Linear:
        """p(x|z) = N(Wz, s^2), and a q that is a diagonal, wider posterior."""

        def encode(self, x):
            return jnp.asarray(mean, jnp.float32), jnp.full((3, 2), jnp.log(1.3 * np.linalg.inv(precision).max()))

        def log_likelihood(self, x, z):
            return gaussian_log_density(x, z @ w.T, jnp.full(6, 2 * np.log(s)))

    found = log_likelihood(Linear(), jnp.asarray(x, jnp.float32), jax.random.key(0), 4096)
    np.testing.assert_allclose(found, exact, atol=0.05)
    few = log_likelihood(Linear(), jnp.asarray(x, jnp.float32), jax.random.key(0), 1)
    assert few.shape == (3,) and (np.abs(few - exact) > 0.05).any()


def test_the_proposal_weighs_out():
    joint, proposal = np.float32([[0.0, 1.0], [2.0, 3.0]]), np.float32([[0.5, 0.5], [1.0, -1.0]])
    expected = logsumexp(joint - proposal, axis=0) - np.log(2)
    np.testing.assert_allclose(importance_weighted_log_likelihood(joint, proposal), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [DenseVAE, ConvVAE])
def test_the_bound_lies_below_the_likelihood(kind):
    from flax import nnx

    model = kind((8, 8, 1), (8, 4), 2, rngs=nnx.Rngs(params=jax.random.key(0)))
    x = jnp.asarray(np.random.default_rng(0).binomial(1, 0.4, (4, 8, 8, 1)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 64)
    bound = jnp.mean(jax.jit(jax.vmap(lambda key: elbo(model, x, key)))(keys), axis=0)
    found = jax.jit(lambda x: log_likelihood(model, x, jax.random.key(99), 1024))(x)
    assert (bound < found + 0.02).all() and (found - bound).max() < 5
    assert model.mean_image(jnp.zeros((3, 2))).shape == (3, 8, 8, 1)


def test_bernoulli_likelihood_is_that_of_independent_pixels():
    from flax import nnx
    from scipy.stats import bernoulli

    model = DenseVAE((2, 2, 1), (3,), 2, rngs=nnx.Rngs(params=jax.random.key(0)))
    x, z = np.array([[1, 0, 0, 1]], np.float32).reshape(1, 2, 2, 1), jnp.ones((1, 2))
    expected = bernoulli.logpmf(x.reshape(-1), np.asarray(model.mean_image(z)).reshape(-1)).sum()
    np.testing.assert_allclose(model.log_likelihood(x, z)[0], expected, rtol=1e-5)


def test_every_point_is_held_out_once_a_repetition():
    rows, trained = fold_rows(23, 5, 3, 0)
    assert rows.shape == (15, 16) and trained.shape == (15, 20)
    for repetition in range(3):
        np.testing.assert_array_equal((~trained[5 * repetition : 5 * repetition + 5]).sum(0), 1)
    for run, row in zip(trained, rows, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(run), row)
    assert (trained[:5] != trained[5:10]).any()


def test_folds_side_by_side_are_what_each_is_alone():
    config = FoldedImagesConfig(widths=(16,), latent=2, batch_size=8, samples=16, folds=2)
    images = np.random.default_rng(0).binomial(1, 0.3, (40, 4, 4, 1)).astype(np.float32)
    rows, _ = fold_rows(40, 2, 2, 0)
    seeds, rates = np.arange(4), np.array([1e-3, 1e-2, 1e-3, 1e-2])
    together = FoldTrainer(config, images, rows, seeds, rates)
    losses = np.concatenate([together.epoch(n) for n in range(3)], axis=1)
    alone = FoldTrainer(config, images, rows[1:2], seeds[1:2], rates[1:2])
    single = np.concatenate([alone.epoch(n) for n in range(3)], axis=1)
    np.testing.assert_allclose(losses[1], single[0], rtol=1e-4)
    np.testing.assert_allclose(together.log_likelihood()[1], alone.log_likelihood()[0], rtol=1e-4)
    assert losses[1, -2:].mean() < losses[1, :2].mean() and together.draw().shape == (4, 20, 4, 4, 1)


def test_neighbour_ratio_against_plain_distances():
    rng = np.random.default_rng(0)
    images, samples = rng.normal(size=(12, 3, 3, 1)), rng.normal(size=(2, 6, 3, 3, 1))
    trained = np.array([[1] * 6 + [0] * 6, [0] * 6 + [1] * 6], bool)
    found = neighbour_ratio(images, trained, samples)
    flat, drawn = images.reshape(12, 9), samples.reshape(2, 6, 9)
    for n in range(12):
        run = 0 if n < 6 else 1
        others = flat[~trained[run]]
        nearest = min(np.linalg.norm(flat[n] - o) for o in others), min(np.linalg.norm(flat[n] - d) for d in drawn[run])
        assert found[n] == pytest.approx(nearest[0] / nearest[1], rel=1e-5)


def test_blocks_apart_hold_every_target_once_and_never_two_documents(prepared):
    corpus = Corpus(read_corpus(prepared.directory, "train"))
    for stride in (16, 61):
        blocks = Blocks(corpus, stride=stride, apart=True)
        seen = []
        for n in range(len(blocks)):
            of = blocks.documents(n)
            row = blocks[n]
            assert set(of[of >= 0]) == {of[0]} and set(row["segment_ids"]) <= {0, 1}
            inside = row["segment_ids"] > 0
            np.testing.assert_array_equal(row["tokens"][inside], corpus.tokens[blocks._begin[n] :][: inside.sum()])
            seen.append(blocks._begin[n] + np.arange(1, inside.sum()))
        targets = np.flatnonzero(np.diff(corpus.document, prepend=-1) == 0)
        np.testing.assert_array_equal(np.sort(np.concatenate(seen)), targets)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run a small study of both kinds; return its settings and results."""
    out = tmp_path_factory.mktemp("study")
    sets = {"digits": {"limit": 60, "widths": [8], "latent": 2, "folds": 3, "repetitions": 1, "score_at": [1, 2],
                       "batch_size": 16, "samples": 16, "gallery": 2}}  # fmt: skip
    arms = {"plain": {}, "rmft": {"masking": {"policy": "keep_first"}}}
    text = {"folds": 2, "repetitions": 1, "score_at": [1, 2], "arms": arms}
    settings = [f"out={out}", "source.limit=30", "source.max_characters=300", "tokenizer.vocab_size=500", "model.layers=1",
                "model.width=16", "model.heads=1", "training.batch_size=8", "training.sequence_length=64", "canary.count=2",
                "canary.repetitions=[1, 4]", "masking.policy=none",
                f"study.m_score={json.dumps({'sets': sets, 'text': text})}"]  # fmt: skip
    return out, load_config(None, settings), run_study("m-score", load_config(None, settings), command="x")


def test_study_runs_resumes_and_is_shown(study):
    out, config, results = study
    assert results == json.loads((out / "results.json").read_text()) and results["study"]["parts"] == 4
    ids = {claim["id"] for claim in results["claims"]}
    assert {
        "digits-q95-grows",
        "digits-rate",
        "digits-neighbours",
        "text-canaries",
        "text-rmft-pii",
        "text-rmft-text",
    } <= ids
    times = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    (out / "parts" / "digits-0.0001.json").unlink()
    again = run_study("m-score", config, command="x")
    assert again["claims"] == results["claims"]
    assert sum(path.stat().st_mtime_ns != times[path] for path in times) == 1
    page = render(results)
    assert page.count("data:image/png") == 2 and "plot-canaries" in page and "NaN" not in page
    assert text_table(results).row_count == 2 + 4 * 5 + 4 * 6 and claims_table(results).row_count == len(results["claims"])


def test_text_score_counts_documents_copies_and_values(study):
    _, _, results = study
    plain, rmft = (results["findings"]["text"][name]["scores"][-1] for name in ("plain", "rmft"))
    assert plain["tokens_pii"] == rmft["tokens_pii"] and plain["repetitions"].count(4) in (4, 8)
    groups = np.array(plain["group"])[np.array(plain["repetitions"]) == 4]
    assert len(set(groups)) * 4 == len(groups)  # copies are held out together
    assert plain["m_among"] == pytest.approx(plain["m_text"], abs=2e-3)  # nothing is masked there
    assert rmft["m_among"] != pytest.approx(rmft["m_text"], abs=2e-3)
    assert np.mean(rmft["m_among"]) == pytest.approx(np.mean(rmft["m_text"]), rel=0.5)
    assert plain["identities"] and all(entry["documents"] >= 1 for entry in plain["identities"])
    one = [n for n, times in enumerate(plain["repetitions"]) if times == 1]
    assert one and all(plain["tokens_pii"][n] > 5 for n in one)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sets": {"digits": {"folds": 1}}}, "folds are 2 or more"),
        ({"sets": {"digits": {"score_at": [3, 2]}}}, "give rising numbers of epochs"),
        ({"sets": {"digits": {"model": "gan"}}}, "model is 'gan': choose one of mlp, conv"),
        ({"sets": {"digits": {"model": "conv", "widths": [4] * 4}}}, "not multiples of 16"),
        ({"sets": {"digits": {"samples": 20}}}, "use a multiple of 16"),
        ({"text": {"arms": {"plain": {"masking": {"policy": "all"}}}}}, "must be the one without a defence"),
        ({"text": {"folds": 1}}, "text: folds are 2 or more"),
        ({"text": {"score_at": []}}, "text.score_at is .*: give rising"),
    ],
)
def test_a_study_is_checked_before_anything_is_trained(tmp_path, more, message):
    sound = {"text": {"arms": {"plain": {"masking": {"policy": "none"}}}}}
    config = load_config(None, [f"out={tmp_path / 'out'}", f"study.m_score={json.dumps(sound)}"])
    with pytest.raises(UserError, match=message):
        run_study("m-score", with_changes(config, {"study": {"m_score": more}}), command="x")
    assert not (tmp_path / "out").exists()
