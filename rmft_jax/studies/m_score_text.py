"""The memorization score of documents and of personal data: GPTs trained on folds of a corpus, with and without a defence.

Source of the score: van den Burg & Williams 2021, arXiv 2106.03216, section 3; log p(x) of text is exact. Here the unit that
is held out is a document with all its copies.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import Config, with_changes
from rmft_jax.data.blocks import Blocks, Corpus, all_rows
from rmft_jax.data.prepare import Prepared, load_prepared, prepare
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.errors import UserError
from rmft_jax.kernels import TEXT, TaggedBatch, m_score, min_k_score
from rmft_jax.progress import track
from rmft_jax.studies.claims import claim
from rmft_jax.studies.parts import bootstrap, check_epochs, rank_correlation, size_interval
from rmft_jax.study_config import StudyConfig
from rmft_jax.training.folds import fold_rows
from rmft_jax.training.members import epoch_orders
from rmft_jax.training.side_by_side import SideBySide
from rmft_jax.training.step import masked_rows, model_of, score_masked, score_unmasked
from rmft_jax.training.tracker import TrackerShape

EXPECTED = "expected at this scale"
ATTACKS = {
    "loss": "the loss attack",
    "min_k": "the min-k% attack",
    "hits": "the share of PII tokens that greedy decoding gets right",
}


class Scores(NamedTuple):
    """What R runs make of the next tokens of N rows. log_probs: float32 [R, N, W-1]; hits: bool [R, N, W-1], whether the
    token is the likeliest one; parts: bool [2, N, W-1], tokens outside PII, and within.

    among: float32 [R, N], the sum of log p over the tokens outside PII where rows are masked as each run's next epoch would
    show them; among_tokens: int32 [R, N], how many they are: surrogates can push some out of a row.
    """

    log_probs: np.ndarray
    hits: np.ndarray
    parts: np.ndarray
    among: np.ndarray
    among_tokens: np.ndarray


class Documents(NamedTuple):
    """The corpus as rows of which none spans two documents.

    rows: numpy [N, W]; document: int [N], which document each is of, from 0; group: int [documents], equal for copies of one
    text; repetitions: int [documents], of those that hold a canary, else 0.
    """

    rows: TaggedBatch
    document: np.ndarray
    group: np.ndarray
    repetitions: np.ndarray


def arm_configs(config: Config) -> dict[str, Config]:
    """Return the config of each arm, checked. Raises UserError naming the setting."""
    text, where = config.study.m_score.text, "study.m_score.text"
    base = dataclasses.replace(config, study=StudyConfig())
    arms = {name: with_changes(base, changes, f"{where}.arms.{name}") for name, changes in text.arms.items()}
    if arms and (method := next(iter(arms.values())).method) != "none":
        raise UserError(f"{where}.arms: the first one is {method}, it must be the one without a defence")
    if any(arm.lora.rank for arm in arms.values()):
        raise UserError(f"{where} trains whole models: set lora.rank=0")
    if arms and (text.folds < 2 or text.repetitions < 1):
        raise UserError(f"{where}: folds are 2 or more, repetitions 1 or more")
    if arms:
        check_epochs(text.score_at, where)
    return arms


def train_arm(config: Config, arm: Config, title: str) -> dict:
    """Train the runs of one arm; return what `text_results` needs of each point in time, plain lists."""
    text = config.study.m_score.text
    arm = dataclasses.replace(arm, data=str(Path(config.out) / "data"))
    prepare(arm)
    prepared = load_prepared(arm)
    documents = read_documents(arm, prepared)
    groups = int(documents.group.max()) + 1
    if groups < text.folds:
        raise UserError(f"{title}: {groups} different documents for {text.folds} folds: raise source.limit")
    _, of_groups = fold_rows(groups, text.folds, text.repetitions, config.seed)
    left_over = np.ones((len(of_groups), groups - of_groups.shape[1]), bool)  # trained on by all, scored by none
    trained = np.concatenate([of_groups, left_over], axis=1)[:, documents.group]
    scores = _train(arm, prepared, documents, trained, text.score_at, config.seed, title)
    return {"scores": [{"epoch": epoch} | _record(documents, trained, found) for epoch, found in scores.items()]}


def read_documents(config: Config, prepared: Prepared) -> Documents:
    """Cut the training documents into rows of their own."""
    corpus = Corpus(read_corpus(prepared.directory, "train"), scope=config.masking.scope)
    blocks = Blocks(corpus, stride=config.training.sequence_length - config.masking.margin, apart=True)
    numbers, begin = np.unique(corpus.document, return_index=True)
    texts = [tokens.tobytes() for tokens in np.split(corpus.tokens, begin[1:])]
    known: dict[bytes, int] = {}
    group = np.array([known.setdefault(text, len(known)) for text in texts])
    of_row = np.array([np.searchsorted(numbers, blocks.documents(n)[0]) for n in range(len(blocks))])
    is_canary = np.isin(corpus.span["identity"][corpus.token_span], prepared.canary_identities) & (corpus.token_span > 0)
    holds = np.isin(numbers, corpus.document[is_canary])
    repetitions = np.where(holds, np.bincount(group)[group], 0)
    return Documents(all_rows(blocks), of_row, group, repetitions)


def _train(
    config: Config, prepared: Prepared, documents: Documents, trained: np.ndarray, score_at: tuple, seed: int, title: str
) -> dict[int, Scores]:
    """Train a model on the documents of each row of `trained` [R, documents]; return the Scores at each of `score_at`."""
    size, runs, epochs = config.training.batch_size, len(trained), score_at[-1]
    mine = [np.flatnonzero(row[documents.document]) for row in trained]
    fewest = min(map(len, mine))
    if fewest < size:
        raise UserError(f"{title}: {fewest} rows do not fill training.batch_size {size}: lower it, or raise source.limit")
    seeds = np.arange(seed, seed + runs, dtype=np.int32)
    shape = TrackerShape(2, 3, config.training.sequence_length, 0)
    config = dataclasses.replace(config, tracker=dataclasses.replace(config.tracker, enabled=False))
    group = SideBySide(config, prepared, documents.rows, seeds, {}, shape, steps=epochs * (fewest // size))
    rows = jax.tree.map(jnp.asarray, documents.rows)

    @jax.jit
    @jax.vmap
    def score(state, seed):
        params, following = model_of(state), rows._replace(epoch=jnp.full_like(rows.epoch, epochs))
        masked = masked_rows(state["step"], following, prepared.bank, config=config, seed=seed)

        def of_row(both):
            row, shown = jax.tree.map(lambda x: x[None], both)
            (scores, targets), (around, text) = score_unmasked(params, row, config), score_masked(params, shown, config)
            text &= shown.origin[:, 1:] == TEXT
            return -scores.nll[0], scores.hit[0], targets[0], -jnp.sum(around.nll * text), jnp.sum(text)

        return jax.lax.map(of_row, (rows, masked), batch_size=size)

    is_pii, found = documents.rows.component[:, 1:] > 0, {}
    for epoch in track(range(epochs), title, epochs):
        # Folds differ in their number of rows: of the longer ones a few, others each time, are left out.
        shown = [np.random.default_rng([seed, run, epoch]).permutation(rows)[:fewest] for run, rows in enumerate(mine)]
        order = epoch_orders(np.stack(shown), epoch, seeds, size)
        group.round(order, np.full_like(order, epoch))
        if epoch + 1 in score_at:
            log_probs, hits, targets, among, tokens = map(np.asarray, score(group.state, seeds))
            parts = np.stack([targets[0] & ~is_pii, targets[0] & is_pii])
            found[epoch + 1] = Scores(log_probs, hits & targets, parts, among, tokens)
    return found


def _record(documents: Documents, trained: np.ndarray, found: Scores) -> dict:
    """Return M of each document, of its text outside PII and of its PII, and what attacks say of it; M of each PII value.

    among: M of the text outside PII where the PII is masked as in training.
    held_out: mean log p a token of the documents under the runs that did not train on them.
    """
    log_probs, hits, parts = found.log_probs, found.hits, found.parts
    scored = ~trained.all(0)
    count = len(documents.group)

    def per_document(values):  # [..., N] -> [..., documents]
        out = np.zeros((*values.shape[:-1], count))
        np.add.at(np.moveaxis(out, -1, 0), documents.document, np.moveaxis(values, -1, 0))
        return out

    def score(sums, of=trained):  # M [points] of log p [R, points]
        return np.asarray(m_score(jnp.asarray(sums, jnp.float32), of), float)

    def gap(sums):  # the mean over runs in the place of log mean exp
        weight = trained / np.maximum(trained.sum(0), 1), ~trained / np.maximum((~trained).sum(0), 1)
        return (sums * weight[0]).sum(0) - (sums * weight[1]).sum(0)

    sums = [per_document(np.where(part, log_probs, 0).sum(-1)) for part in parts]
    tokens = per_document(parts.sum(-1))
    values = {"m": score(sums[0] + sums[1])}
    among = per_document(found.among) * tokens[0] / np.maximum(per_document(found.among_tokens), 1)
    for name, of_part in zip(("text", "pii", "among"), (*sums, among), strict=True):
        values |= {f"m_{name}": score(of_part), f"gap_{name}": gap(of_part)}
    every = parts.any(0)
    flat = jnp.where(every, log_probs, 0)
    lowest = per_document(np.asarray(jax.vmap(lambda lp: min_k_score(lp, every, 0.2))(flat)) * every.sum(-1))
    member = trained / trained.sum(0)
    attacks = {
        "loss": ((sums[0] + sums[1]) * member).sum(0) / np.maximum(tokens.sum(0), 1),
        "min_k": (lowest * member).sum(0) / np.maximum(tokens.sum(0), 1),
        "hits": (per_document((hits & parts[1]).sum(-1)) * member).sum(0) / np.maximum(tokens[1], 1),
    }
    keep = lambda x: np.round(np.asarray(x, float)[scored], 4).tolist()  # noqa: E731
    out = {name: keep(value) for name, value in (values | attacks).items()}
    out |= {"tokens_text": keep(tokens[0]), "tokens_pii": keep(tokens[1]), "repetitions": keep(documents.repetitions)}
    held_out = float(((sums[0] + sums[1]) * ~trained).sum() / (tokens.sum(0) * ~trained).sum())
    return out | {
        "group": keep(documents.group), "held_out": held_out, "identities": _identities(documents, trained, log_probs, parts)
    }  # fmt: skip


def _identities(documents: Documents, trained: np.ndarray, log_probs: np.ndarray, parts: np.ndarray) -> list[dict]:
    """Return of each PII value its number, occurrences, documents, and M, the mean over its documents.

    M of a value in a document: U - V of the log probability of its tokens there, by whether the run trained on that
    document. A run that did not may have met the value elsewhere: M is what the document adds.
    """
    rows = documents.rows
    span = np.take_along_axis(rows.component_span, rows.component, axis=1)
    identity = np.where(rows.component > 0, np.take_along_axis(rows.span_identity, span, axis=1), -1)[:, 1:]
    at = np.argwhere(parts[1] & (identity >= 0))
    keys = np.stack([identity[tuple(at.T)], documents.document[at[:, 0]]])
    pairs, place = np.unique(keys, axis=1, return_inverse=True)
    sums = np.zeros((len(log_probs), pairs.shape[1]))
    for run, values in enumerate(log_probs):
        np.add.at(sums[run], place.reshape(-1), values[tuple(at.T)])
    of_pair = trained[:, pairs[1]]
    usable = ~of_pair.all(0)
    m = np.asarray(m_score(jnp.asarray(sums[:, usable], jnp.float32), of_pair[:, usable]), float)
    found: dict[int, list[float]] = {}
    for number, value in zip(pairs[0][usable], m, strict=True):
        found.setdefault(int(number), []).append(float(value))
    return [{"identity": n, "documents": len(v), "m": round(float(np.mean(v)), 4)} for n, v in sorted(found.items())]


def text_results(arms: dict[str, dict]) -> dict:
    """Return table, charts and claims of the arms that are done, the first being the one without a defence.

    Claims are made of the point in time at which the runs without a defence know held-out documents best: later ones learn
    by heart what they could have understood, earlier ones have not learned yet.
    """
    plain = next(iter(arms.values()))["scores"]
    best = max(range(len(plain)), key=lambda n: plain[n]["held_out"])
    table = {
        "key": "text", "title": "text: memorization score by document folds",
        "columns": ["M of PII, nats a token", "M of other text", "M of other text, PII masked as in training",
                    "mean difference, PII", "mean difference, other text", "log p held out, nats a token"],
        "rows": [[f"{name}, epoch {found['epoch']}", *_summary(found), {"mean": found["held_out"], "mean_ci": None}]
                 for name, arm in arms.items() for found in arm["scores"]],
        "note": f"{len(plain[0]['m']):,} documents; sums over documents by number of tokens, intervals by bootstrap over "
                "documents. The mean difference is that of log p between runs with and without the document. Claims are of "
                f"epoch {plain[best]['epoch']}, where plain runs know held-out documents best.",
    }  # fmt: skip
    at_best = {name: arm["scores"][best] for name, arm in arms.items()}
    lines = {name: _canary_line(found) for name, found in at_best.items() if _canaries(found)}
    charts = [] if not lines else [{
        "key": "canaries", "heading": "M of canaries", "note": f"nats, of the address, epoch {plain[best]['epoch']}",
        "x_label": "repetitions", "log_x": True, "lines": lines,
    }]  # fmt: skip
    claims = _canary_claims(plain[best])
    for name, found in list(at_best.items())[1:]:
        claims += _defence_claims(name, found, plain[best])
    return {"tables": [table], "charts": charts, "claims": claims + _attack_claims(plain[best])}


def _canary_claims(plain: dict) -> list[dict]:
    canaries = np.array(_canaries(plain))
    if not len(canaries):
        return []
    found = bootstrap(lambda pick: rank_correlation(*canaries[pick].T), len(canaries))
    statement = "text: rank correlation of a canary's M and its repetitions"
    return [claim("text-canaries", EXPECTED, statement, 0, *found, at_least=0)]


def _defence_claims(name: str, found: dict, plain: dict) -> list[dict]:
    """Return how M changes under a defence, in nats a token for PII, as a share for other text."""
    pii = lambda pick: _per_token(found, "pii", pick) - _per_token(plain, "pii", pick)  # noqa: E731
    count = len(plain["m"])

    def other(part: str):  # as it stands, or among PII masked as in training
        change = lambda pick: _per_token(found, part, pick) / _per_token(plain, "text", pick) - 1  # noqa: E731
        return size_interval(*bootstrap(change, count))

    return [
        claim(f"text-{name}-pii", EXPECTED, f"text: {name} changes M of PII by (nats a token)", 0, *bootstrap(pii, count),
              at_most=0),
        claim(f"text-{name}-text", EXPECTED, f"text: {name} changes M of other text by a share of at most", 0.1,
              *other("text"), at_most=0.1),
        claim(f"text-{name}-among", EXPECTED,
              f"text: {name} changes M of other text, with PII masked as in training, by a share of at most", 0.1,
              *other("among"), at_most=0.1),
    ]  # fmt: skip


def _attack_claims(plain: dict) -> list[dict]:
    """Return how attacks on documents that were trained on rank them, against M a token: of PII for `hits`, else of all."""
    out = []
    for attack, words in ATTACKS.items():
        parts = ("pii",) if attack == "hits" else ("pii", "text")
        length = sum(np.array(plain[f"tokens_{part}"]) for part in parts)
        usable = length > 0
        m = (np.array(plain["m_pii" if attack == "hits" else "m"]) / np.maximum(length, 1))[usable]
        score = np.array(plain[attack])[usable]
        found = bootstrap(lambda pick, m=m, score=score: rank_correlation(m[pick], score[pick]), len(m))
        out.append(claim(f"text-attack-{attack}", EXPECTED, f"text: rank correlation of M a token and {words}", 0, *found,
                         at_least=0))  # fmt: skip
    return out


def _canary_line(found: dict) -> dict:
    """Return the mean M of the canaries' addresses over repetitions, with bootstrap intervals over canaries."""
    canaries = _canaries(found)
    x = sorted({times for times, _ in canaries})
    groups = [np.array([m for times, m in canaries if times == one]) for one in x]
    means = [bootstrap(lambda pick, g=g: g[pick].mean(), len(g)) for g in groups]
    return {
        "x": [float(one) for one in x], "mean": [value for value, _ in means],
        "low": [ends[0] for _, ends in means], "high": [ends[1] for _, ends in means],
    }  # fmt: skip


def _canaries(found: dict) -> list[tuple[float, float]]:
    """Return repetitions and M of the address of each canary, one for all its copies."""
    columns = (found["group"], found["repetitions"], found["m_pii"])
    return list({group: (times, m) for group, times, m in zip(*columns, strict=True) if times}.values())


def _per_token(found: dict, part: str, pick: np.ndarray, value: str = "m") -> float:
    tokens = found["tokens_pii" if part == "pii" else "tokens_text"]
    return float(np.array(found[f"{value}_{part}"])[pick].sum() / np.array(tokens)[pick].sum())


def _summary(found: dict) -> list[dict]:
    out = []
    for value, part in (("m", "pii"), ("m", "text"), ("m", "among"), ("gap", "pii"), ("gap", "text")):
        of = lambda pick, value=value, part=part: _per_token(found, part, pick, value)  # noqa: E731
        out.append(dict(zip(("mean", "mean_ci"), bootstrap(of, len(found["m"])), strict=True)))
    return out
