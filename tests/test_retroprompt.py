"""Prompts with and without retrieval: texts, both forms of a prompt, few-shot training; language models beside a store."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import rmft

from rmft_jax.config import ModelConfig, load_config
from rmft_jax.data.labelled import cloze_rows, generate_reviews, generate_unlabelled, load_labelled, word_ids
from rmft_jax.errors import UserError
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.models.cloze import Cloze, Prompts, read_lower
from rmft_jax.models.gpt import init_params
from rmft_jax.report.html import claims_table, render, text_table
from rmft_jax.studies import run_study
from rmft_jax.studies.retroprompt import _results
from rmft_jax.studies.retroprompt_text import text_results
from rmft_jax.study_config import LookupTextConfig, PromptSetConfig
from rmft_jax.training.lookup import Text, gold_probability, make_store
from rmft_jax.training.prompts import Shots, train_prompts

MODEL = ModelConfig(layers=2, width=16, heads=2)


def test_reviews_say_what_their_label_says():
    pairs = generate_reviews(300, seed=1)
    assert pairs == generate_reviews(300, seed=1) and len(dict(pairs)) == 300
    good, bad = "great good lovely superb pleasant excellent".split(), "terrible bad awful poor dreadful dull".split()
    agree = []
    for text, label in pairs:
        side = 0
        for part in text.rstrip(".").replace(" but ", "|").replace(", and ", "|").split("|"):
            turned = any(word in part for word in (" not ", "anything but", "obody could"))
            word = part.split()[-1]
            side += (1 if word in good else -1 if word in bad else 0) * (-1 if turned else 1)
        if side:
            agree.append((side > 0) == (label == "good"))
    assert np.mean(agree) > 0.8 and len(agree) > 150
    closed = [text for text in generate_unlabelled(200, seed=0, closing=1.0)]
    assert all(" It was " in text for text in closed)


def test_labelled_texts_are_drawn_by_the_seed_and_tested_on_the_same_others(tmp_path):
    first, second = (load_labelled("reviews", shots=4, test=50, seed=seed) for seed in (0, 1))
    assert first.test == second.test and first.train != second.train
    assert not set(first.train) & set(first.test)
    assert (np.bincount(first.train_labels) == 4).all() and first.words == (" terrible", " great")
    path = tmp_path / "texts.jsonl"
    rows = [{"caption": f"thing {n % 12}", "kind": "ab"[n % 2], "other": n == 3} for n in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)))
    fields = {"path": str(path), "text_field": "caption", "label_field": "kind", "words": {"a": " one", "b": " two"}}
    found = load_labelled("jsonl", shots=2, test=4, seed=0, **fields)
    assert len(found.train) == 4 and len({*found.train, *found.test}) == 8
    for changes, what in (
        ({"shots": 9}, "lower shots"), ({"words": {"a": " one"}}, "two labels"), ({"label_field": "no"}, ":1 is no object"),
        ({"path": str(tmp_path / "none")}, "cannot be read"), ({"path": ""}, "need a path"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=what):
            load_labelled("jsonl", **({"shots": 2, "test": 4, "seed": 0} | fields | changes))


def test_prompts_end_where_the_answer_is_looked_for(prepared):
    tokenizer, text = prepared.tokenizer, ["The room was cold.", "Dull. " * 40]
    (template,) = tokenizer.encode([" It was"])
    tokens, at = cloze_rows(text, " It was", tokenizer, causal=True, mask_id=7, length=24)
    assert tokens[0, 0] == tokenizer.bos_id and tokens[0, at[0] + 1 - len(template) : at[0] + 1].tolist() == template
    assert tokenizer.decode(tokens[0, 1 : at[0] + 1].tolist()) == text[0] + " It was"
    assert at[1] == 23 and tokenizer.decode(tokens[1, -len(template) :].tolist()) == " It was"  # cut, the template whole
    tokens, at = cloze_rows(text, " It was", tokenizer, causal=False, mask_id=7, length=24)
    assert (tokens[np.arange(2), at] == 7).all() and tokenizer.decode([int(tokens[1, at[1] + 1])]) == "."
    with pytest.raises(UserError, match="raise length"):
        cloze_rows(text, " It was", tokenizer, causal=True, mask_id=7, length=len(template) + 1)
    with pytest.raises(UserError, match="different tokens"):
        word_ids([" same", " same"], tokenizer)


def test_the_two_forms_read_what_they_should_and_frozen_blocks_change_nothing():
    params = init_params(MODEL, 40, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 10), 1, 39)
    prompts = Prompts(tokens, jnp.array([5, 4, 7]))
    features = {form: jax.jit(Cloze(MODEL, form, (3, 4)).features) for form in (True, False)}
    for causal in (True, False):
        before = features[causal](params, prompts)
        padding = tokens.at[jnp.arange(3), prompts.at + 2].set(39)
        np.testing.assert_allclose(features[causal](params, prompts._replace(tokens=padding)), before, atol=1e-5)
        after = tokens.at[jnp.arange(3), prompts.at + 1].set(39)
        same = np.allclose(features[causal](params, prompts._replace(tokens=after)), before, atol=1e-4)
        assert same == causal  # a masked model reads the token after the answer, the other form none
        upper, read = read_lower(params, MODEL, prompts, 1, causal=causal)
        shape = ModelConfig(layers=1, width=16, heads=2)
        above = jax.jit(Cloze(shape, causal, (3, 4)).features)(upper, read)
        np.testing.assert_allclose(above, before, rtol=1e-4, atol=1e-5)
    # demonstrations stand before the text: as if their vectors were embeddings of tokens there
    shown = jax.random.randint(jax.random.key(2), (3, 4), 1, 39)
    vectors = params["embed"][shown].reshape(3, 2, 2, -1)
    whole = jnp.concatenate([tokens[:, :1], shown, tokens[:, 1:]], axis=1)
    expected = features[True](params, Prompts(whole, prompts.at + 4))
    np.testing.assert_allclose(features[True](params, prompts, vectors), expected, rtol=1e-4, atol=1e-5)


def test_an_example_left_out_teaches_nothing_and_is_found_by_none():
    """Another label for it changes no other answer; for one that is not left out it does."""
    settings = PromptSetConfig(epochs=2, batch_size=4, demonstrations=2, train_k=3, k=(3,), learning_rate=1e-2)
    cloze = Cloze(ModelConfig(layers=1, width=8, heads=1), True, (3, 4))
    params = init_params(cloze.model, 20, jax.random.key(0))
    draw = lambda seed, count: Prompts(np.random.default_rng(seed).integers(1, 19, (count, 6)), np.full(count, 4))  # noqa: E731
    labels = np.tile(np.arange(8) % 2, (4, 1)).astype(np.int32)
    labels[1, 5] = labels[3, 5] = 0
    few = jax.tree.map(lambda x: np.stack([x] * 4), draw(1, 8))
    shots = Shots(few, labels, np.zeros(4, np.int32), np.full(4, 0.5, np.float32), np.array([5, 5, -1, -1], np.int32))
    found = train_prompts(settings, cloze, params, tuple(params), shots, draw(2, 5), demonstrations=True, title="test")
    others = np.arange(8) != 5
    for name in ("test_logits", "similarity", "neighbours"):
        np.testing.assert_allclose(getattr(found, name)[0], getattr(found, name)[1], rtol=1e-5)
    np.testing.assert_allclose(found.train_probability[0, others], found.train_probability[1, others], rtol=1e-5)
    assert np.abs(found.test_logits[2] - found.test_logits[3]).max() > 1e-3
    assert not np.allclose(found.test_logits[0], found.test_logits[2], rtol=1e-4)
    assert np.isfinite(found.influence).all() and (found.influence[2:] >= -1e-6).all()


def test_decoding_reads_the_next_token_from_what_it_is_given():
    model = ModelConfig(layers=1, width=16, heads=2)
    params = init_params(model, 40, jax.random.key(0))
    tokens, valid = jax.random.randint(jax.random.key(1), (2, 6), 1, 39), jnp.ones((2, 6), bool)
    more = {"new_tokens": 5, "end_id": 0}
    plain = make_greedy_decoder(model, **more)(params, tokens, valid)
    read = lambda features, output, bias: features @ output + bias  # noqa: E731
    decoder = make_greedy_decoder(model, **more, read=read)
    np.testing.assert_array_equal(decoder(params, tokens, valid, jnp.zeros(40)), plain)
    np.testing.assert_array_equal(decoder(params, tokens, valid, 1e6 * jnp.eye(40)[7]), np.full((2, 5), 7))


def test_tokens_find_their_neighbours_in_other_documents(tiny, prepared):
    config = tiny("masking.policy=none")
    text, settings = Text(config, prepared, "train"), LookupTextConfig(k=3, temperature=2.0)
    few = 12
    text.rows = jax.tree.map(lambda x: x[:few], text.rows)
    text.targets, text.own = text.targets[:few], np.where(text.own[:few] < few * text.targets.shape[1], text.own[:few], -1)
    features = np.random.default_rng(0).normal(size=(*text.targets.shape, 4)).astype(np.float32)
    store = make_store(jnp.asarray(features), text)
    found = gold_probability(store, jnp.asarray(features), text, settings, 700, own=True)
    keys, labels, valid = (np.asarray(x) for x in store)
    per_row = text.targets.shape[1]
    for row, place in ((0, 3), (few - 1, 0), (5, 20)):
        own = text.own[row][text.own[row] >= 0]
        assert row * per_row + place in own
        distance = ((keys - features[row, place]) ** 2).sum(1)
        distance[~valid], distance[own] = np.inf, np.inf
        nearest = np.argsort(distance)[:3]
        weight = np.exp(-(distance[nearest] - distance[nearest].min()) / 2.0)
        gold = text.rows.tokens[row, place + 1]
        expected = weight[labels[nearest] == gold].sum() / weight.sum()
        np.testing.assert_allclose(found[row, place], expected, rtol=1e-3, atol=1e-6)
    free = gold_probability(store, jnp.asarray(features), text, settings, 700, own=False)
    assert (np.asarray(free) >= 1 / 3)[text.targets].all()  # each finds at least itself


def test_results_of_parts_become_tables_claims_and_a_page():
    seeds = lambda *values: {"mean": float(np.mean(values)), "mean_ci": [min(values), max(values)], "values": list(values)}  # noqa: E731
    settings = PromptSetConfig(k=(1, 4), shares=(0.0, 0.5), betas=(0.1, 1.0))
    arm = lambda accuracy, score: {  # noqa: E731
        "accuracy": seeds(accuracy, accuracy), "with_neighbours": seeds(accuracy, accuracy + 0.1),
        "neighbours_alone": seeds(0.5, 0.6), "wrong": [[True, False, False], [False, True, False]],
        "influence": [[3 * score, score, score], [score, 3 * score, score]], "probability": [[0.9] * 3] * 2,
        "sweep": {"1": [[seeds(0.5, 0.6), seeds(0.6, 0.7)] for _ in settings.k]},
    }  # fmt: skip
    names = ("prompt", "guided 0.1", "guided 1", "demonstrations", "retroprompt")
    found = {"parameters": 9, "trained": 5, "classes": 2, "test": 20, "zero_shot": 0.5, "seconds": 1.0,
             "arms": {name: arm(0.6, 0.5 if name == "retroprompt" else 1.0) for name in names},
             "left_out": {"prompt": [0.9, 0.1, 0.3], "retroprompt": [0.2, 0.1, 0.0]}}  # fmt: skip
    results = _results({"set": found}, {"set": settings})
    claims = {claim["id"]: claim for claim in results["claims"]}
    assert claims["set-memorization"]["measured"] == pytest.approx(0.5) and claims["set-memorization"]["holds"]
    assert claims["set-flipped"]["measured"] == pytest.approx(3)
    assert claims["set-accuracy"]["measured"] == pytest.approx(0.05)
    assert claims["set-fall"]["measured"] == pytest.approx(-1 / 3)
    leaks = lambda *pairs: {"perplexity": {"all": 3.0, "pii": 2.0, "other": 4.0}, "made_up": 1,  # noqa: E731
                            "leaks": {"heldout": [list(pair) for pair in pairs]}}  # fmt: skip
    one = lambda *weights: {  # noqa: E731
        "prompts": {"heldout": 20}, "entries": 100, "pii_entries": 10, "identities": 8, "weights": leaks(*weights),
        "store": leaks((0, 1), (3, 2), (5, 3)), "without_pii": leaks(), "seconds": 1.0,
    }  # fmt: skip
    plain = [(n, n % 4) for n in range(12)]
    more = text_results({"plain": one(*plain), "mixed": one((0, 1), (1, 1), (7, 2))}, LookupTextConfig())
    by = {claim["id"]: claim for claim in more["claims"]}
    assert by["text-mixed-weights"]["measured"] == 0.5 and by["text-store"]["measured"] == 0.75
    assert by["text-deleted"]["measured"] == 0 and by["text-mixed-weights"]["interval"][1] <= 1
    assert more["tables"][0]["rows"][0][1]["mean"] == 50.0
    whole = {"schema": 1, "command": "", "environment": {"device": "cpu", "python": "3", "jax": "0", "numpy": "0"},
             "study": {"name": "retroprompt", "parts": 1, "planned_parts": 2, "seeds": 2}}  # fmt: skip
    whole |= results | {key: [*results[key], *more[key]] for key in more}
    assert "set: 9 parameters, 5 trained" in render(whole)
    assert text_table(whole).row_count > 10 and claims_table(whole).row_count == len(whole["claims"])


@pytest.mark.parametrize(
    "change, message",
    [
        ("sets.a.shots=0", "are 1 or more"), ("sets.a.share=2", "lie in"), ("sets.a.at_k=99", "more than the 32 training"),
        ("sets.a.start=/nowhere", "set it to 0"), ("sets.a.texts=none", "choose one of reviews, jsonl"),
        ("text.arms.b.loss=mixed", "nothing can be masked"), ("text.arms.b.loss=x", "choose one of"),
        ("text.arms.b.vary={}", "the first one is the one to compare with"),
    ],
)  # fmt: skip
def test_bad_settings_end_before_anything_is_trained(change, message, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("study: {retroprompt: {sets: {a: {test: 10}}}}")
    code, _, err = rmft("study", "retroprompt", tmp_path / "study.yaml", f"out={tmp_path}/out",
                        f"study.retroprompt.{change}", capsys=capsys)  # fmt: skip
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_optional_set_is_left_out_where_its_files_are_missing(tmp_path, capsys):
    few = "{texts: jsonl, path: /nowhere.jsonl, optional: %s}"
    for optional, message in (("true", "without the set a"), ("false", "cannot be read")):
        (tmp_path / "study.yaml").write_text(f"study: {{retroprompt: {{sets: {{a: {few % optional}}}}}}}")
        code, _, err = rmft("study", "retroprompt", tmp_path / "study.yaml", f"out={tmp_path}/out", capsys=capsys)
        assert code == 2 and message in err and ("has neither sets nor" in err) == (optional == "true")


@pytest.mark.slow
def test_the_study_as_a_whole_goes_on_where_it_was(tmp_path):
    few = "length: 48, pretrain_texts: 64, pretrain_epochs: 1, epochs: 2, shots: 3, test: 20, at_k: 4, train_k: 4, k: [1, 4]"
    (tmp_path / "study.yaml").write_text(f"""
        out: {tmp_path}/out
        tokenizer: {{vocab_size: 400}}
        model: {{layers: 1, width: 16, heads: 2}}
        training: {{batch_size: 16, warmup_steps: 5, sequence_length: 64}}
        source: {{limit: 30, max_characters: 300}}
        audit: {{sets: [discoverable], prompts: 16, prompt_tokens: 32, new_tokens: 8}}
        study:
          seeds: 2
          retroprompt:
            sets: {{masked: {{causal: false, {few}, betas: [1.0], flipped: 0.34, left_out: 3, demonstrations: 2}}}}
            text: {{epochs: 1, k: 4, changes: {{masking: {{policy: none}}}}, arms: {{plain: {{}}, mixed: {{loss: mixed}}}}}}
        """)
    config = load_config(tmp_path / "study.yaml")
    results = run_study("retroprompt", config, command="test")
    assert {claim["id"] for claim in results["claims"]} >= {"masked-accuracy", "masked-left-out-prompt", "text-deleted"}
    begin = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    assert run_study("retroprompt", config, command="test") == results
    assert begin == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    found = results["findings"]["text"]["plain"]
    assert found["without_pii"]["perplexity"]["pii"] > found["store"]["perplexity"]["pii"]
