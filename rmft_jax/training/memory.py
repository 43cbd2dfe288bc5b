"""How many bytes of a device a train step takes: reckoned from shapes alone, so that no device is needed. docs/plan.md.

What the backward pass keeps is not guessed: JAX traces the loss without computing anything and says which arrays it saves.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from rmft_jax.config import Config, MeshConfig
from rmft_jax.errors import UserError
from rmft_jax.kernels import MaskedBatch, SurrogateBank, TaggedBatch
from rmft_jax.models.gpt import _UNROLL, init_params
from rmft_jax.training.losses import DTYPES, weighted_loss
from rmft_jax.training.mesh import batch_sharding, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.step import init_state

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Shapes of what a step is given besides its state. identities: of the data, each a byte of the state.

    components, spans: slots of a row. bank: of the surrogates, arrays or their shapes.
    """

    vocab_size: int
    identities: int
    components: int
    spans: int
    bank: SurrogateBank


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    arguments: what a step is given and hands on: parameters, optimizer, average (of early-learning regularization), batch.
    temporaries: what lives within a step, by name. Not all of it lives at once: `temp` is the most that does.
    """

    arguments: dict[str, int]
    temporaries: dict[str, int]
    temp: int
    certain_temp: int

    @property
    def total(self) -> int:
        """Return the bytes of a step as it is reckoned."""
        return sum(self.arguments.values()) + self.temp

    @property
    def certain(self) -> int:
        """Return the bytes below which no compiler gets: the arguments, and the gradients, whose norm needs them all."""
        return sum(self.arguments.values()) + self.certain_temp


def bytes_of(text: str | float) -> int:
    """Return the number of bytes that "80GB" (10^9), "80GiB" (2^30) or "16e9" means. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*([kKmMgGtT]?[iI]?[bB]?)\s*", str(text))
    try:
        size = float(found[1]) * UNITS[found[2].upper()]
    except (TypeError, KeyError, ValueError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise UserError(f"memory size {text!r} is not one: write bytes or a unit, such as 80GB, 80GiB or 16e9")
    return int(size)


def say_bytes(size: float) -> str:
    """Return a size in the unit of 10^3, 10^6, ... that fits it, such as 1.24 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError


def abstract_state(config: Config, inputs: Inputs, mesh: Mesh | AbstractMesh, *, steps: int = 1000) -> tuple[dict, dict]:
    """Return the shapes of the train state and their shardings. steps: of the run, which change no shape."""
    optimizer = make_optimizer(config.training, steps)
    shapes = jax.eval_shape(lambda: init_state(config, inputs.vocab_size, inputs.identities, optimizer))
    return shapes, shardings_for(shapes, mesh)


def abstract_batch(config: Config, inputs: Inputs) -> TaggedBatch:
    """Return the shapes of a batch: as the loader cuts it, int32."""
    rows, width = config.training.batch_size, config.training.sequence_length - config.masking.margin + 1
    lengths = {"tokens": width, "segment_ids": width, "component": width}

    def shape(name: str) -> tuple[int, ...]:
        if name == "epoch":
            return (rows,)
        slots = inputs.components if name.startswith("component") else inputs.spans
        return rows, lengths.get(name, slots)

    return TaggedBatch(**{name: jax.ShapeDtypeStruct(shape(name), jnp.int32) for name in TaggedBatch._fields})


def estimate(config: Config, inputs: Inputs, mesh: Mesh | AbstractMesh) -> Memory:
    """Return the memory of one device for the step of `rmft train`, by the formulas of docs/plan.md.

    mesh: real or abstract; its shape alone counts, and everything must divide it (see `mesh.check_mesh`).
    """
    sizes, training = dict(mesh.shape), config.training
    shapes, shardings = abstract_state(config, inputs, mesh)
    batch = abstract_batch(config, inputs)
    arguments = {
        "parameters": shard_bytes(shapes["params"], shardings["params"]),
        "optimizer": shard_bytes(shapes["optimizer"], shardings["optimizer"]),
        "average": shard_bytes(shapes.get("average", ()), shardings.get("average", ())),
        "batch": shard_bytes(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch)) * training.steps_per_dispatch
        + shard_bytes(inputs.bank, jax.tree.map(lambda _: replicated(mesh), inputs.bank))
        + sum(shard_bytes(shapes[name], shardings[name]) for name in ("seen", "step", "guard")),
    }
    rows = training.batch_size // training.accumulation // (sizes["replica"] * sizes["fsdp"])
    scores, activations = _kept(config, inputs.vocab_size, rows, sizes)
    block = sum(_kept(_changed(config, remat="none"), inputs.vocab_size, rows, sizes)) // config.model.layers
    parameters, width = arguments["parameters"], jnp.dtype(DTYPES[training.dtype]).itemsize
    share = lambda bytes: bytes * width // 4  # noqa: E731
    tokens, vocab = rows * training.sequence_length // sizes["context"], inputs.vocab_size // sizes["tensor"]
    split, narrow = sizes["fsdp"] > 1, width < 4
    output = config.model.width * vocab
    of_blocks = shard_bytes(shapes["params"]["blocks"], shardings["params"]["blocks"]) // config.model.layers
    largest = max(shard_bytes(*pair) for pair in zip(*map(jax.tree.leaves, (shapes["params"], shardings["params"]))))
    temporaries = {
        "gradients": (training.accumulation > 1) * parameters + share(parameters),
        "weights in bfloat16": narrow * share(parameters),
        "activations": activations,
        "attention scores": scores,
        "logits": min(training.loss_chunk or tokens, tokens) * vocab * (4 + width) + output * (split * width + narrow * 4),
        "one block": block + split * 2 * sizes["fsdp"] * share(of_blocks),
        "update": parameters + largest,
    }
    within = temporaries["activations"] + temporaries["attention scores"] + max(temporaries["logits"], temporaries["one block"])
    looped = training.remat != "none" or config.model.layers > _UNROLL
    backward = temporaries["weights in bfloat16"] + within + looped * temporaries["gradients"]
    certain = parameters if training.accumulation > 1 else share(parameters)
    return Memory(arguments, temporaries, max(backward, parameters + temporaries["update"]), certain)


def shard_bytes(shapes, shardings) -> int:
    """Return the bytes of a device of arrays (or shapes) under shardings, two trees alike."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def _changed(config: Config, **training) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def _kept(config: Config, vocab_size: int, rows: int, sizes: dict[str, int]) -> tuple[int, int]:
    """Return the bytes of attention scores and of all else that the backward pass of `rows` rows finds on a device.

    The trace is of a model as narrow as a device's share under mesh.tensor: its heads, its part of the MLP and vocabulary.
    """
    model, tensor, length = config.model, sizes["tensor"], config.training.sequence_length
    part = {"heads": model.heads // tensor, "kv_heads": model.groups // tensor, "mlp_width": model.mlp // tensor}
    local = dataclasses.replace(model, **part, head_width=model.head_dim)
    config = dataclasses.replace(config, model=local, mesh=MeshConfig())
    dtype = DTYPES[config.training.dtype]
    params = jax.eval_shape(lambda: init_params(local, vocab_size // tensor, jax.random.key(0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    row = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32)
    masked = MaskedBatch(row, row, row, row, None, None)
    weights = jax.ShapeDtypeStruct((rows, length), bool)
    more = {"key": jax.random.key(0)} if config.training.dropout else {}
    average = params if config.loss.elr_weight else None

    def backward(params, average, masked, weights):
        return jax.vjp(lambda p: weighted_loss(p, config, masked, weights, average=average, **more)[0], params)[1]

    jaxpr = jax.make_jaxpr(backward)(params, average, masked, weights).jaxpr
    kept = {id(x): x.aval for x in jaxpr.outvars if x not in set(jaxpr.invars)}.values()
    scores = [x for x in kept if x.ndim > 3 and x.shape[-2:] == (length, length)]
    everything = sum(x.size * x.dtype.itemsize for x in kept)
    scores = sum(x.size * x.dtype.itemsize for x in scores)
    return scores // sizes["context"], (everything - scores) // sizes["context"]
