"""A language model beside a datastore of its training text: keys are the features before each token, labels the token.

Source: Khandelwal et al. 2020, arXiv 1911.00172; of the guided loss Chen et al. 2022, arXiv 2205.14704.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmft_jax.config import Config
from rmft_jax.data.blocks import Blocks, Corpus, all_rows
from rmft_jax.data.prepare import Prepared
from rmft_jax.data.tagged_corpus import read_corpus
from rmft_jax.kernels import (
    Datastore,
    TaggedBatch,
    interpolate,
    knn_guided_loss,
    knn_probability,
    mask_batch,
    retrieve,
    target_mask,
    token_nll,
)
from rmft_jax.models.gpt import hidden, init_params, output_matrix
from rmft_jax.progress import track
from rmft_jax.study_config import LookupTextConfig
from rmft_jax.training.masking import masking_key, masking_rules
from rmft_jax.training.members import epoch_orders
from rmft_jax.training.optimizer import make_optimizer

_METRIC = "sqeuclidean"


class Text:
    """A split as rows of which none spans two documents, none wider than a sequence.

    rows: numpy TaggedBatch [N, W]. own: int32 [N, M], the places in a datastore of the row's own document, -1 = none, which
    its tokens must not find. targets, is_pii: bool [N, W-1], next tokens, and those within PII.
    """

    def __init__(self, config: Config, prepared: Prepared, split: str):
        corpus = Corpus(read_corpus(prepared.directory, split), scope=config.masking.scope)
        blocks = Blocks(corpus, stride=config.training.sequence_length - config.masking.margin, apart=True)
        self.rows = all_rows(blocks)
        document = np.array([blocks.documents(n)[0] for n in range(len(blocks))])
        per_row = self.rows.tokens.shape[1] - 1
        begin, end = (np.searchsorted(document, document, side) * per_row for side in ("left", "right"))
        place = begin[:, None] + np.arange((end - begin).max())
        self.own = np.where(place < end[:, None], place, -1).astype(np.int32)
        self.targets = np.asarray(target_mask(jnp.asarray(self.rows.segment_ids)))
        self.is_pii = self.targets & (self.rows.component[:, 1:] > 0)


def features_of(params: dict, config: Config, rows: TaggedBatch) -> jax.Array:
    """Return the features before each next token of the rows as they stand, float32 [N, W-1, E]."""
    tokens, segments = jnp.asarray(rows.tokens)[:, :-1], jnp.asarray(rows.segment_ids)[:, :-1]
    one = lambda row: hidden(params, config.model, row[0][None], row[1][None])[0]  # noqa: E731
    return jax.lax.map(one, (tokens, segments), batch_size=config.training.batch_size)


def make_store(features: jax.Array, text: Text) -> Datastore:
    """Return a store with an entry for each next token of a text. features: [N, W-1, E], as from `features_of`."""
    labels = jnp.asarray(text.rows.tokens[:, 1:].reshape(-1), jnp.int32)
    return Datastore(features.reshape(-1, features.shape[-1]), labels, jnp.asarray(text.targets.reshape(-1)))


def gold_probability(
    store: Datastore, features: jax.Array, text: Text, settings: LookupTextConfig, vocab_size: int, *, own: bool
) -> jax.Array:
    """Return P_kNN of each next token, float32 [N, W-1]. own: the store is of this text: leave the same document out."""

    def of_row(row):
        queries, gold, left_out = row
        exclude = jnp.broadcast_to(left_out, (len(queries), len(left_out))) if own else None
        found = retrieve(store, queries, settings.k, metric=_METRIC, exclude=exclude)
        return knn_probability(found.similarity, found.labels, gold, vocab_size, temperature=settings.temperature)

    return jax.lax.map(of_row, (features, jnp.asarray(text.rows.tokens[:, 1:]), jnp.asarray(text.own)))


def train_beside_store(
    config: Config, prepared: Prepared, text: Text, settings: LookupTextConfig, loss: str, epochs: int, *, title: str
) -> dict:
    """Train a GPT on a text and return its parameters. loss: see LookupArmConfig; masking as the config says."""
    vocab_size, size = prepared.tokenizer.vocab_size, config.training.batch_size
    params = init_params(config.model, vocab_size, jax.random.key(config.seed))
    optimizer = make_optimizer(config.training, epochs * (len(text.rows.tokens) // size))
    length, rules = config.training.sequence_length + 1, masking_rules(config)
    data, bank = jax.tree.map(jnp.asarray, (text.rows, prepared.bank))

    def mean_loss(params, batch, known):
        masked = mask_batch(batch, bank, masking_key(config.seed), length=length, rules=rules)
        features = hidden(params, config.model, masked.tokens[:, :-1], masked.segment_ids[:, :-1])
        targets = target_mask(masked.segment_ids)
        nll = token_nll(features @ output_matrix(params), masked.tokens[:, 1:])
        known = jnp.pad(known, ((0, 0), (0, nll.shape[1] - known.shape[1])))
        if loss == "guided":
            nll = knn_guided_loss(nll, known, settings.beta)
        elif loss == "mixed":
            nll = -jnp.log(interpolate(known, jnp.exp(-nll), settings.share))
        return jnp.sum(jnp.where(targets, nll, 0)) / jnp.sum(targets)

    @jax.jit
    def epoch_of(state, order, epoch, known):
        def step(state, chosen):
            params, memory = state
            batch = jax.tree.map(lambda x: x[chosen], data)._replace(epoch=jnp.full(len(chosen), epoch))
            value, gradient = jax.value_and_grad(mean_loss)(params, batch, known[chosen])
            updates, memory = optimizer.update(gradient, memory, params)
            return (optax.apply_updates(params, updates), memory), value

        return jax.lax.scan(step, state, order)

    @jax.jit
    def look_up(params):
        features = features_of(params, config, text.rows)
        return gold_probability(make_store(features, text), features, text, settings, vocab_size, own=True)

    state = params, optimizer.init(params)
    known = jnp.zeros(text.targets.shape)
    for epoch in track(range(epochs), title, epochs):
        if loss != "plain" and epoch % settings.refresh == 0:
            known = look_up(state[0])
        order = epoch_orders(np.arange(len(text.rows.tokens))[None], epoch, np.array([config.seed]), size)[0]
        state, _ = epoch_of(state, order, jnp.int32(epoch), known)
    return state[0]
