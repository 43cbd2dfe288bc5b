"""A decoder-only transformer. Layers are Flax NNX modules; parameters live in a plain dict, blocks stacked for `lax.scan`.

Shapes: B rows, T tokens, V vocabulary, E width, H heads, G key and value heads, D features of a head, L layers, S cache
length, P prompt length.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rmft_jax.config import LoraConfig, ModelConfig
from rmft_jax.kernels import (
    attention,
    causal_attention,
    causal_mask,
    document_mask,
    document_positions,
    fused_attention,
    rotary,
    rotary_angles,
)
from rmft_jax.models.lora import merge

# Logical axes of every parameter; training/mesh.py says which mesh axis each is split over.
# The first path that ends a parameter's is the one that counts.
LOGICAL_AXES = {
    ("positions", "embed"): (None, "embed"),
    ("embed",): ("vocab", "embed"),
    ("output", "kernel"): ("embed", "vocab"),
    ("final_norm", "scale"): (None,),
    ("final_norm", "bias"): (None,),
    ("blocks", "attention_norm", "scale"): ("layers", None),
    ("blocks", "attention_norm", "bias"): ("layers", None),
    ("blocks", "attention", "qkv", "kernel"): ("layers", "embed", "heads"),
    ("blocks", "attention", "qkv", "bias"): ("layers", "heads"),
    ("blocks", "attention", "q_norm", "scale"): ("layers", None),
    ("blocks", "attention", "k_norm", "scale"): ("layers", None),
    ("blocks", "attention", "out", "kernel"): ("layers", "heads", "embed"),
    ("blocks", "attention", "out", "bias"): ("layers", None),
    ("blocks", "mlp_norm", "scale"): ("layers", None),
    ("blocks", "mlp_norm", "bias"): ("layers", None),
    ("blocks", "mlp", "gate_up", "kernel"): ("layers", "embed", "mlp"),
    ("blocks", "mlp", "gate_up", "bias"): ("layers", "mlp"),
    ("blocks", "mlp", "up", "kernel"): ("layers", "embed", "mlp"),
    ("blocks", "mlp", "up", "bias"): ("layers", "mlp"),
    ("blocks", "mlp", "down", "kernel"): ("layers", "mlp", "embed"),
    ("blocks", "mlp", "down", "bias"): ("layers", None),
}

for _path, _axes in [item for item in LOGICAL_AXES.items() if item[0][0] == "blocks" and item[0][-1] == "kernel"]:
    LOGICAL_AXES[*_path[:-1], "lora_a"] = (*_axes[:2], None)
    LOGICAL_AXES[*_path[:-1], "lora_b"] = (_axes[0], None, _axes[2])

_GELU = {"gelu": functools.partial(jax.nn.gelu, approximate=False), "gelu_new": jax.nn.gelu}

# Up to so many blocks are written out one after the other; more are a loop over one, whose program is as small however deep
# the model is. The loop copies what the backward pass needs of each block: on CPU a sixth of the step. Under remat it is
# always a loop: written out, XLA finds what is computed twice and keeps it after all.
UNROLL = 12

# What is kept of each block for the backward pass: all, its input alone, or that and the results of its matrix products.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("product"),  # of _spread_dot, whose inside it does not see
    ),
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far: an array [B, G, S, D] for each layer, read without a transpose.

    On a mesh (`place`) rows are split as the batch is, G as heads are.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


class Linear(nnx.Linear):
    """A matrix product, with what an adapter adds to it (`models.lora`)."""

    adapter = None  # A [I, R], B [R, O], scale []

    def __call__(self, x):
        if self.adapter is None:
            return super().__call__(x)
        a, b, scale = self.adapter
        return super().__call__(x) + (x @ a) @ (scale * b)


def _linear(inputs: int, outputs: int, *axes: str, bias: bool, deviation: float, rngs: nnx.Rngs) -> Linear:
    how = {"use_bias": bias, "kernel_init": nnx.initializers.normal(deviation), "rngs": rngs}
    return Linear(inputs, outputs, **how, dot_general=functools.partial(_spread_dot, axes))


def _spread_dot(axes: tuple[str, ...], x, kernel, dimensions, **how):
    """Return `lax.dot_general` of features and a matrix with these logical axes, which is gathered where it is read.

    Left to itself XLA gathers it twice in a backward pass that computes the forward one again, on meshes of three axes.
    """
    if not _split():
        return jax.lax.dot_general(x, kernel, dimensions, **how)
    return checkpoint_name(_gathered_dot(axes, x, kernel), "product")


def _split() -> bool:
    """Return whether mesh.fsdp splits parameters, and `place` rows."""
    placed = dict(get_logical_axis_rules()).get("batch")
    return bool(placed) and jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def _gathered(axes, kernel):
    return place(kernel, *(None if axis == "embed" else axis for axis in axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered_dot(axes, x, kernel):
    return x @ _gathered(axes, kernel)


def _gathered_dot_gradient(axes, saved, gradient):
    x, kernel = saved
    of_kernel = jnp.einsum("...i,...o->io", x, gradient)
    return gradient @ _gathered(axes, kernel).T, place(of_kernel, *axes)


_gathered_dot.defvjp(lambda axes, x, kernel: (_gathered_dot(axes, x, kernel), (x, kernel)), _gathered_dot_gradient)


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm == "rms":
        return nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
    # E[x^2] - E[x]^2, the default, loses the variance where a few features are far larger than the others
    return nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Causal self-attention.

    The columns of qkv lie group by group: H / G queries, the key and the value that these read. So they can be cut between
    groups, and each device of mesh.tensor has what its own heads need (`column_order`).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.heads, self.groups, self.rotated, self.qk_norm = config.heads, config.groups, config.rotated, config.qk_norm
        inner = config.heads * config.head_dim
        projected = inner + 2 * config.groups * config.head_dim
        deviation = config.width**-0.5
        self.qkv = _linear(config.width, projected, "embed", "heads", bias=config.qkv_bias, deviation=deviation, rngs=rngs)
        out_scale = (2 * config.layers * inner) ** -0.5
        self.out = _linear(inner, config.width, "heads", "embed", bias=config.out_bias, deviation=out_scale, rngs=rngs)
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_epsilon, rngs=rngs)
            self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(self, x_BTE, angles, attend):
        batch, length, _ = x_BTE.shape
        readers = self.heads // self.groups
        heads = self.qkv(x_BTE).reshape(batch, length, self.groups, readers + 2, -1).transpose(0, 2, 3, 1, 4)
        parts = jnp.split(heads, (readers, readers + 1), axis=2)
        q, k, v = (part.reshape(batch, -1, length, part.shape[-1]) for part in parts)  # [B, H, T, D], twice [B, G, T, D]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._rotate(q, angles), self._rotate(k, angles)
        attended, kept = attend(q, k, v)  # of all positions, or of the last ones
        return self.out(attended.swapaxes(1, 2).reshape(batch, attended.shape[2], -1)), kept

    def _rotate(self, x, angles):
        if self.rotated == x.shape[-1]:
            return rotary(x, *angles)
        if not self.rotated:
            return x
        return jnp.concatenate([rotary(x[..., : self.rotated], *angles), x[..., self.rotated :]], axis=-1)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), or two layers with GELU between them (Hendrycks & Gimpel, 1606.08415).

    The columns of gate_up are pairs of parts, one of the gate and as much of up, as many as mesh.tensor can have devices.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.activation, more = config.activation, {"bias": config.mlp_bias, "rngs": rngs}
        self.pairs = mlp_pairs(config)
        if config.gated:
            self.gate_up = _linear(config.width, 2 * config.mlp, "embed", "mlp", deviation=config.width**-0.5, **more)
        else:
            self.up = _linear(config.width, config.mlp, "embed", "mlp", deviation=config.width**-0.5, **more)
        deviation = (2 * config.layers * config.mlp) ** -0.5
        self.down = _linear(config.mlp, config.width, "mlp", "embed", deviation=deviation, **more)

    def __call__(self, x_BTE):
        if self.activation != "swiglu":
            return self.down(_GELU[self.activation](self.up(x_BTE)))
        pairs = self.gate_up(x_BTE).reshape(*x_BTE.shape[:-1], self.pairs, 2, -1)
        gate, up = jnp.split(pairs, 2, axis=-2)
        return self.down((jax.nn.silu(gate) * up).reshape(*x_BTE.shape[:-1], -1))


class Block(nnx.Module):
    """Attention and MLP, each after a norm and added to the residual stream, in turn or both at once."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.parallel = config.parallel
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BTE, angles, attend, drop=lambda branch_BTE, number: branch_BTE):
        """attend: (q, k, v) -> (attended, anything to hand on), the one thing in which training and decoding differ.

        drop: what to do to the attention's branch (number 0) and the MLP's (1) before they are added.
        """
        attended, kept = self.attention(self.attention_norm(x_BTE), angles, attend)
        before = x_BTE[:, -attended.shape[1] :]
        x_BTE = before + drop(attended, 0)
        return x_BTE + drop(self.mlp(self.mlp_norm(before if self.parallel else x_BTE)), 1), kept


def mlp_pairs(config: ModelConfig) -> int:
    """Return into how many parts gate and up are cut: any number of devices divides it that divides groups and MLP."""
    return math.gcd(config.groups, config.mlp)


def column_order(config: ModelConfig) -> dict[tuple[str, str], np.ndarray]:
    """Return which column of several matrices side by side each column of ours is, int [outputs], by our module.

    (attention, qkv): of all queries, then all keys, then all values. (mlp, gate_up), if there is one: of the gate, then up.
    """
    heads, groups, features = config.heads, config.groups, config.head_dim
    number = np.arange((heads + 2 * groups) * features)
    parts = np.split(number, ((heads * features), (heads + groups) * features))
    order = {("attention", "qkv"): np.concatenate([part.reshape(groups, -1) for part in parts], axis=1).ravel()}
    if config.gated:
        halves = np.arange(2 * config.mlp).reshape(2, mlp_pairs(config), -1)
        order["mlp", "gate_up"] = halves.swapaxes(0, 1).ravel()
    return order


def init_params(config: ModelConfig, vocab_size: int, key: jax.Array) -> dict:
    """Return float32 parameters: embed [V, E], blocks (each array [L, ...]), final_norm.

    With learned positions also positions.embed [max_positions, E]; untied, output.kernel [E, V].
    """
    embed_key, block_key = jax.random.split(key)

    def one_block(key):
        block = nnx.to_pure_dict(nnx.state(Block(config, nnx.Rngs(key)), nnx.Param))
        for (part, name), order in column_order(config).items():  # a seed gives the model that it gave before this order
            block[part][name]["kernel"] = block[part][name]["kernel"][:, order]
        return block

    def table(key, *shape):
        return config.width**-0.5 * jax.random.normal(key, shape)

    params = {
        "embed": table(embed_key, vocab_size, config.width),
        "blocks": jax.vmap(one_block)(jax.random.split(block_key, config.layers)),
        "final_norm": {"scale": jnp.ones(config.width)},
    }
    if config.norm == "layer":
        params["final_norm"]["bias"] = jnp.zeros(config.width)
    if config.positions == "learned":
        params["positions"] = {"embed": table(jax.random.fold_in(key, 1), config.max_positions, config.width)}
    if not config.tied:
        params["output"] = {"kernel": table(jax.random.fold_in(key, 2), config.width, vocab_size)}
    return params


def count_params(params: dict) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig, vocab_size: int, length: int, lora: LoraConfig | None = None) -> int:
    """Return floating-point operations per trained token: 6 per weight in a matrix product, 12 H D per query-key pair.

    Under LoRA 4 per weight, whose gradient is not computed; the adapters' own products are left out.
    A token sees T / 2 tokens of its row on average, in a local layer of window W < T only W - W^2 / 2T; a pair costs 2 D a
    head for its score, as much for its value, and three times that with the backward pass.
    """
    attention = config.width * config.head_dim * 2 * (config.heads + config.groups)
    mlp = (3 if config.gated else 2) * config.width * config.mlp
    window = min(config.local_window, length)
    local = sum(config.local_layers)
    pairs = (config.layers - local) * length / 2 + local * (window - window**2 / (2 * length))
    matrices = config.layers * (attention + mlp) + vocab_size * config.width
    return (4 if lora and lora.rank else 6) * matrices + round(12 * config.heads * config.head_dim * pairs)


@functools.cache
def _block_graph(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))), nnx.Param, ...)


def _run_block(config: ModelConfig, params: dict, *args, adapters: dict | None = None, scale=None):
    graph, shapes, rest = _block_graph(config)
    state = jax.tree.map(lambda x: x, shapes)
    nnx.replace_by_pure_dict(state, params)
    block = nnx.merge(graph, state, rest)
    for part, modules in (adapters or {}).items():
        for name, pair in modules.items():  # past nnx, which would take them for parameters
            object.__setattr__(getattr(getattr(block, part), name), "adapter", (pair["lora_a"], pair["lora_b"], scale))
    return block(*args)


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """Split an activation over the mesh as the logical axis rules in force say; return it as it is where there are none.

    axes: logical axis of each dimension, None = whole; dimensions beyond them are whole too.
    """
    rules = dict(get_logical_axis_rules())
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(rules.get, axes))) if rules else x


def _normalise(x, config: ModelConfig, norm: dict):
    x32 = x.astype(jnp.float32)
    if config.norm == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normal = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + config.norm_epsilon) * norm["scale"]
    return (normal + norm["bias"] if "bias" in norm else normal).astype(x.dtype)


def _angles(config: ModelConfig, positions):
    return rotary_angles(positions, config.rotated, config.rope_base) if config.rotated else None


def _embed(params: dict, config: ModelConfig, tokens, places):
    """Return the residual stream before the first block, [..., E]. places: int32, tokens' places in their documents."""
    x = params["embed"][tokens]
    return x + params["positions"]["embed"][places] if config.positions == "learned" else x


def _spread_embed(params: dict, config: ModelConfig, tokens, segment_ids):
    """Return `_embed` of rows of packed documents, the table staying where it is.

    Each device of mesh.fsdp looks its own features up for the rows of all, and then they exchange: sent are features of
    tokens, forward and backward, in the place of the table and its gradient.
    """
    places = document_positions(segment_ids)
    if not _split():
        return _embed(params, config, tokens, places)
    tokens, places = (place(x, "copies", "sequence") for x in (tokens, places))
    return place(place(_embed(params, config, tokens, places), "copies", "sequence", "embed"), "batch", "sequence")


def output_matrix(params: dict) -> jax.Array:
    """Return the matrix [E, V] that turns features into logits: that of the output, or the embedding's transpose."""
    return params["output"]["kernel"] if "output" in params else params["embed"].T


def forward(params: dict, config: ModelConfig, tokens, segment_ids, *, dtype=jnp.float32, **more) -> jax.Array:
    """Return logits [B, T, V] in `dtype` for rows of packed documents, none of which sees another.

    tokens, segment_ids, more: as `hidden` has them; the logits of padding mean nothing.
    """
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return hidden(params, config, tokens, segment_ids, **more) @ output_matrix(params)


def hidden(
    params: dict,
    config: ModelConfig,
    tokens,
    segment_ids,
    *,
    dropout: float = 0.0,
    key=None,
    remat: str = "none",
    fused: str = "",
    interpret: bool = False,
    causal: bool = True,
    residual: jax.Array | None = None,
    normalise: bool = True,
) -> jax.Array:
    """Return the normalised features [B, T, E] that `output_matrix` turns into logits.

    params: in the dtype to compute in, with or without adapters (`models.lora`). tokens, segment_ids: int32 [B, T],
      segment 0 = padding.
    dropout: probability of each feature of the embedding and of both branches of a block, drawn from `key` (Srivastava et
      al. 2014); at 0 the program holds no draws and needs no key.
    remat: a name in REMAT, what the backward pass finds of the blocks' activations; the others it computes again.
    fused: a name in FUSED_ATTENTION that can serve this model here, "" = plain XLA; interpret: as `fused_attention` has it.
    causal: False lets each token see all of its document, which neither `fused` nor a local window does.
    residual: float [B, T, E], what the first block reads in the place of the tokens' embeddings and their positions; tokens
      then say no more than how many there are.
    normalise: False leaves out the last norm, for features that further blocks read as `residual`.
    """
    if not causal and (fused or config.local_window):
        raise ValueError("fused kernels and local windows look back alone")
    angles = _angles(config, jnp.arange(tokens.shape[1])[None])
    mask = causal_mask(segment_ids) if causal else document_mask(segment_ids)
    local_mask = causal_mask(segment_ids, config.local_window) if config.local_window else None
    blocks = 1 if jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1 else 4  # cut positions stay where they are

    adapters = params.get("adapters", {"blocks": None, "scale": None})

    def body(x, layer):
        block, is_local, key, pairs = layer

        def attend(q, k, v):
            if fused:
                return _fused(q, k, v, segment_ids, config.attention_scale, fused, interpret), None
            if not causal:
                return attention(q, k, v, mask, config.attention_scale), None
            seen = mask if is_local is None else jnp.where(is_local, local_mask, mask)
            return causal_attention(q, k, v, seen, config.attention_scale, blocks), None

        drop = lambda branch, number: _drop(branch, dropout, key, number)  # noqa: E731
        x = _settle(place(x, "batch", "sequence"))
        return _run_block(config, block, x, angles, attend, drop, adapters=pairs, scale=adapters["scale"])

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)  # a scan keeps XLA from merging the two passes
    keys = jax.random.split(jax.random.fold_in(key, 0), config.layers) if dropout else None
    is_local = jnp.array(config.local_layers) if config.local_window else None
    x = _spread_embed(params, config, tokens, segment_ids) if residual is None else residual
    x = _drop(x, dropout, key, 1)
    layers = params["blocks"], is_local, keys, adapters["blocks"]
    x, _ = jax.lax.scan(body, x, layers, unroll=remat == "none" and config.layers <= UNROLL)
    return _normalise(x, config, params["final_norm"]) if normalise else x


def _fused(q, k, v, segment_ids, scale: float, name: str, interpret: bool):
    """Run the kernel on each device's own rows and heads, where `place` splits those over a mesh."""
    run = functools.partial(fused_attention, scale=scale, name=name, interpret=interpret)
    if not (rules := dict(get_logical_axis_rules())):
        return run(q, k, v, segment_ids)
    rows, heads = rules["batch"], rules["heads"]
    split = PartitionSpec(rows, heads)
    specs = {"in_specs": (split, split, split, PartitionSpec(rows)), "out_specs": split}
    return jax.shard_map(run, **specs, axis_names={*(rows or ()), heads}, check_vma=False)(q, k, v, segment_ids)


@jax.custom_vjp
def _settle(x):
    """Return x, and have its gradient computed once.

    XLA on CPU computes a sum again in every operation that reads it, and the gradient of the residual stream is a sum over
    all later blocks: a tenth of a step at 6 layers. A quotient it computes once.
    """
    return x


def _settle_gradient(_, gradient):
    return (gradient / jax.lax.optimization_barrier(jnp.ones((), gradient.dtype)),)


_settle.defvjp(lambda x: (x, None), _settle_gradient)


def _drop(x, probability: float, key, number: int):
    """Set elements to 0 with `probability` and scale up the others; the draws are those of `number` under `key`."""
    if not probability:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - probability, x.shape)
    return jnp.where(kept, x / (1 - probability), 0).astype(x.dtype)


def unstack(params: dict, dtype=jnp.float32) -> dict:
    """Return the parameters as `prefill` and `decode` read them: in `dtype`, blocks as a tuple with a dict for each layer.

    Taken apart once, outside the loop over tokens: sliced in it, every weight is copied for every token. The output's matrix
    is in them for tied embeddings too, as CPU products of a few rows take twice as long with one that is read across.
    """
    params = jax.tree.map(lambda x: x.astype(dtype), merge(params))
    params = params | {"output": {"kernel": output_matrix(params)}}
    layers = len(jax.tree.leaves(params["blocks"])[0])
    return params | {"blocks": tuple(jax.tree.map(lambda p, n=n: p[n], params["blocks"]) for n in range(layers))}


def prefill(params: dict, config: ModelConfig, tokens, valid, *, cache_length: int):
    """Read left-padded prompts and return the logits of their last token [B, V] and the Cache of length S.

    params: from `unstack`. tokens: int32 [B, P]; valid: bool [B, P], False on the padding at the left. cache_length: S >= P.
    """
    batch, length = tokens.shape
    angles = _angles(config, jnp.arange(length)[None])
    segment_ids = valid.astype(jnp.int32)
    masks = {local: causal_mask(segment_ids, config.local_window * local) for local in set(config.local_layers)}
    room = ((0, 0), (0, 0), (0, cache_length - length), (0, 0))

    def attend(q, k, v, queries, mask):
        kept = tuple(place(jnp.pad(x, room), "batch", "heads") for x in (k, v))
        return attention(q[:, :, -queries:], k, v, mask[:, -queries:], config.attention_scale), kept

    x = place(_embed(params, config, tokens, document_positions(segment_ids)), "batch")
    caches = []
    for number, (block, local) in enumerate(zip(params["blocks"], config.local_layers, strict=True), 1):
        queries = length if number < config.layers else 1  # of the last block, only the last position is needed
        reader = functools.partial(attend, queries=queries, mask=masks[local])
        x, kept = _run_block(config, block, x, angles, reader)
        caches.append(kept)
    return _normalise(x[:, -1], config, params["final_norm"]) @ output_matrix(params), Cache(*zip(*caches, strict=True))


def decode(params: dict, config: ModelConfig, token, at, valid, cache: Cache):
    """Read one token a row, at cache position `at`, and return the logits [B, V] and the new Cache.

    params: from `unstack`. token: int32 [B]; at: int32 scalar; valid: bool [B, S], which cache positions hold text once this
    token is in.
    """
    angles = _angles(config, jnp.reshape(at, (1, 1)))
    near = jnp.arange(valid.shape[1]) > at - config.local_window
    masks = {local: valid & near if local else valid for local in set(config.local_layers)}

    def attend(q, k, v, old, mask):
        # A pair of arrays a layer: XLA writes each in place, where a scan over layers would copy all of it.
        kept = tuple(jax.lax.dynamic_update_slice(x, new, (0, 0, at, 0)) for x, new in zip(old, (k, v), strict=True))
        kept = tuple(place(x, "batch", "heads") for x in kept)
        return _attend_one(q, *kept, mask, config.attention_scale), kept

    x = _embed(params, config, token, jnp.sum(valid, axis=1) - 1)[:, None]
    caches = []
    for block, local, *old in zip(params["blocks"], config.local_layers, *cache, strict=True):
        x, kept = _run_block(config, block, x, angles, functools.partial(attend, old=old, mask=masks[local]))
        caches.append(kept)
    return _normalise(x[:, 0], config, params["final_norm"]) @ output_matrix(params), Cache(*zip(*caches, strict=True))


def _attend_one(q, k, v, valid, scale: float):
    """Attend with one query a row. q: [B, H, 1, D]; k, v: [B, G, S, D]; valid: bool [B, S]. Returns [B, H, 1, D]."""
    if q.shape[1] > k.shape[1]:
        return attention(q, k, v, valid[:, None], scale)
    # the plain case without an axis of length 1
    scores = jnp.einsum("bhd,bhsd->bhs", q[:, :, 0], k, preferred_element_type=jnp.float32) * (scale or q.shape[-1] ** -0.5)
    weights = jax.nn.softmax(jnp.where(valid[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhs,bhsd->bhd", weights.astype(v.dtype), v)[:, :, None]
