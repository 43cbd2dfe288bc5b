"""Several prepared corpora in one run: what `prepare` numbered in each by itself gets numbers that mean one thing in all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.blocks import Corpus, shared_ids
from rmft_jax.data.prepare import Prepared, check_flagged, pii_names, read_prepared
from rmft_jax.data.tokenizer import tokenizer_path
from rmft_jax.errors import UserError
from rmft_jax.kernels import SurrogateBank
from rmft_jax.paths import as_path, local_copy
from rmft_jax.pii.bank import join_banks
from rmft_jax.pii.detector import detector
from rmft_jax.pii.values import keyed_hash

_LATER = 1 << 30  # a rank that no policy takes for the first occurrence, for one drawn among all, or for one of the first k


def open_mix(config: Config, prepared: Prepared) -> list[Prepared]:
    """Load the corpora of training.mix. prepared: the run's own data.

    Raises UserError for a folder without prepared data, another tokenizer, other types of personal data, data that were not
    searched for duplicates where dedup.policy wants that, and the same documents twice.
    """
    out: list[Prepared] = []
    for number, part in enumerate(config.training.mix):
        where = f"training.mix.{number}.data {part.data}"
        directory = local_copy(as_path(part.data))
        if not (directory / "manifest.json").exists():
            raise UserError(f"{where} is no prepared data: name a folder that `rmft prepare` wrote, such as runs/NAME/data")
        other = read_prepared(directory)
        if other.tokenizer.model != prepared.tokenizer.model:
            raise UserError(
                f"{where} has another tokenizer than the run's own data: prepare it with tokenizer.path="
                f"{tokenizer_path(prepared.directory)}"
            )
        if (its := pii_names(other.manifest)) != (ours := pii_names(prepared.manifest)):
            raise UserError(
                f"{where} has personal data of the types {', '.join(its)}, the run's own data of {', '.join(ours)}: prepare "
                f"both with the same pii.types and pii.custom, in one order"
            )
        if any(other.manifest["content_hash"] == known.manifest["content_hash"] for known in (prepared, *out)):
            raise UserError(f"{where} holds the same documents as the run's own data or another one: name each corpus once")
        if config.dedup.policy != "none":
            check_flagged(other.manifest, config.dedup.policy, f"the data in {part.data}")
        out.append(other)
    return out


def unite(prepared: Sequence[Prepared], corpora: Sequence[Corpus], config: Config) -> SurrogateBank:
    """Number what the corpora have through, and return the surrogates of all as one bank. The first keeps its numbers.

    Kinds get the tables of their own corpus' surrogates, span ids and identities those after the corpora before. A value
    that an earlier corpus has too keeps its identity there, and is no first occurrence here, so that no policy counts
    its true showings anew. Values meet although each corpus hashes them with a key of its own: the text of one occurrence
    is decoded and hashed with the other's key.
    """
    types = detector(config.pii).types
    names = [list(each.manifest["surrogates"]) for each in prepared]
    real = [np.unique(corpus.component_value[corpus.component_kind > 0]) for corpus in corpora]
    bank = join_banks([each.bank for each in prepared], names, real, types)
    known = [{digest: number for number, digest in enumerate(each.identity_hashes)} for each in prepared]
    numbers = [np.arange(prepared[0].identities)]
    tables, spans = len(prepared[0].bank.counts), prepared[0].manifest["train"]["pii_occurrences"]
    identities = max(1, prepared[0].identities)  # as many as the state of a run has room for
    for place, (each, corpus) in enumerate(zip(prepared[1:], corpora[1:], strict=True), 1):
        own = identities + np.arange(each.identities)
        again = np.zeros(each.identities, bool)
        for identity, value in _values(each, corpus, types):
            for earlier in range(place):
                if (number := known[earlier].get(keyed_hash(value, prepared[earlier].identity_key))) is not None:
                    own[identity], again[identity] = numbers[earlier][number], True
                    break
        numbers.append(own)
        corpus.component_kind[corpus.component_kind > 0] += tables
        of_span = corpus.span["identity"][1:]
        corpus.span["rank"][1:][again[of_span]] = _LATER
        corpus.span["identity"][1:], corpus.span["id"][1:] = own[of_span], corpus.span["id"][1:] + spans
        tables += len(each.bank.counts)
        spans += each.manifest["train"]["pii_occurrences"]
        identities += each.identities
    if spans >= 2**31:
        raise UserError("the corpora of training.mix have more than 2^31 occurrences of PII together: leave some out")
    if config.masking.scope == "corpus":  # one surrogate everywhere
        together = {name: np.concatenate([corpus.span[name] for corpus in corpora]) for name in ("identity", "id")}
        begins = np.cumsum([len(corpus.span["id"]) for corpus in corpora])[:-1]
        ids = np.split(shared_ids(together, np.zeros(len(together["id"]), np.int64)), begins)
        for corpus, of_corpus in zip(corpora, ids, strict=True):
            corpus.span["id"][1:] = of_corpus[1:]
    return bank


def _values(prepared: Prepared, corpus: Corpus, types) -> list[tuple[int, str]]:
    """Return (identity, normalised value) of those values that stand somewhere in a corpus as a whole."""
    whole = np.flatnonzero(~corpus.span_broken)
    identities, first = np.unique(corpus.span["identity"][whole], return_index=True)
    out = []
    for identity, span in zip(identities.tolist(), whole[first].tolist(), strict=True):
        text = prepared.tokenizer.decode(corpus.tokens[corpus.span_first[span] : corpus.span_last[span] + 1].tolist())
        out.append((identity, types[corpus.span["type"][span]].normalise(text)))
    return out
