"""`rmft study retroprompt`: does looking examples up, in the place of learning them by heart, lower memorization?

Few-shot classification by prompts, with and without retrieval, is here; the language model is in `retroprompt_text`.
Source: Chen et al. 2022, arXiv 2205.14704.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from rmft_jax.config import Config, ModelConfig, TokenizerConfig, load_config, to_dict
from rmft_jax.data.labelled import LabelledTexts, cloze_rows, generate_unlabelled, load_labelled, word_ids
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.data.tokenizer import Tokenizer, load_tokenizer
from rmft_jax.errors import UserError
from rmft_jax.files import write_json
from rmft_jax.kernels import interpolate, knn_probabilities
from rmft_jax.models.cloze import Cloze, Prompts, read_lower
from rmft_jax.models.gpt import count_params, init_params
from rmft_jax.progress import say
from rmft_jax.studies.claims import claim
from rmft_jax.studies.parts import bootstrap, curve, frame, over_seeds, part, rank_correlation
from rmft_jax.studies.retroprompt_text import arm_configs, text_results, train_arm
from rmft_jax.study_config import PromptSetConfig
from rmft_jax.training.checkpoints import Checkpoints, abstract
from rmft_jax.training.prompts import Answers, Shots, pretrain, train_prompts

SOURCE = "arXiv 2205.14704"
EXPECTED = "expected at this scale"
PLAIN = "prompt"


class Start(NamedTuple):
    """What the members of a set start from. trained: keys of params that are trained. notes: of how it was made."""

    cloze: Cloze
    params: dict
    trained: tuple[str, ...]
    tokenizer: Tokenizer
    notes: dict


def run(config: Config, *, command: str = "rmft study retroprompt") -> dict:
    """Run every set of `config.study.retroprompt`, write `out`/results.json and return its content.

    The same call goes on where an earlier one was interrupted; results.json appears after the first part.
    Raises UserError, before anything is trained, when the settings break a rule or texts cannot be read.
    """
    sets, out = {name: one for name, one in config.study.retroprompt.sets.items() if _is_there(name, one)}, Path(config.out)
    arms = arm_configs(config)
    if not sets and not arms:
        raise UserError("study.retroprompt has neither sets nor text.arms: see configs/studies/retroprompt_cpu.yaml")
    for name, settings in sets.items():
        _check(name, settings, config)
    findings: dict = {}
    texts: dict = {}
    todo = [*sets, *arms]
    for number, name in enumerate(todo, 1):
        title = f"study retroprompt: part {number} of {len(todo)}, {name}"
        if number <= len(sets):
            chosen = sets[name]
            settings = dataclasses.asdict(chosen) | {"seeds": config.study.seeds, "seed": config.seed}
            settings.pop("optional")
            if not chosen.start:
                settings |= {key: to_dict(config)[key] for key in ("model", "training", "tokenizer")}
            make = lambda: _run_set(name, chosen, config)  # noqa: B023, E731
            findings[name] = part(out / "parts" / f"{name}.json", settings, make, title)
        else:
            text = config.study.retroprompt.text
            arm = text.arms[name]
            lookup = {"arms": {}, "loss": arm.loss, "epochs": arm.epochs or text.epochs}
            settings = to_dict(arms[name]) | {"lookup": dataclasses.asdict(text) | lookup}
            make = lambda: train_arm(config, name, arms[name])  # noqa: B023, E731
            texts[name] = part(out / "parts" / f"text-{name}.json", settings, make, title)
        results = frame("retroprompt", command, config.study.seeds, number, len(todo)) | _results(findings, sets)
        if texts:
            more = text_results(texts, config.study.retroprompt.text)
            results |= {key: [*results[key], *more[key]] for key in more}
            results["findings"] = findings | {"text": texts}
        write_json(out / "results.json", results)
    return results


def _is_there(name: str, settings: PromptSetConfig) -> bool:
    """Return whether a set can be run; of one that is optional, say which file it lacks."""
    missing = [path for path in (settings.start, settings.path) if path and not Path(path).exists()]
    if not settings.optional or not missing:
        return True
    say(f"study retroprompt: without the set {name}, as {missing[0]} is not there")
    return False


def _check(name: str, settings: PromptSetConfig, config: Config) -> None:
    where = f"study.retroprompt.sets.{name}"
    least = min(settings.shots, settings.test, settings.epochs, settings.batch_size, settings.train_k, settings.at_k)
    if min(least, settings.length, *settings.k) < 1 or not settings.k or settings.demonstrations < 0:
        raise UserError(f"{where}: shots, test, epochs, batch_size, length, train_k, at_k and k are 1 or more")
    if not all(0 <= share <= 1 for share in (*settings.shares, settings.share, settings.flipped)):
        raise UserError(f"{where}: share, shares and flipped lie in [0, 1]")
    if min(settings.temperature, settings.damping, settings.learning_rate) <= 0 or min(*settings.betas, settings.beta) < 0:
        raise UserError(f"{where}: temperature, damping and learning_rate are above 0, beta and betas 0 or more")
    if settings.start and settings.demonstrations:
        raise UserError(f"{where}.demonstrations is {settings.demonstrations}, but below the trained blocks of "
                        f"{settings.start} nothing is run again: set it to 0")  # fmt: skip
    if settings.start and not (Path(settings.start) / "config.yaml").is_file():
        raise UserError(f"{where}.start {settings.start} is not a folder that `rmft convert import` wrote: write it first")
    if not settings.start and config.model.positions == "learned" and settings.demonstrations:
        raise UserError(f"{where}.demonstrations have no place among learned positions: set model.positions=rotary")
    few = _texts(settings, config.seed)
    for key in ("k", "at_k", "train_k"):
        value = np.max(getattr(settings, key))
        if value > len(few.train):
            raise UserError(f"{where}.{key} is {value}, more than the {len(few.train)} training texts: lower it")


def _texts(settings: PromptSetConfig, seed: int) -> LabelledTexts:
    names = ("shots", "test", "path", "text_field", "label_field", "skip_field", "words")
    return load_labelled(settings.texts, seed=seed, **{name: getattr(settings, name) for name in names})


def _start(config: Config, settings: PromptSetConfig, words: tuple[str, ...]) -> Start:
    """Make the small model, or load the one that there is."""
    if not settings.start:
        texts = generate_unlabelled(settings.pretrain_texts, seed=config.seed)
        tokenizer = SentencePieceTokenizer.train(texts, TokenizerConfig(vocab_size=config.tokenizer.vocab_size))
        rows = [[tokenizer.bos_id, *ids, tokenizer.eos_id][: settings.length] for ids in tokenizer.encode(texts)]
        padded = np.stack([np.pad(row, (0, settings.length - len(row))) for row in rows]).astype(np.int32)
        vocab_size = tokenizer.vocab_size + (not settings.causal)  # the mask
        params, losses = pretrain(
            config, padded, np.array([len(row) for row in rows]), vocab_size, causal=settings.causal,
            epochs=settings.pretrain_epochs, title="pre-training on texts without labels",
        )  # fmt: skip
        cloze = Cloze(config.model, settings.causal, word_ids(words, tokenizer))
        return Start(cloze, params, tuple(params), tokenizer, {"pretrain_loss": losses})
    folder = Path(settings.start)
    model = load_config(folder / "config.yaml").model
    tokenizer = load_tokenizer(folder)
    checkpoints, step = Checkpoints.open(folder)
    shapes = jax.eval_shape(lambda: init_params(model, tokenizer.vocab_size, jax.random.key(0)))
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = checkpoints.restore_params(step, abstract(shapes, jax.tree.map(lambda _: host, shapes)))
    checkpoints.close()
    if not 1 <= settings.trained_blocks <= model.layers:
        raise UserError(f"trained_blocks is {settings.trained_blocks}: the model has {model.layers} blocks, take fewer")
    cloze = Cloze(model, settings.causal, word_ids(words, tokenizer))
    return Start(cloze, params, ("blocks", "final_norm"), tokenizer, {})


def _prompts(start: Start, settings: PromptSetConfig, texts: list[str]) -> tuple[dict, Prompts]:
    """Return the parameters above the blocks that stay as they are, and the prompts as these see them."""
    prompts = Prompts(*cloze_rows(
        texts, settings.template, start.tokenizer, causal=settings.causal, mask_id=len(start.params["embed"]) - 1,
        length=settings.length))  # fmt: skip
    if not settings.start:
        return start.params, prompts
    return read_lower(start.params, start.cloze.model, prompts, settings.trained_blocks, causal=settings.causal)


def _upper(model: ModelConfig, settings: PromptSetConfig) -> ModelConfig:
    return dataclasses.replace(model, layers=settings.trained_blocks) if settings.start else model


def arms_of(settings: PromptSetConfig) -> dict[str, tuple[bool, float]]:
    """Return whether each arm has demonstrations, and its beta; the last one is the whole method."""
    arms = {PLAIN: (False, 0.0)} | {f"guided {beta:g}": (False, beta) for beta in settings.betas}
    if settings.demonstrations:
        arms["demonstrations"] = (True, 0.0)
    return arms | {"retroprompt": (bool(settings.demonstrations), settings.beta)}


def _run_set(name: str, settings: PromptSetConfig, config: Config) -> dict:
    """Train all arms of a set under every seed; return what they get right and how much of it is memorized."""
    seeds = range(config.seed, config.seed + config.study.seeds)
    few = [_texts(settings, seed) for seed in seeds]
    start = _start(config, settings, few[0].words)
    params, test = _prompts(start, settings, few[0].test)
    cloze = dataclasses.replace(start.cloze, model=_upper(start.cloze.model, settings))
    shown = [_prompts(start, settings, one.train)[1] for one in few]
    wrong = np.stack([_flips(len(one.train), settings.flipped, seed) for one, seed in zip(few, seeds, strict=True)])
    labels = np.stack([one.train_labels for one in few])
    labels = np.where(wrong, (labels + 1) % len(few[0].words), labels).astype(np.int32)

    def shots(members: list[tuple[int, float, int]]) -> Shots:
        which, betas, out = (np.array(column) for column in zip(*members, strict=True))
        prompts = jax.tree.map(lambda *x: np.stack(x), *[jax.tree.map(np.asarray, shown[n]) for n in which])
        return Shots(prompts, labels[which], (which + config.seed).astype(np.int32), betas.astype(np.float32),
                     out.astype(np.int32))  # fmt: skip

    arms, found, left_out = arms_of(settings), {}, {}
    without = np.arange(min(settings.left_out, labels.shape[1]))
    for demonstrations in (False, True):
        chosen = {arm: beta for arm, (shows, beta) in arms.items() if shows == demonstrations}
        if not chosen:
            continue
        # every arm under each seed, then the two that are compared without one example of the first seed each
        members = [(arm, n, beta, -1) for arm, beta in chosen.items() for n in range(len(seeds))]
        members += [(arm, 0, chosen[arm], n) for arm in (PLAIN, "retroprompt") if arm in chosen for n in without]
        answers = train_prompts(
            settings, cloze, params, start.trained, shots([member[1:] for member in members]), test,
            demonstrations=demonstrations, title=f"{name}, {'with demonstrations' if demonstrations else 'prompts alone'}",
        )  # fmt: skip
        for arm in chosen:
            rows = [n for n, member in enumerate(members) if member[0] == arm and member[3] < 0]
            found[arm] = _of_arm(Answers(*(x[rows] for x in answers)), few[0].test_labels, wrong, settings)
            rows = [n for n, member in enumerate(members) if member[0] == arm and member[3] >= 0]
            if rows:
                before = np.array(found[arm]["probability"][0])[without]
                left_out[arm] = (before - answers.train_probability[rows, without]).round(5).tolist()
    zero = np.asarray(jax.jit(lambda p: cloze.logits(p, cloze.features(p, test)))(params)).argmax(-1)
    return {
        "parameters": count_params(start.params), "trained": count_params({key: params[key] for key in start.trained}),
        "classes": len(few[0].words), "test": len(few[0].test), "zero_shot": float((zero == few[0].test_labels).mean()),
        "arms": found, "left_out": left_out, **start.notes,
    }  # fmt: skip


def _flips(count: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 29]).permutation(count) < round(share * count)


def _of_arm(answers: Answers, labels: np.ndarray, wrong: np.ndarray, settings: PromptSetConfig) -> dict:
    """Return accuracy over k, lambda and seeds, and scores of each training example."""
    model = np.asarray(jax.nn.softmax(answers.test_logits))

    def accuracy(k, share, temperature=settings.temperature):
        near = answers.similarity[..., :k], answers.neighbours[..., :k]
        knn = knn_probabilities(*near, model.shape[-1], temperature=temperature)
        return over_seeds((np.asarray(interpolate(knn, model, share)).argmax(-1) == labels).mean(1))

    # the second temperature spreads the similarities of a prompt's neighbours over about one unit
    spread = float(np.maximum(answers.similarity.std(-1).mean(), 1e-3))
    sweep = {
        f"{temperature:.3g}": [[accuracy(k, share, temperature) for share in settings.shares] for k in settings.k]
        for temperature in (settings.temperature, spread)
    }
    return {
        "accuracy": accuracy(settings.at_k, 0.0), "with_neighbours": accuracy(settings.at_k, settings.share),
        "neighbours_alone": accuracy(settings.at_k, 1.0), "sweep": sweep, "wrong": wrong.tolist(),
        "influence": answers.influence.round(5).tolist(), "probability": answers.train_probability.round(5).tolist(),
    }  # fmt: skip


_COLUMNS = (
    ("accuracy", "test accuracy, weights alone"), ("with_neighbours", "with neighbours"),
    ("neighbours_alone", "neighbours alone"),
)  # fmt: skip


def _memorization(result: dict, pick: np.ndarray | None = None) -> dict:
    """Return the mean self-influence of the training examples under each seed. pick: bool [seeds, N], which of them."""
    scores = np.array(result["influence"])
    pick = np.ones(scores.shape, bool) if pick is None else pick
    return over_seeds([row[some].mean() for row, some in zip(scores, pick, strict=True)])


def _results(findings: dict, sets: dict) -> dict:
    claims, tables, charts = [], [], []
    for name, found in findings.items():
        rows = [[arm, *(result[key] for key, _ in _COLUMNS), _memorization(result)] for arm, result in found["arms"].items()]
        tables.append({
            "key": name, "title": f"{name}: {found['parameters']:,} parameters, {found['trained']:,} trained",
            "columns": [title for _, title in _COLUMNS] + ["memorization (mean self-influence)"], "rows": rows,
            "note": f"{sets[name].shots} examples of each of {found['classes']} labels, {found['test']:,} test texts. "
                    f"Without training accuracy is {found['zero_shot']:.3f}. Mean over seeds and their range.",
        })  # fmt: skip
        charts += _charts(name, found, sets[name])
        claims += _claims(name, found, sets[name])
    return {"tables": tables, "charts": charts, "findings": findings, "claims": claims}


def _charts(name: str, found: dict, settings: PromptSetConfig) -> list[dict]:
    out = []
    for arm in (PLAIN, "retroprompt"):
        for temperature, rows in found["arms"][arm]["sweep"].items():
            lines = {f"k = {k}": curve(settings.shares, np.array([figure["values"] for figure in row]).T)
                     for k, row in zip(settings.k, rows, strict=True)}  # fmt: skip
            out.append({"key": f"{name}-{arm}-lambda-{temperature}", "heading": f"{name}, {arm}: share of the neighbours",
                        "note": f"test accuracy; temperature {temperature}", "x_label": "lambda", "log_x": False,
                        "lines": lines})  # fmt: skip
    guided = [found["arms"][f"guided {beta:g}"] for beta in settings.betas]
    if len(guided) > 1:
        values = np.array([result["accuracy"]["values"] for result in guided]).T
        scores = np.array([_memorization(result)["values"] for result in guided]).T
        for key, heading, figures in (("accuracy", "test accuracy", values), ("memorization", "self-influence", scores)):
            out.append({"key": f"{name}-beta-{key}", "heading": f"{name}: {heading} against beta",
                        "note": "weights alone, without demonstrations", "x_label": "beta", "log_x": True,
                        "lines": {"guided": curve(settings.betas, figures)}})  # fmt: skip
    return out


def _claims(name: str, found: dict, settings: PromptSetConfig) -> list[dict]:
    """Return what the paper claims, and how good the scores are: means, with bootstrap intervals over seeds or examples."""
    plain, whole, out = found["arms"][PLAIN], found["arms"]["retroprompt"], []

    def mean_claim(id, source, statement, expected, values, **bound):
        values = np.array(values, float)
        out.append(claim(f"{name}-{id}", source, f"{name}: {statement}", expected,
                         *bootstrap(lambda pick: values[pick].mean(), len(values)), **bound))  # fmt: skip

    gap = lambda a, b: np.array(a["values"]) - np.array(b["values"])  # noqa: E731
    mean_claim("accuracy", SOURCE, "accuracy of retroprompt less that of the plain prompt", 0,
               gap(whole["with_neighbours"], plain["accuracy"]), at_least=0)  # fmt: skip
    mean_claim("interpolation", SOURCE, "what neighbours add to the accuracy of the plain prompt", 0,
               gap(plain["with_neighbours"], plain["accuracy"]), at_least=0)  # fmt: skip
    ratio = np.array(_memorization(whole)["values"]) / np.array(_memorization(plain)["values"])
    mean_claim("memorization", SOURCE, "mean self-influence under retroprompt over that under the plain prompt", 1, ratio,
               at_most=1)  # fmt: skip
    wrong = np.array(plain["wrong"])
    if wrong.any(1).all() and not wrong.all(1).any():
        ratio = np.array(_memorization(plain, wrong)["values"]) / np.array(_memorization(plain, ~wrong)["values"])
        mean_claim("flipped", EXPECTED, "self-influence of wrong labels over that of right ones", 2, ratio, at_least=2)
    if len(found["left_out"]) > 1:
        fell = np.array(found["left_out"]["retroprompt"]) - np.array(found["left_out"][PLAIN])
        mean_claim("fall", SOURCE, "fall of P(label) without the example, under retroprompt less under the plain prompt", 0,
                   fell, at_most=0)  # fmt: skip
    for arm, falls in found["left_out"].items():
        falls, scores = np.array(falls), np.array(found["arms"][arm]["influence"][0])[: len(falls)]
        measured = bootstrap(lambda pick, f=falls, s=scores: rank_correlation(f[pick], s[pick]), len(falls))
        statement = f"{name}: rank correlation of self-influence and training without the example, {arm}"
        out.append(claim(f"{name}-left-out-{arm}", EXPECTED, statement, 0.5, *measured, at_least=0.5))
    return out
