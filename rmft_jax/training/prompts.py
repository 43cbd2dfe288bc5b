"""Few-shot training of cloze prompts with and without retrieval, many members at once, and what is asked of each at the end.

Source: Chen et al. 2022 (RetroPrompt), arXiv 2205.14704.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmft_jax.config import Config
from rmft_jax.kernels import (
    Datastore,
    cross_entropy,
    kernel_self_influence,
    knn_guided_loss,
    knn_probability,
    neural_demonstrations,
    retrieve,
    tangent_kernel,
)
from rmft_jax.models.cloze import Cloze, Prompts
from rmft_jax.models.gpt import hidden, init_params, output_matrix
from rmft_jax.progress import track
from rmft_jax.study_config import PromptSetConfig
from rmft_jax.training.members import Members, epoch_orders
from rmft_jax.training.optimizer import make_optimizer


class Shots(NamedTuple):
    """Few labelled prompts for each member, all leaves with a leading axis of members, and how it is trained.

    labels: int32 [R, N]. seed: int32 [R]. beta: float32 [R], of the guided loss, 0 = cross entropy alone. left_out: int32
    [R], an example that the member neither trains on nor retrieves, -1 = none.
    """

    prompts: Prompts
    labels: np.ndarray
    seed: np.ndarray
    beta: np.ndarray
    left_out: np.ndarray


class Answers(NamedTuple):
    """What trained members say, numpy with a leading axis of members R.

    test_logits: [R, M, C], scores of the labels' words under the weights. similarity, neighbours: [R, M, k], of the test
    prompts' nearest training examples, and their labels. train_probability: [R, N], what the weights give each example's
    label. influence: [R, N], self-influence of each example, of those left out without meaning.
    """

    test_logits: np.ndarray
    similarity: np.ndarray
    neighbours: np.ndarray
    train_probability: np.ndarray
    influence: np.ndarray


def train_prompts(
    config: PromptSetConfig, cloze: Cloze, params: dict, trained: tuple[str, ...], shots: Shots, test: Prompts, *,
    demonstrations: bool, title: str,
) -> Answers:  # fmt: skip
    """Train each member from `params` on its examples and question it.

    trained: keys of params that are trained; the others stay. demonstrations: show each prompt its neural demonstrations.
    The datastore is the members' training examples, its keys refreshed before each epoch; no example finds itself.
    """
    init, epoch_of, questions = _programs(config, cloze, trained, demonstrations)
    count, size = shots.labels.shape
    group = Members(count, together=config.together)
    shared = group.shared(jax.tree.map(np.asarray, (params, test)))
    own = group.own(shots)
    state = group.compile(init)((), own, shared)
    program = group.compile(epoch_of)
    rows = np.broadcast_to(np.arange(size), shots.labels.shape)
    for epoch in track(range(config.epochs), title, config.epochs):
        order = group.own(epoch_orders(rows, epoch, shots.seed, min(config.batch_size, size)))
        state, losses = program(state, (own, order), shared)
        jax.block_until_ready(losses)
    # One member at a time, on one device: the Jacobian of influence scores is large, and side by side on several CPU devices
    # this program has made XLA wait for itself for good.
    ask, end = jax.jit(questions), jax.device_get(state["params"])
    members = (jax.tree.map(lambda x, n=n: np.asarray(x)[n], (end, shots)) for n in range(count))
    found = [jax.device_get(ask(*member, (params, test))) for member in track(members, f"{title}: scores", count)]
    return Answers(*map(np.stack, zip(*found, strict=True)))


def _programs(config: PromptSetConfig, cloze: Cloze, trained: tuple[str, ...], demonstrations: bool):
    """Return the functions that make a member's state, take it through an epoch, and question it."""
    optimizer = optax.adam(config.learning_rate)
    classes, most = len(cloze.words), max(config.k)

    def init(_, shots, shared):
        params = {name: shared[0][name] for name in trained}
        return {"params": params, "optimizer": optimizer.init(params)}

    def store_of(params, shots):
        count = len(shots.labels)
        valid = jnp.arange(count) != shots.left_out
        return Datastore(cloze.features(params, shots.prompts), shots.labels, valid)

    def weights_of(store, shots):
        """Return the factor of each example's loss, float32 [N]."""
        every = jnp.arange(len(shots.labels))
        found = retrieve(store, store.keys, min(config.train_k, len(every)), exclude=every)
        p = knn_probability(found.similarity, found.labels, shots.labels, classes, temperature=config.temperature)
        return knn_guided_loss(jnp.ones(len(every)), p, shots.beta)

    def logits_of(params, store, prompts, queries, exclude):
        shown = None
        if demonstrations:
            words = cloze.label_embeddings(params)
            shown = neural_demonstrations(queries, store, words, config.demonstrations, exclude=exclude)
        return cloze.logits(params, cloze.features(params, prompts, shown))

    def epoch_of(state, own, shared):
        shots, order = own
        store = jax.lax.stop_gradient(store_of(shared[0] | state["params"], shots))
        weights = weights_of(store, shots) * store.valid

        def step(state, rows):
            def loss(params):
                prompts = jax.tree.map(lambda x: x[rows], shots.prompts)
                logits = logits_of(shared[0] | params, store, prompts, store.keys[rows], rows)
                nll = optax.softmax_cross_entropy_with_integer_labels(logits, shots.labels[rows])
                return jnp.sum(weights[rows] * nll) / jnp.maximum(jnp.sum(store.valid[rows]), 1)

            value, gradient = jax.value_and_grad(loss)(state["params"])
            updates, memory = optimizer.update(gradient, state["optimizer"])
            return {"params": optax.apply_updates(state["params"], updates), "optimizer": memory}, value

        return jax.lax.scan(step, state, order)

    def questions(trainable, shots, shared):
        params, test = shared[0] | trainable, shared[1]
        store, every = store_of(params, shots), jnp.arange(len(shots.labels))

        def of_batch(prompts):
            queries = cloze.features(params, prompts)
            found = retrieve(store, queries, min(most, len(every)))
            nobody = jnp.full(len(queries), -1)
            return logits_of(params, store, prompts, queries, nobody), found.similarity, found.labels

        alone = lambda prompt: jax.tree.map(lambda x: x[0], of_batch(jax.tree.map(lambda x: x[None], prompt)))  # noqa: E731
        said = jax.lax.map(alone, test, batch_size=64)
        logits = logits_of(params, store, shots.prompts, store.keys, every)
        likely = jnp.take_along_axis(jax.nn.softmax(logits), shots.labels[:, None], axis=1)[:, 0]
        return *said, likely, influence(trainable, shared[0], store, shots)

    def influence(trainable, frozen, store, shots):
        """Return the self-influence of each example under the weighted loss that was trained, the datastore as it is."""
        every = jnp.arange(len(shots.labels))

        def outputs(params, numbered):
            number, prompt = numbered
            one = jax.tree.map(lambda x: x[None], prompt)
            return logits_of(frozen | params, store, one, store.keys[number][None], number[None])[0]

        examples = (every, shots.prompts)
        logits = jax.lax.map(lambda one: outputs(trainable, one), examples, batch_size=8)
        weights = weights_of(store, shots) * store.valid
        loss = lambda z, y, w: w * optax.softmax_cross_entropy_with_integer_labels(z, y)  # noqa: E731
        of_each = logits, shots.labels, weights
        return kernel_self_influence(
            tangent_kernel(outputs, trainable, examples, batch_size=8),
            jax.vmap(jax.hessian(loss))(*of_each), jax.vmap(jax.grad(loss))(*of_each),
            jax.vmap(jax.grad(lambda z, y: jax.nn.softmax(z)[y]))(*of_each[:2]), damping=config.damping,
        )  # fmt: skip

    return init, epoch_of, questions


def pretrain(
    config: Config, rows: np.ndarray, lengths: np.ndarray, vocab_size: int, *, causal: bool, epochs: int, title: str
) -> tuple[dict, list[float]]:
    """Train a small language model on texts, a row each, and return its parameters and the loss of each epoch.

    rows: int32 [N, T], padded at the right. lengths: int [N]. causal: predict each next token, else the tokens that are
    hidden with training.mask_share, by the last row of the embedding. model, training and seed of the config count.
    """
    size = config.training.batch_size
    optimizer = make_optimizer(config.training, epochs * (len(rows) // size))
    params = init_params(config.model, vocab_size, jax.random.key(config.seed))
    segments = (np.arange(rows.shape[1]) < lengths[:, None]).astype(np.int32)
    data = jnp.asarray(rows), jnp.asarray(segments)

    def loss(params, tokens, segments, key):
        if causal:
            shown, targets, asked = tokens[:, :-1], tokens[:, 1:], segments[:, 1:] > 0
            seen = segments[:, :-1]
        else:
            asked = jax.random.bernoulli(key, config.training.mask_share, tokens.shape) & (segments > 0)
            shown, targets, seen = jnp.where(asked, vocab_size - 1, tokens), tokens, segments
        features = hidden(params, config.model, shown, seen, causal=causal)
        flat = features.reshape(-1, features.shape[-1]), output_matrix(params), targets.ravel(), asked.ravel()
        return cross_entropy(*flat)[0] / jnp.maximum(jnp.sum(asked), 1)

    @jax.jit
    def epoch_of(state, order, key):
        def step(state, numbered):
            number, chosen = numbered
            params, memory = state
            batch = (x[chosen] for x in data)
            value, gradient = jax.value_and_grad(loss)(params, *batch, jax.random.fold_in(key, number))
            updates, memory = optimizer.update(gradient, memory, params)
            return (optax.apply_updates(params, updates), memory), value

        return jax.lax.scan(step, state, (jnp.arange(len(order)), order))

    state, losses, key = (params, optimizer.init(params)), [], jax.random.key(config.seed + 1)
    numbers, seeds = np.arange(len(rows))[None], np.array([config.seed])
    for epoch in track(range(epochs), title, epochs):
        order = epoch_orders(numbers, epoch, seeds, size)[0]
        state, values = epoch_of(state, order, jax.random.fold_in(key, epoch))
        losses.append(float(values.mean()))
    return state[0], losses
