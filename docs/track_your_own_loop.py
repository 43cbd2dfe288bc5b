"""Follow memorization in a training loop of your own, which knows nothing of rmft_jax but its kernels."""

import jax
import jax.numpy as jnp
import optax

from rmft_jax.kernels import example_counts, first_memorized, memorized, run_lengths, slice_counts, target_mask, token_nll

VOCAB, WIDTH, CONTEXT, ROWS, LENGTH, STEPS = 50, 64, 3, 32, 24, 60
tokens = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, VOCAB)  # nothing to learn but the rows themselves
segment_ids = jnp.tile(jnp.where(jnp.arange(LENGTH) < 10, 1, 2), (ROWS, 1))  # two documents a row
half = jnp.broadcast_to(jnp.arange(LENGTH - 1) >= LENGTH // 2, (ROWS, LENGTH - 1)).astype(int)  # slices: first, second half
keys = jax.random.split(jax.random.key(1), 3)
params = {
    "embed": jax.random.normal(keys[0], (VOCAB, WIDTH)),
    "hidden": jax.random.normal(keys[1], (CONTEXT * WIDTH, 4 * WIDTH)) / WIDTH,
    "output": jax.random.normal(keys[2], (4 * WIDTH, VOCAB)) / WIDTH,
}
optimizer = optax.adam(3e-3)
is_target = target_mask(segment_ids)


def loss(params):
    before = jnp.stack([jnp.roll(tokens[:, :-1], shift, axis=1) for shift in range(CONTEXT)], axis=-1)
    embedded = params["embed"][before].reshape(ROWS, LENGTH - 1, -1)
    logits = jax.nn.relu(embedded @ params["hidden"]) @ params["output"]
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
for number in (0, 10, 20, 30, STEPS - 1):
    share = hits[number] / targets[number]
    print(f"step {number}: M {share[0]:.2f} and {share[1]:.2f} of the halves, runs of {runs.total[number].sum()} tokens / "
          f"{runs.count[number].sum()}, the longest {runs.longest[number].max()}, {(first[number] >= 0).sum()} rows known")
