"""`rmft audit`: attack each checkpoint of a run and say which training addresses come out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.prepare import Prepared, load_prepared
from rmft_jax.data.tokenizer import Tokenizer, tokenizer_path
from rmft_jax.devices import everywhere, rows_for, spread_rows
from rmft_jax.errors import UserError
from rmft_jax.files import read_json, write_json
from rmft_jax.generation.greedy import make_greedy_decoder
from rmft_jax.memorization.metrics import Subject, measure
from rmft_jax.memorization.prompts import Prompts, build_prompts
from rmft_jax.memorization.rates import (
    document_perplexities,
    extraction_rates,
    mdp_interval,
    mean_delta_perplexity,
    percentile_interval,
    resample,
)
from rmft_jax.memorization.samples import Samples
from rmft_jax.memorization.scoring import Model
from rmft_jax.models.gpt import init_params
from rmft_jax.pii.detector import Detector, detector
from rmft_jax.pii.values import keyed_hash
from rmft_jax.progress import say, track
from rmft_jax.training.checkpoints import Checkpoints, abstract
from rmft_jax.training.setup import load_run_config
from rmft_jax.training.step import DTYPES

SCHEMA = 1


def audit(runs: list[Path], overrides: list[str] | None = None, *, reveal: bool = False) -> list[dict]:
    """Audit runs and write RUN/audit.json for each; return what was written.

    overrides: `audit.*` settings in place of those the runs were trained with. reveal: write the addresses themselves,
    not only their keyed hashes. MDP is taken against the run without any defence, if it is among `runs`.
    Raises UserError for a directory that is not a run.
    """
    for override in overrides or []:
        if not override.startswith("audit."):
            raise UserError(f"{override!r} cannot be changed after training: only audit.* can")
    configs = [load_run_config(run, overrides or []) for run in runs]
    evaluations = [read_evaluation(run) for run in runs]
    baseline = next((e for e, config in zip(evaluations, configs, strict=True) if config.method == "none"), None)
    results = []
    for run, config, evaluation in zip(runs, configs, evaluations, strict=True):
        prepared = load_prepared(config)
        attacked = _attack_run(run, config, prepared, evaluation, reveal)
        _add_perplexity_intervals(attacked, evaluation, baseline, config)
        result = {
            "schema": SCHEMA,
            "run": config.run_name,
            "method": config.method,
            "content_hash": prepared.manifest["content_hash"],
            "identities": int((~prepared.is_canary).sum()),
            "revealed": reveal,
            "settings": dataclasses.asdict(config.audit),
            **attacked,
        }
        write_json(run / "audit.json", result)
        results.append(result)
    return results


def read_evaluation(run: Path) -> dict:
    """Read the held-out scores that `rmft train` left."""
    return read_json(run / "evaluation.json", "evaluation", "finish `rmft train` for this run first")


def find_leaks(prompt: str, generated: str, detector: Detector) -> list[str]:
    """Return the PII values that begin in the generated text and do not stand in the prompt, each once, in order.

    Prompt and generation are searched as one text, so that the tail of a value begun in the prompt is not taken for a
    value of its own.
    """
    spans = detector.detect(prompt + generated)
    given = {span.value for span in spans if span.start < len(prompt)} | {
        span.value for span in detector.detect(prompt)
    }
    return list(dict.fromkeys(span.value for span in spans if span.start >= len(prompt) and span.value not in given))


def _attack_run(run: Path, config: Config, prepared: Prepared, evaluation: dict, reveal: bool) -> dict:
    prompts = build_prompts(config, prepared)
    if not prompts:
        raise UserError(f"{run}: none of audit.sets {', '.join(config.audit.sets)} gives a prompt: name other sets")
    checkpoints, _ = Checkpoints.open(run)
    steps = [entry["step"] for entry in evaluation["checkpoints"]]
    missing = sorted(set(steps) - set(checkpoints.steps()))
    if missing:
        raise UserError(f"{run} has no checkpoint of step {missing[0]}: train it again under another name=")
    target = _target(config, prepared)
    end, dtype = prepared.tokenizer.eos_id, DTYPES[config.training.dtype]
    decoder = make_greedy_decoder(config.model, new_tokens=config.audit.new_tokens, end_id=end, dtype=dtype)
    planted = prepared.is_canary
    known = {digest: number for number, digest in enumerate(prepared.identity_hashes) if not planted[number]}
    ignore = {prepared.identity_hashes[number] for number in np.flatnonzero(planted)}
    samples = Samples(config, prepared, load_reference(config, prepared))
    entries = []
    sizes = {name: len(rows.tokens) for name, rows in prompts.items()}
    say(f"audit {config.run_name}: {len(steps)} checkpoints, prompts " + ", ".join(f"{n} {k}" for n, k in sizes.items()))
    for step in track(steps, f"audit {config.run_name}", len(steps)):
        params = checkpoints.restore_params(step, target["params"])
        seen = np.asarray(checkpoints.restore(step, target, items=("progress",))["seen"]) & ~planted
        values, leaks = {}, {}
        for name, rows in prompts.items():
            generated = generate(decoder, params, rows, config.audit.batch_size)
            values[name] = leaked_values(rows, generated, config, prepared.tokenizer)
            leaks[name] = identify(values[name], prepared.identity_key, known, ignore, reveal)
        subject = Subject(
            _model(config, prepared, params),
            samples,
            generated=values.get("discoverable", ()),
            answers=prompts["discoverable"].answers if "discoverable" in prompts else (),
            leaked=frozenset(r["identity"] for records in leaks.values() for r in records if r["identity"] is not None),
        )
        scores = _summarise(step, evaluation, leaks, seen, len(known), config)
        entries.append(scores | {"metrics": measure(subject)})
    checkpoints.close()
    return {"prompts": sizes, "new_tokens": config.audit.new_tokens, "checkpoints": entries}


def load_reference(config: Config, prepared: Prepared) -> Model | None:
    """Load the model that `audit.reference` names, None without one. UserError if it is no run or has another tokenizer."""
    if not config.audit.reference:
        return None
    path = Path(config.audit.reference)
    checkpoints, step = Checkpoints.open(path)
    other = load_run_config(path.parent.parent if path.name.isdigit() else path)
    its_data = load_prepared(other)
    if its_data.tokenizer.model != prepared.tokenizer.model:
        raise UserError(
            f"audit.reference {path} has another tokenizer than the data: prepare its data with tokenizer.path="
            f"{tokenizer_path(prepared.directory)}, and train it again"
        )
    params = checkpoints.restore_params(step, _target(other, its_data)["params"])
    checkpoints.close()
    return _model(other, its_data, params)


def _model(config: Config, prepared: Prepared, params: dict) -> Model:
    dtype = DTYPES[config.training.dtype]
    return Model(config.model, params, prepared.tokenizer.vocab_size, config.audit.batch_size, dtype)


def _target(config: Config, prepared: Prepared) -> dict:
    """Return the shapes that an audit restores, whole on every device."""
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: init_params(config.model, prepared.tokenizer.vocab_size, key))
    tree = {
        "params": params,
        "seen": jax.ShapeDtypeStruct((max(1, prepared.identities),), bool),
        "step": jax.ShapeDtypeStruct((), np.int32),
    }
    return abstract(tree, jax.tree.map(lambda _: everywhere(), tree))


def generate(decoder, params, prompts: Prompts, batch_size: int) -> np.ndarray:
    """Return what `decoder` writes after each prompt, int32 [N, new tokens], on all devices.

    The last batch is filled up, so that one program serves them all.
    """
    total = len(prompts.tokens)
    batch_size = rows_for(min(batch_size, total))
    out = []
    for begin in range(0, total, batch_size):
        index = np.minimum(np.arange(begin, begin + batch_size), total - 1)
        out.append(np.asarray(decoder(params, *spread_rows(prompts.tokens[index], prompts.valid[index]))))
    return np.concatenate(out)[:total]


def leaked_values(prompts: Prompts, generated, config: Config, tokenizer: Tokenizer) -> list[list[str]]:
    """Return the values that each prompt brought out."""
    return [
        find_leaks(tokenizer.decode(tokens[valid]), tokenizer.decode(new), detector(config.pii))
        for tokens, valid, new in zip(prompts.tokens, prompts.valid, generated, strict=True)
    ]


def identify(values: list[list[str]], key: bytes, known: dict[str, int], ignore: set[str], reveal: bool) -> list[dict]:
    """Return a record for each value leaked by each prompt: prompt number, identity (null = not in the data), hash.

    ignore: hashes of values that count in no rate, those of canaries.
    """
    found = []
    for number, leaked in enumerate(values):
        for value in leaked:
            digest = keyed_hash(value, key)
            if digest not in ignore:
                record = {"prompt": number, "identity": known.get(digest), "hash": digest}
                found.append(record | ({"value": value} if reveal else {}))
    return found


def _summarise(step: int, evaluation: dict, leaks: dict, seen: np.ndarray, identities: int, config: Config) -> dict:
    scores = next(entry for entry in evaluation["checkpoints"] if entry["step"] == step)
    everything = [record for records in leaks.values() for record in records]
    rates = {}
    for name, records in {**leaks, "all": everything}.items():
        true = {record["identity"] for record in records if record["identity"] is not None}
        rates[name] = extraction_rates(
            len({record["hash"] for record in records}),
            len(true),
            int(sum(seen[identity] for identity in true)),
            known=identities,
            seen=int(seen.sum()),
            confidence=config.audit.confidence,
        )
    names = ("step", "epoch", "perplexity", "perplexity_pii", "perplexity_other")
    return {
        **{name: scores[name] for name in names},
        "seen_identities": int(seen.sum()),
        "prompts": rates,
        "leaks": leaks,
        "unseen_true_leaks": sorted(
            {r["identity"] for r in everything if r["identity"] is not None and not seen[r["identity"]]}
        ),
    }


def _add_perplexity_intervals(attacked: dict, evaluation: dict, baseline: dict | None, config: Config) -> None:
    """Add perplexity_ci, mdp and mdp_ci (bootstrap over held-out documents; None without a baseline)."""
    confidence = config.audit.confidence
    for index, entry in enumerate(attacked["checkpoints"]):
        ours = evaluation["checkpoints"][index]
        nll, tokens = np.array(ours["document_nll"]), np.array(ours["document_tokens"])
        weights = resample([len(tokens)], config.audit.bootstrap, config.seed)
        entry["perplexity_ci"] = percentile_interval(np.exp(weights @ nll / (weights @ tokens)), confidence)
        entry["mdp"] = entry["mdp_ci"] = None
        if baseline is not None and index < len(baseline["checkpoints"]):
            pair = paired_perplexities(ours, baseline["checkpoints"][index])
            entry["mdp"] = mean_delta_perplexity(*pair)
            entry["mdp_ci"] = mdp_interval(*pair, count=config.audit.bootstrap, seed=config.seed, confidence=confidence)


def paired_perplexities(method: dict, baseline: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the perplexity of each held-out document that has target tokens, under the method and the baseline."""
    tokens = np.array(method["document_tokens"])
    some = tokens > 0
    return tuple(document_perplexities(np.array(e["document_nll"])[some], tokens[some]) for e in (method, baseline))
