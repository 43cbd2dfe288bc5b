"""Follow memorization in a training loop of your own, which knows nothing of rmft_jax but its kernels."""

import jax
import jax.numpy as jnp
import optax

from rmft_jax.kernels import example_counts, first_memorized, memorized, run_lengths, slice_counts, target_mask, token_nll

VOCAB, WIDTH, ROWS, LENGTH, STEPS = 50, 256, 32, 24, 60
tokens = jax.random.randint(jax.random.key(3), (ROWS, LENGTH), 0, VOCAB).at[:, 0].set(jnp.arange(ROWS))
segment_ids = jnp.tile(jnp.where(jnp.arange(LENGTH) < 10, 1, 2), (ROWS, 1))  # two documents a row
half = jnp.broadcast_to(jnp.arange(LENGTH - 1) >= LENGTH // 2, (ROWS, LENGTH - 1)).astype(int)  # slices
is_target = target_mask(segment_ids)
normal = jax.nn.initializers.normal(0.1)
params = {"embed": normal(jax.random.key(1), (3, VOCAB, WIDTH)), "output": normal(jax.random.key(2), (WIDTH, VOCAB))}
optimizer = optax.adam(1e-2)


def loss(params):
    back = [jnp.pad(tokens, ((0, 0), (n, 0)))[:, : LENGTH - 1] for n in range(len(params["embed"]))]  # n tokens back
    logits = jax.nn.relu(sum(table[ids] for table, ids in zip(params["embed"], back, strict=True))) @ params["output"]
    nll = token_nll(logits, tokens[:, 1:])
    return jnp.sum(nll, where=is_target) / jnp.sum(is_target), jnp.argmax(logits, axis=-1) == tokens[:, 1:]


def step(carried, number):
    params, state, first = carried
    (_, hit), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    hits, targets = example_counts(hit, is_target)
    first = first_memorized(first, jnp.arange(ROWS), hits == targets, number)
    runs = run_lengths(memorized(hit, is_target), segment_ids[:, 1:], bins=LENGTH)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state, first), (slice_counts(hit, is_target, half, 2), runs, first)


start = params, optimizer.init(params), jnp.full(ROWS, -1)
_, ((hits, targets), runs, first) = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(STEPS)))(start)
for n in (0, 10, 20, 30, STEPS - 1):
    m, known = hits[n] / targets[n], (first[n] >= 0).sum()
    print(f"step {n}: M {m[0]:.2f}, {m[1]:.2f} of the halves, longest run {runs.longest[n].max()}, {known} rows known")
