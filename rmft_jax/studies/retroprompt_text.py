"""Does moving knowledge into a datastore that can be deleted lower what can be extracted from the weights?

Language models of one text, trained in several ways beside a datastore of it, are attacked with the weights alone, with the
store, and with a store whose entries of personal data were deleted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rmft_jax.config import Config, with_changes
from rmft_jax.data.prepare import Prepared, load_prepared, prepare
from rmft_jax.devices import everywhere
from rmft_jax.errors import UserError
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.kernels import Datastore, delete, interpolate, knn_probabilities, retrieve, token_nll
from rmft_jax.memorization.extraction import generate, identify, leaked_values
from rmft_jax.memorization.prompts import build_prompts
from rmft_jax.memorization.rates import bootstrap_counts, clopper_pearson, percentile_interval, resample
from rmft_jax.models.gpt import output_matrix
from rmft_jax.studies.claims import claim
from rmft_jax.study_config import LookupTextConfig, StudyConfig
from rmft_jax.training.lookup import Text, features_of, gold_probability, make_store, train_beside_store

QUESTION = "asked here"
STORES = {"weights": "weights alone", "store": "with the store", "without_pii": "with the store, its PII deleted"}
_LOSSES = ("plain", "guided", "mixed")


def arm_configs(config: Config) -> dict[str, Config]:
    """Return the config of each arm, checked. Raises UserError naming the setting."""
    text, where = config.study.retroprompt.text, "study.retroprompt.text"
    base = dataclasses.replace(config, study=StudyConfig())
    base = with_changes(base, text.changes, f"{where}.changes")
    arms = {name: with_changes(base, arm.vary, f"{where}.arms.{name}.vary") for name, arm in text.arms.items()}
    for name, arm in text.arms.items():
        if arm.loss not in _LOSSES:
            raise UserError(f"{where}.arms.{name}.loss is {arm.loss!r}: choose one of {', '.join(_LOSSES)}")
        if arm.loss != "plain" and arms[name].method != "none":
            raise UserError(f"{where}.arms.{name}: its loss looks at true text, so nothing can be masked: set loss=plain")
    if any(arm.epochs < 0 for arm in text.arms.values()):
        raise UserError(f"{where}.arms: epochs are 0 or more")
    if arms and (next(iter(text.arms.values())).loss != "plain" or next(iter(arms.values())).method != "none"):
        raise UserError(f"{where}.arms: the first one is the one to compare with, without defence and loss=plain")
    if min(text.epochs, text.refresh, text.k) < 1 or not 0 < text.share < 1 or text.temperature <= 0 or text.beta < 0:
        raise UserError(f"{where}: epochs, refresh, k are 1 or more, share in (0, 1), temperature above 0, beta not below")
    return arms


def train_arm(config: Config, name: str, arm: Config) -> dict:
    """Train one arm; return perplexities and leaks under each of STORES, plain lists."""
    settings = config.study.retroprompt.text
    arm = dataclasses.replace(arm, data=str(Path(config.out) / "data"))
    prepare(arm)
    prepared = load_prepared(arm)
    train, heldout = Text(arm, prepared, "train"), Text(arm, prepared, "heldout")
    if settings.k > len(train.rows.tokens):
        raise UserError(f"study.retroprompt.text.k is {settings.k}: the text has fewer rows, lower it")
    chosen = settings.arms[name]
    epochs = chosen.epochs or settings.epochs
    params = train_beside_store(arm, prepared, train, settings, chosen.loss, epochs, title=f"text {name}")
    params = jax.device_put(params, everywhere())
    store = jax.jit(lambda p: make_store(features_of(p, arm, train.rows), train))(params)
    store = jax.device_put(store, everywhere())
    stores = {"weights": None, "store": store, "without_pii": delete(store, jnp.asarray(train.is_pii.reshape(-1)))}
    prompts = build_prompts(arm, prepared)
    out = {
        "prompts": {which: len(rows.tokens) for which, rows in prompts.items()}, "entries": int(store.valid.sum()),
        "pii_entries": int(train.is_pii.sum()), "identities": int((~prepared.is_canary).sum()),
    }  # fmt: skip
    for key, held in stores.items():
        out[key] = {"perplexity": perplexities(params, arm, prepared, heldout, held, settings)}
        out[key] |= _leaks(params, arm, prepared, prompts, held, settings)
    return out


def perplexities(
    params: dict, config: Config, prepared: Prepared, text: Text, store: Datastore | None, settings: LookupTextConfig
) -> dict[str, float]:
    """Return the perplexity of all next tokens, of those within PII and of the others."""

    @jax.jit
    def score(params, store):
        features = features_of(params, config, text.rows)
        gold = jnp.asarray(text.rows.tokens[:, 1:])
        nll = jax.lax.map(lambda row: token_nll(row[0] @ output_matrix(params), row[1]), (features, gold))
        if store is None:
            return nll
        knn = gold_probability(store, features, text, settings, prepared.tokenizer.vocab_size, own=False)
        return -jnp.log(interpolate(knn, jnp.exp(-nll), settings.share))

    nll = np.asarray(score(params, store), float)
    parts = {"all": text.targets, "pii": text.is_pii, "other": text.targets & ~text.is_pii}
    return {name: float(np.exp(nll[part].mean())) for name, part in parts.items() if part.any()}


def _leaks(params, config: Config, prepared: Prepared, prompts: dict, store: Datastore | None, settings) -> dict:
    """Return which true values each prompt of each set brings out, as numbers, and how many others."""
    vocab_size = prepared.tokenizer.vocab_size

    def read(features, output, store):
        found = retrieve(store, features, settings.k, metric="sqeuclidean")
        knn = knn_probabilities(found.similarity, found.labels, vocab_size, temperature=settings.temperature)
        return interpolate(knn, jax.nn.softmax(features @ output), settings.share)

    decoder = make_greedy_decoder(config.model, new_tokens=config.audit.new_tokens, end_id=prepared.tokenizer.eos_id,
                                  read=read if store is not None else None)  # fmt: skip
    write = decoder if store is None else lambda params, *rows: decoder(params, *rows, store)
    known = {digest: n for n, digest in enumerate(prepared.identity_hashes) if not prepared.is_canary[n]}
    out = {"leaks": {}, "made_up": 0}
    for name, rows in prompts.items():
        generated = generate(write, params, rows, config.audit.batch_size)
        values = leaked_values(rows, generated, config, prepared.tokenizer)
        records = identify(values, prepared.identity_key, known, set(), False)
        out["leaks"][name] = [[r["prompt"], r["identity"]] for r in records if r["identity"] is not None]
        out["made_up"] += sum(r["identity"] is None for r in records)
    return out


def _hits(found: dict, store: str, values: int) -> tuple[np.ndarray, list[int]]:
    """Return which prompt brings out which value, bool [prompts, values], set after set, and the sizes of the sets."""
    sizes, begin = list(found["prompts"].values()), 0
    hits = np.zeros((sum(sizes), values), bool)
    for name, size in found["prompts"].items():
        for prompt, value in found[store]["leaks"][name]:
            hits[begin + prompt, value] = True
        begin += size
    return hits, sizes


def _ratio(found: dict, store: str, plain: dict) -> tuple[float | None, list | None]:
    """Return true values leaked over those of the plain weights, and its paired bootstrap interval over prompts."""
    values = found["identities"]
    (ours, sizes), (theirs, _) = _hits(found, store, values), _hits(plain, "weights", values)
    if not theirs.any():
        return None, None
    members = resample(sizes, 1000, 0) > 0
    below = bootstrap_counts(members, theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.where(below > 0, bootstrap_counts(members, ours) / below, np.nan)
    return float(ours.any(0).sum() / theirs.any(0).sum()), percentile_interval(drawn, 0.95)


def _ter(found: dict, store: str) -> dict:
    leaked, known = int(_hits(found, store, found["identities"])[0].any(0).sum()), found["identities"]
    return {"mean": 100 * leaked / known, "mean_ci": [100 * end for end in clopper_pearson(leaked, known)]}


def text_results(arms: dict[str, dict], settings: LookupTextConfig) -> dict:
    """Return table and claims of the arms that are done, the first one being the one to compare with."""
    plain, rows, claims = next(iter(arms.values())), [], []
    for name, found in arms.items():
        for store, words in STORES.items():
            figures = [{"mean": found[store]["perplexity"].get(part), "mean_ci": None} for part in ("all", "pii", "other")]
            rows.append([f"{name}, {words}", _ter(found, store), *figures])
        if found is not plain:
            claims.append(_claim(f"{name}-weights", f"addresses extracted from the weights trained {name}, over those from "
                                 f"weights trained plainly", _ratio(found, "weights", plain)))  # fmt: skip
    claims.append(_claim("store", "addresses extracted from plain weights with the store, over those from the weights alone",
                         _ratio(plain, "store", plain)))  # fmt: skip
    claims.append(_claim("deleted", "the same with the PII of the store deleted", _ratio(plain, "without_pii", plain)))
    table = {
        "key": "text", "title": "text: what the weights give away, and what the store", "rows": rows,
        "columns": ["TER, %", "perplexity", "perplexity, PII", "perplexity, other"],
        "note": f"{plain['identities']:,} addresses, {sum(plain['prompts'].values()):,} prompts; a store of "
                f"{plain['entries']:,} tokens, {plain['pii_entries']:,} of them PII; lambda {settings.share:g}. One seed; "
                f"intervals by Clopper-Pearson.",
    }  # fmt: skip
    return {"tables": [table], "claims": claims}


def _claim(id: str, statement: str, measured: tuple) -> dict:
    return claim(f"text-{id}", QUESTION, f"text: {statement}", 1, *measured, at_most=1)
