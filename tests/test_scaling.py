"""`rmft study scaling`: what follows from curves, by hand; a small study from the command line; masked language models."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from documents import SMALL
from test_report import Page, resolve

from rmft_jax.config import load_config
from rmft_jax.data.loader import batches
from rmft_jax.data.prepare import load_prepared
from rmft_jax.errors import UserError
from rmft_jax.kernels import mask_batch, target_mask
from rmft_jax.models.gpt import hidden, init_params, output_matrix
from rmft_jax.report.html import write_charts, write_report
from rmft_jax.report.view import show
from rmft_jax.studies.scaling import CLASSES, _timeline, plan_groups, token_classes
from rmft_jax.studies.scaling_results import (
    before_overfitting,
    loss_law,
    mean_interval,
    power_law,
    times_until,
    updates_until,
)
from rmft_jax.study_config import ArmConfig, ExperimentConfig
from rmft_jax.training.loop import train
from rmft_jax.training.losses import ask, dropout_key, shown_tokens
from rmft_jax.training.masking import masking_key, masking_rules
from rmft_jax.training.mesh import make_mesh
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import _ASK, compile_train_step, init_state, score_unmasked
from rmft_jax.training.tracker import TrackerShape

CONFIGS = Path(__file__).parent.parent / "configs"
STUDY = {
    "source": {"format": "synthetic", "limit": 60, "heldout_fraction": 0.3},
    "tokenizer": {"vocab_size": 500},
    "masking": {"policy": "none", "margin": 0},
    "model": {"layers": 1, "heads": 2},
    "training": {"batch_size": 16, "sequence_length": 32, "learning_rate": 1e-2, "warmup_steps": 2, "schedule": "wsd"},
    "study": {
        "seeds": 2,
        "scaling": {
            "taus": [0.05, 0.9],
            "ladder": {"w8": {"model": {"width": 8}}, "w16": {"model": {"width": 16}}, "w32": {"model": {"width": 32}}},
            "experiments": {
                "memorization": {"sizes": ["w8", "w32"], "epochs": 4, "until": 0.3},
                "forgetting": {
                    "sizes": ["w16"], "epochs": 4, "inject_at": 2,
                    "arms": {"control": {}, "once": {"passes": 1}, "three": {"passes": 3},
                             "spaced": {"passes": 2, "spacing": 1}},
                },
                "pii": {
                    "sizes": ["w16"], "epochs": 2, "score_training": True,
                    "arms": {"none": {}, "rmft": {"vary": {"masking": {"policy": "keep_first"}}}},
                },
                "masked": {"sizes": ["w16"], "epochs": 2,
                           "arms": {"masked": {"vary": {"training": {"objective": "masked"}}}}},
                "controls": {"sizes": ["w16"], "epochs": 2, "arms": {"ids": {"ids": "prepended"}}},
            },
        },
    },
}  # fmt: skip


def test_times_and_updates_until_by_hand():
    m = [0.0, 0.1, 0.3, 0.7, 0.6, 0.9]
    assert times_until(m, 0.3) == (2, pytest.approx(2.0))
    assert times_until(m, 0.5) == (3, pytest.approx(2.5))
    assert times_until(m, 0.65) == (3, pytest.approx(2.875))  # not again after the dip
    assert times_until(m, 0.95) == (None, None)
    assert times_until([0.5], 0.4) == (0, 0.0)
    updates = np.array([0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    assert updates_until(updates, (0.2, 0.6, 0.61)) == {"0.2": 5, "0.6": 7, "0.61": None}
    assert updates_until(updates[:3], (0.2,)) == {"0.2": None}


def test_memorization_before_overfitting_by_hand():
    scored = {"epochs": [1.01, 2.0, 2.98, 4.0, 4.0], "nll": [3.0, 2.5, 2.4, 2.45, 2.2]}  # a special batch after epoch 4
    member = {"m": [0.1, 0.2, 0.3, 0.4], "sets": {"heldout": scored | {"nll": [3.0, 2.5, 2.6, 2.7, 2.7]}}}
    assert before_overfitting(member) == (3, 0.3)
    assert before_overfitting({"m": [0.1] * 4, "sets": {"heldout": scored}}) is None


def test_fits_find_the_laws_that_made_the_data():
    sizes, rng = np.array([1e5, 3e5, 1e6, 3e6]), np.random.default_rng(0)
    times = [50 * (n / 1e5) ** -0.75 * np.exp(rng.normal(0, 0.02, 4)) for n in sizes]
    fit = power_law(sizes, times, to=1e7)
    assert fit["slope"] == pytest.approx(-0.75, abs=0.03) and fit["slope_ci"][0] < fit["slope"] < fit["slope_ci"][1]
    assert fit["slope_ci"][1] - fit["slope_ci"][0] < 0.03
    assert fit["predicted"] == pytest.approx(50 * 100**-0.75, rel=0.1)
    assert power_law(sizes[:1], times[:1]) is None and power_law(sizes, [*times[:3], np.array([])]) is None

    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e5, 1e8, 6)))
    loss = 1.7 + 60 / n**0.34 + 80 / d**0.28
    law = loss_law(n, d, loss, n)
    found = [law[name] for name in ("E", "alpha", "beta")]
    np.testing.assert_allclose(found, [1.7, 0.34, 0.28], rtol=0.02)
    assert law["rms"] < 1e-4 and law["points"] == 30
    assert loss_law(n[:2], d[:2], loss[:2], n[:2]) is None


def test_mean_interval_is_that_of_student():
    from scipy import stats

    values = [1.0, 2.0, 4.0, 3.5]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values)["mean_ci"] == pytest.approx([low, high])
    assert mean_interval([2.0])["mean_ci"] is None and mean_interval([1.0, None]) is None


def test_passes_end_together_and_spaced_ones_begin_there():
    arms = [ArmConfig(), ArmConfig(passes=1), ArmConfig(passes=3), ArmConfig(passes=2, spacing=2)]
    experiment = ExperimentConfig(epochs=6, inject_at=2, arms=dict(zip("abcd", arms, strict=True)))
    timeline = _timeline(arms, experiment, 6, 100, 100)
    some = [shown for shown in timeline if shown]
    assert timeline.count(None) == 6 and timeline[:2] == [None, None] and timeline[2] is not None
    assert some == [
        [False, False, True, False], [False, False, True, False], [False, True, True, False],
        [False, False, False, True], [False, False, False, True],
    ]  # fmt: skip
    last = [n for n, shown in enumerate(timeline) if shown][-1]
    assert timeline[:last].count(None) == 4


def test_tokens_have_classes(prepared):
    classes = token_classes(prepared.tokenizer)
    for text, name in (("the", "lower_case"), ("7", "numeral"), ("The", "capitalised"), (",", "other"), (" ", "space")):
        (ids,) = prepared.tokenizer.encode([text])
        assert CLASSES[classes[ids[0]] - 1] == name
    assert classes[prepared.tokenizer.bos_id] == 0


def rmft(folder, *more):
    """Run the study in a process of its own."""
    command = [sys.executable, "-m", "rmft_jax.cli", "study", "scaling", str(folder / "study.yaml"), *more]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | {"out": str(folder / "out")}, sort_keys=False))
    done = rmft(folder)
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads((folder / "out" / "results.json").read_text())


def test_the_study_says_what_was_measured(study):
    _, done, results = study
    assert results["study"] == {"name": "scaling", "parts": 7, "planned_parts": 7, "seeds": 2}
    sizes = results["findings"]["memorization"]["plain"]["sizes"]
    assert [size["parameters"] for size in sizes.values()] == sorted(size["parameters"] for size in sizes.values())
    assert all(size["times"]["0.05"]["between"]["mean"] >= 0 for size in sizes.values())
    assert all(size["times"]["0.9"]["between"] is None for size in sizes.values())
    forgetting = results["findings"]["forgetting"]
    at_once = {arm: found["sizes"]["w16"]["forgetting"]["at_once"]["mean"] for arm, found in forgetting.items()}
    assert at_once["three"] > at_once["once"] > at_once["control"]
    special = results["experiments"]["forgetting"]["w16"]["arms"]["control"]["members"][0]["sets"]["special"]
    assert special["ordinary"].count(False) == 5 and special["ordinary"].count(True) == 4
    before, after = special["nll"][1], special["nll"][2]
    assert before == after  # the control sat the passes out
    pii = results["findings"]["pii"]
    assert {arm: found["sizes"]["w16"]["pii"]["m"]["mean"] > 0 for arm, found in pii.items()} == {"none": True, "rmft": True}
    counted = {arm: found["sizes"]["w16"]["parameters"] for name in ("masked", "controls", "pii")
               for arm, found in results["findings"][name].items()}  # fmt: skip
    blocks = results["experiments"]["controls"]["w16"]["blocks"]
    assert counted["masked"] == counted["none"] + 16 and counted["ids"] == counted["none"] + 16 * blocks
    for claim in results["claims"]:
        assert isinstance(claim["holds"], bool) and math.isfinite(claim["measured"]), claim
    assert {"units", "baseline-passes", "pii-w16"} <= {claim["id"] for claim in results["claims"]}
    assert "w32" in done.stdout and "the forgetting baseline rises with passes" in done.stdout


def test_the_page_shows_what_was_measured(study, tmp_path):
    _, _, results = study
    page = Page(write_report(results, tmp_path / "report.html").read_text())
    marked = page.having("data-path")
    assert len(marked) > 200
    for item in marked:
        value = resolve(results, item["attrs"]["data-path"])
        assert json.loads(item["attrs"]["data-value"]) == value
        if item["tag"] == "span":
            assert item["text"] == show(value, item["attrs"]["data-path"].split(".")[-1])


def test_the_study_goes_on_where_it_was_interrupted(study):
    folder, _, results = study
    parts = folder / "out" / "parts"
    kept = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    (parts / "masked-w16-0.json").unlink()
    again = rmft(folder, "--json")
    assert again.returncode == 0, again.stderr
    now = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert [name for name in kept if now[name] != kept[name]] == ["masked-w16-0.json"]
    same = json.loads(again.stdout)
    for one in (results, same):
        one.pop("command")
        one["experiments"]["masked"]["w16"].pop("seconds")
    assert same == results


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ladder": {}}, "study.scaling.ladder is empty"),
        ({"taus": [0.0]}, "shares lie above 0"),
        ({"experiments": {"memorization": {"sizes": ["w9"]}}}, "choose among w8, w16, w32"),
        ({"experiments": {"f": {"arms": {"a": {"passes": 1}}}}}, "needs study.scaling.experiments.f.inject_at"),
        ({"experiments": {"f": {"arms": {"a": {"ids": "some"}}}}}, "choose one of none, vocabulary, prepended"),
        ({"experiments": {"f": {"arms": {"a": {"vary": {"training": {"speed": 1}}}}}}}, "training.speed"),
        ({"ladder": {"w9": {"model": {"width": 9}}}, "experiments": {"m": {}}}, "model.width 9"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, changes, says):
    tree = STUDY | {"study": {"seeds": 1, "scaling": STUDY["study"]["scaling"] | changes}, "out": str(tmp_path / "out")}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(UserError, match=says):
        plan_groups(load_config(tmp_path / "study.yaml"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def masked_config(tiny):
    return tiny(*SMALL, "training.batch_size=8", "training.sequence_length=32", "training.objective=masked",
                "tracker.enabled=true", "masking.policy=keep_first")  # fmt: skip


def test_a_masked_model_does_not_see_what_it_is_asked_but_all_else_of_the_document(masked_config, prepared):
    batch = next(batches(load_blocks(masked_config, prepared)[0], batch_size=8, seed=0))
    rows = mask_batch(batch, prepared.bank, jax.random.key(0), length=33, rules=masking_rules(masked_config))
    rows = ask(rows, masked_config, jax.random.key(1))
    params = init_params(masked_config.model, prepared.tokenizer.vocab_size + 1, jax.random.key(2))
    tokens, segments = shown_tokens(params, rows)
    asked = np.asarray(rows.asked[:, 1:])
    assert (np.asarray(tokens)[asked] == prepared.tokenizer.vocab_size).all()
    assert (np.asarray(tokens)[~asked] == np.asarray(rows.tokens)[:, 1:][~asked]).all() and 0.05 < asked.mean() < 0.3

    def features(positions):  # of what stands at each position, as a function of all of them
        table = params | {"embed": jnp.concatenate([params["embed"], positions])}
        own = jnp.arange(32)[None] + len(params["embed"])
        return hidden(table, masked_config.model, own, segments[:1], causal=False)[0]

    seen = jnp.abs(jax.jacrev(features)(params["embed"][tokens[0]])).sum((1, 3)) > 0
    same = np.asarray((segments[0][:, None] == segments[0]) & (segments[0] > 0))
    np.testing.assert_array_equal(np.asarray(seen)[np.asarray(segments[0]) > 0], same[np.asarray(segments[0]) > 0])


def test_the_tracker_counts_of_a_masked_model_what_it_was_asked(masked_config, prepared):
    blocks, heldout = load_blocks(masked_config, prepared)
    shape = TrackerShape(rounds=1, slices=3, bins=32, examples=0)
    optimizer, mesh = make_optimizer(masked_config.training, 9), make_mesh(masked_config.mesh, jax.devices()[:1])
    state = init_state(masked_config, prepared.tokenizer.vocab_size, prepared.identities, optimizer, shape)
    params = jax.tree.map(jnp.copy, state["params"])
    batch = next(batches(blocks, batch_size=8, seed=0))
    rows = mask_batch(batch, prepared.bank, masking_key(0), length=33, rules=masking_rules(masked_config))
    rows = ask(rows, masked_config, jax.random.fold_in(dropout_key(0, jnp.int32(0)), _ASK))
    logits = hidden(params, masked_config.model, *shown_tokens(params, rows), causal=False) @ output_matrix(params)
    targets = np.asarray(target_mask(rows.segment_ids) & rows.asked[:, 1:])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows.tokens[:, 1:, None], -1)[..., 0]
    step = compile_train_step(masked_config, optimizer, mesh, jax.eval_shape(lambda: state))
    state, metrics = step(state, *jax.device_put((batch, prepared.bank), jax.devices()[0]))
    assert float(metrics["loss"]) == pytest.approx(float(np.asarray(nll)[targets].mean()), rel=1e-5)
    counts = jax.device_get(state["tracker"]["counts"])
    assert counts["targets"].sum() == targets.sum() == int(metrics["targets"])
    assert counts["hits"].sum() == (np.asarray(logits.argmax(-1)) == rows.tokens[:, 1:])[targets].sum()

    row = next(batches(heldout, batch_size=8, seed=0))
    _, judged = score_unmasked(params, row, masked_config)
    plain = dataclasses.replace(masked_config, training=dataclasses.replace(masked_config.training, objective="causal"))
    _, every = score_unmasked(params, row, plain)
    assert (np.asarray(judged) <= np.asarray(every)).all() and 0.05 < judged.sum() / every.sum() < 0.3


def test_a_masked_model_is_not_for_rmft_train(masked_config, prepared):
    assert load_prepared(masked_config).directory == prepared.directory
    with pytest.raises(UserError, match="training.objective is masked"):
        train(masked_config)


@pytest.mark.parametrize("name", ["scaling_cpu", "scaling_gpu"])
def test_the_studies_that_come_with_the_project_are_sound(name):
    config = load_config(CONFIGS / "studies" / f"{name}.yaml")
    groups = plan_groups(config)
    assert {group.size for group in groups} == set(config.study.scaling.ladder)
    assert {"memorization", "forgetting", "pii"} <= {group.experiment for group in groups}
    assert [list(group.arms) for group in groups if group.experiment == "pii"][:3] == [["none"], ["rmft"], ["ours"]]
    assert all(group.config.training.weight_decay == 0 for group in groups)


def test_charts_are_files_of_their_own(study, tmp_path):
    import xml.etree.ElementTree as ElementTree

    paths = write_charts(study[2], tmp_path / "charts")
    assert {"times.svg", "m.svg", "special-w16.svg", "training_m_pii-w16.svg"} <= {path.name for path in paths}
    for path in paths:
        text = "".join(ElementTree.parse(path).getroot().itertext())
        assert "NaN" not in path.read_text() and len(text) > 20
