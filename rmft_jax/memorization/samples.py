"""What the metrics score: token rows that depend on the data and the audit settings alone, so that runs share them."""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import numpy as np

from rmft_jax.config import Config
from rmft_jax.data.canaries import draw_address, make_canaries, tokenize
from rmft_jax.data.prepare import Prepared
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.kernels import SurrogateBank
from rmft_jax.memorization.prompts import span_bounds
from rmft_jax.memorization.scoring import Model, Rows, make_rows

_WINDOW = 50  # tokens of prefix, and of suffix (Carlini et al. 2022)


class Documents(NamedTuple):
    """Member and non-member documents, as many of each: rows, and the length of each one's text under zlib, int [N]."""

    rows: Rows
    compressed_bytes: np.ndarray
    is_member: np.ndarray


class Canaries(NamedTuple):
    """Rows that count an address: first each of C canaries, then R references of the first, of the second, ..."""

    rows: Rows
    repetitions: np.ndarray


class Samples:
    """The rows of one experiment, each kind drawn when it is first asked for, by a random stream of its own."""

    def __init__(self, config: Config, prepared: Prepared, reference: Model | None = None):
        """reference: a model that has not seen the training documents."""
        self.config, self.prepared, self.reference = config, prepared, reference

    @functools.cached_property
    def train(self) -> list[dict]:
        """Return the training documents without the canaries'."""
        planted = self.prepared.canary_identities
        records = read_corpus(self.prepared.directory, "train")
        return [record for record in records if not np.isin(record["span_identity"], planted).any()]

    @property
    def window(self) -> int:
        """Return the tokens of a window's prefix, and of its suffix: 50, less where sequences are shorter than 100."""
        return min(_WINDOW, self.config.training.sequence_length // 2)

    @functools.cached_property
    def windows(self) -> Rows | None:
        """Return windows of training text, drawn uniformly among all. None: the documents are too short."""
        width = 2 * self.window
        room = np.array([max(0, len(record["tokens"]) - width + 1) for record in self.train])
        if not room.sum():
            return None
        ends = np.cumsum(room)
        chosen = np.sort(self._rng(10).choice(ends[-1], min(self.config.audit.samples, ends[-1]), replace=False))
        documents = np.searchsorted(ends, chosen, side="right")
        begins = chosen - (ends - room)[documents]
        pairs = zip(documents, begins, strict=True)
        return make_rows([self.train[number]["tokens"][begin : begin + width] for number, begin in pairs])

    @functools.cached_property
    def documents(self) -> Documents | None:
        """Return members and non-members, cut at the sequence length. None without either.

        Near-duplicates are no members here: deduplication leaves them out, and all runs are asked about the same documents.
        """
        rng = self._rng(11)
        pools = [
            [record["tokens"] for record in self.train if not (record["duplicate"] == 1).any()],
            [record["tokens"] for record in read_corpus(self.prepared.directory, "heldout")],
        ]
        count = min(self.config.audit.samples, *map(len, pools))
        if not count:
            return None
        chosen = [pool[index] for pool in pools for index in sorted(rng.choice(len(pool), count, replace=False))]
        tokens = [row[: self.config.training.sequence_length] for row in chosen]
        texts = [self.prepared.tokenizer.decode(row) for row in tokens]
        sizes = [len(zlib.compress(text.encode("utf-8", "surrogatepass"))) for text in texts]
        return Documents(make_rows(tokens), np.array(sizes), np.repeat([True, False], count))

    @functools.cached_property
    def reference_log_probs(self) -> np.ndarray:
        """Return the reference model's log probabilities of the documents' tokens, float [N, T]."""
        return self.reference.score(self.documents.rows, ["log_prob"])["log_prob"]

    @functools.cached_property
    def addresses(self) -> Rows | None:
        """Return one occurrence each of training addresses behind its prefix, then the same with made-up addresses.

        A made-up address has surrogates in the place of all components but the TLD, so it has the same form. The rows count
        the address. None: the training documents have none.
        """
        if "email" not in self.config.pii.types:
            return None
        rng, email = self._rng(12), self.config.pii.names.index("email")
        places: dict[int, list[tuple[int, int]]] = {}
        for number, record in enumerate(self.train):
            for span in np.flatnonzero(record["span_type"] == email):
                places.setdefault(int(record["span_identity"][span]), []).append((number, int(span)))
        if not places:
            return None
        identities = rng.choice(sorted(places), min(self.config.audit.samples, len(places)), replace=False)
        true, made_up, starts = [], [], []
        for identity in sorted(identities.tolist()):
            number, span = places[identity][rng.integers(len(places[identity]))]
            record = self.train[number]
            begin, end = span_bounds(record)[span]
            prefix = record["tokens"][max(0, begin - self.config.audit.prompt_tokens) : begin]
            true.append(np.concatenate([prefix, record["tokens"][begin:end]]))
            made_up.append(np.concatenate([prefix, _made_up(record, begin, end, self.prepared.bank, rng)]))
            starts.append(len(prefix))
        return make_rows([*true, *made_up], np.array(starts * 2))

    @functools.cached_property
    def documents_of(self) -> np.ndarray:
        """Return int [identities]: how many training documents hold each value; 0 for canaries."""
        holders = [np.unique(record["span_identity"]) for record in self.train]
        return np.bincount(np.concatenate([np.zeros(0, int), *holders]), minlength=self.prepared.identities)

    @functools.cached_property
    def canaries(self) -> Canaries | None:
        """Return the canaries and their references, the same addresses for all. None: the data hold none."""
        config, tokenizer = self.config.canary, self.prepared.tokenizer
        canaries = make_canaries(config, self.config.source.seed)
        if not canaries:
            return None
        rng = self._rng(13)
        addresses = [draw_address(rng) for _ in range(config.references)]

        texts = [canary.text for canary in canaries]
        texts += [canary.with_address(address) for canary in canaries for address in addresses]
        tokens, starts = zip(*tokenize(texts, tokenizer), strict=True)
        return Canaries(make_rows(tokens, np.array(starts)), np.array([canary.repetitions for canary in canaries]))

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, stream])


def _made_up(record: dict, begin: int, end: int, bank: SurrogateBank, rng) -> np.ndarray:
    """Return the tokens of an address with surrogates for its components but literals and the last one, the TLD."""
    component = record["component"][begin:end] - 1
    parts = []
    for number in range(component[0], component[-1] + 1):
        kind = record["component_kind"][number]
        if kind == 0 or number == component[-1]:
            parts.append(record["tokens"][begin:end][component == number])
        else:
            row = rng.integers(bank.counts[kind])
            parts.append(bank.entry(kind, row))
    return np.concatenate(parts).astype(np.int32)
