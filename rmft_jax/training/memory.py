"""How many bytes of a device a train step takes: reckoned from shapes alone, so that no device is needed (docs/plan.md).

What the backward pass keeps is not guessed: JAX traces the loss, without computing anything, and names the arrays it saves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from rmft_jax.config import Config, LossConfig, ModelConfig, TrainingConfig
from rmft_jax.data.blocks import Blocks
from rmft_jax.data.loader import Mixture
from rmft_jax.data.prepare import Prepared
from rmft_jax.errors import UserError
from rmft_jax.kernels import MaskedBatch, SurrogateBank, TaggedBatch, top_targets
from rmft_jax.models.gpt import UNROLL, init_params
from rmft_jax.training.losses import DTYPES, weighted_loss
from rmft_jax.training.mesh import batch_sharding, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.step import init_state

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the data say of the shapes of a step.

    vocab_size: of the tokenizer. identities: PII values, each a byte of the state. components, spans: slots of a row.
    bank: of the surrogates, arrays or their shapes. blocks: of training text, 0 = not known: what loss.elr_top keeps of each
    is not counted then.
    """

    vocab_size: int
    identities: int
    components: int
    spans: int
    bank: SurrogateBank
    blocks: int = 0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, by name.

    arguments: what a step is given, and hands on in the same place. phases: what else lives in the loss, the backward pass
    and the update; the largest of the three counts. certain: below which no compiler gets, the arguments and all gradients
    at once, as the norm of the gradient needs them.
    """

    arguments: dict[str, int]
    phases: dict[str, dict[str, int]]
    certain: int

    @property
    def peak(self) -> str:
        """Return the phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def temp(self) -> int:
        """Return the bytes of what lives within the step only."""
        return sum(self.phases[self.peak].values())

    @property
    def total(self) -> int:
        """Return the bytes of a step."""
        return sum(self.arguments.values()) + self.temp

    @property
    def terms(self) -> dict[str, int]:
        """Return all that lives at the peak, the largest first."""
        terms = self.arguments | self.phases[self.peak]
        return {name: size for name, size in sorted(terms.items(), key=lambda item: -item[1]) if size}


def inputs_of(prepared: Prepared, blocks: Blocks | Mixture) -> Inputs:
    """Return the shapes that prepared data and their training blocks give a step."""
    tokenizer = prepared.tokenizer
    slots = blocks.max_components, blocks.max_spans
    return Inputs(tokenizer.vocab_size, prepared.identities, *slots, prepared.bank, len(blocks))


def parse_bytes(text: str) -> int:
    """Return the number of bytes that 80GB (10^9), 80GiB (2^30) or 16e9 means. Raises UserError for anything else."""
    found = re.fullmatch(r"([0-9.]+(?:e[+-]?\d+)?) *([kmgt]?i?b)?", text.strip(), re.IGNORECASE)
    try:
        size = float(found[1]) * _UNITS[(found[2] or "").upper()]
    except (TypeError, KeyError, ValueError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise UserError(f"{text!r} is no amount of memory: write bytes, or a unit too, such as 80GB, 80GiB or 16e9")
    return int(size)


def say_bytes(size: float) -> str:
    """Return bytes in the decimal unit that suits them, such as 1.24 GB."""
    power = min(4, int(math.log(max(size, 1), 1000) + 1e-9))
    return f"{size / 1000**power:.{3 if power else 4}g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def describe_memory(memory: Memory, limit: int) -> str:
    """Return one line on the memory of a device that has `limit` bytes, such as `train` prints."""
    terms = ", ".join(f"{name} {say_bytes(size)}" for name, size in memory.terms.items() if 100 * size >= memory.total)
    return f"memory of a device: about {say_bytes(memory.total)} of {say_bytes(limit)} ({terms}); see rmft plan"


def abstract_state(config: Config, inputs: Inputs, mesh: Mesh | AbstractMesh) -> tuple[dict, dict]:
    """Return the shapes of the train state and their shardings."""
    optimizer = make_optimizer(config.training, 1)  # the number of steps changes no shape
    sizes = config, inputs.vocab_size, inputs.identities, optimizer
    shapes = jax.eval_shape(lambda: init_state(*sizes, blocks=inputs.blocks))
    return shapes, shardings_for(shapes, mesh)


def abstract_batch(config: Config, inputs: Inputs) -> TaggedBatch:
    """Return the shapes of a batch as the loader cuts it, int32."""
    rows, width = config.training.batch_size, config.training.sequence_length - config.masking.margin + 1

    def shape(name: str) -> tuple[int, ...]:
        if name in ("tokens", "segment_ids", "component", "tag"):
            return rows, width
        if name in ("epoch", "example"):
            return (rows,)
        return (rows, inputs.components if name.startswith("component") else inputs.spans)

    return TaggedBatch(**{name: jax.ShapeDtypeStruct(shape(name), jnp.int32) for name in TaggedBatch._fields})


def estimate(config: Config, inputs: Inputs, mesh: Mesh | AbstractMesh) -> Memory:
    """Return the memory of one device for the step of `rmft train`, by the formulas of docs/plan.md.

    mesh: real or abstract; only its shape counts, and everything must divide it (`mesh.check_mesh`).
    """
    sizes, training, model = dict(mesh.shape), config.training, config.model
    shapes, shardings = abstract_state(config, inputs, mesh)
    held = {name: _shard_bytes(shapes[name], shardings[name]) for name in shapes}
    batch = abstract_batch(config, inputs)
    arguments = {
        "parameters": held["params"],
        "optimizer": held["optimizer"],
        "adapters": held.get("adapters", 0),
        "average of the weights": held.get("average", 0),
        "tracker": held.get("tracker", 0),
        "batch and surrogates": _shard_bytes(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
        * training.steps_per_dispatch
        + _shard_bytes(inputs.bank, jax.tree.map(lambda _: replicated(mesh), inputs.bank))
        + held["seen"] + held["step"] + held["guard"],
    }  # fmt: skip
    width, trained = jnp.dtype(DTYPES[training.dtype]).itemsize, held.get("adapters", held["params"])
    narrow, accumulates, split = width < 4, training.accumulation > 1, sizes["fsdp"] > 1
    private = config.privacy.on  # which takes a gradient of each row, privacy.microbatch rows at a time
    at_once = private and config.privacy.microbatch or training.batch_size // training.accumulation
    rows = max(1, at_once // (sizes["replica"] * sizes["fsdp"]))
    tokens, vocab = rows * training.sequence_length // sizes["context"], inputs.vocab_size // sizes["tensor"]
    chunk, output = min(training.loss_chunk or tokens, tokens), model.width * vocab
    saved = functools.partial(_saved, model, config.loss, inputs.vocab_size, rows, sizes["tensor"], sizes["context"])
    shaping = ("sequence_length", "dtype", "dropout", "loss_chunk", "remat", "attention")
    what = {name: getattr(training, name) for name in shaping}
    scores, activations = saved(**what)
    block = sum(saved(**what | {"remat": "none"})) // model.layers
    of_block = _shard_bytes(shapes["params"]["blocks"], shardings["params"]["blocks"]) * width // 4 // model.layers
    looped = training.remat != "none" or model.layers > UNROLL  # a loop sets room aside for all of its gradients at once
    gradients = trained * width // 4
    summed = (accumulates or private) * trained + (rows if private else looped) * gradients
    kept = {
        "weights in bfloat16": narrow * held["params"] * width // 4,
        "activations": activations,
        "attention scores": scores,
    }
    phases = {
        "loss": kept | {
            "gradients": summed,
            "logits": chunk * vocab * (4 + width) + output * (split * width + 4 * narrow + 4 * (chunk < tokens)),
        },
        "backward": kept | {
            "gradients": summed,
            "one block": block + split * 2 * sizes["fsdp"] * of_block,
        },
        "update": {"gradients": trained, "update": trained + _in_flight(training.optimizer, shapes, shardings)},
    }  # fmt: skip
    certain = sum(arguments.values()) + (trained if accumulates else gradients)
    return Memory(arguments, phases, certain)


def _in_flight(optimizer: str, shapes: dict, shardings: dict) -> int:
    """Return the bytes of moments that are written anew while the old ones are still read: measured, see docs/plan.md."""
    part = "adapters" if "adapters" in shapes else "params"
    leaves = zip(jax.tree.leaves(shapes[part]), jax.tree.leaves(shardings[part]), strict=True)
    return 0 if optimizer == "adafactor" else max(_shard_bytes(*leaf) for leaf in leaves) * 3 // 2


def _shard_bytes(shapes, shardings) -> int:
    """Return the bytes that a device holds of arrays, or of their shapes, under a tree of shardings like theirs."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


@functools.lru_cache(maxsize=1024)
def _saved(
    model: ModelConfig, loss: LossConfig, vocab_size: int, rows: int, tensor: int, context: int, **training
) -> tuple[int, int]:
    """Return the bytes of attention scores, and of all else, that a device saves of `rows` rows for the backward pass.

    Traced is a model as narrow as a device's share under mesh.tensor: its heads, its part of the MLP and the vocabulary.
    """
    heads = {"heads": model.heads // tensor, "kv_heads": model.groups // tensor, "head_width": model.head_dim}
    model = dataclasses.replace(model, **heads, mlp_width=model.mlp // tensor)
    config = Config(model=model, loss=loss, training=TrainingConfig(**training))
    length, dtype = config.training.sequence_length, DTYPES[config.training.dtype]
    params = jax.eval_shape(lambda: init_params(model, vocab_size // tensor, jax.random.key(0)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    average = params if loss.elr_weight else None
    if loss.elr_top:
        average = jax.eval_shape(lambda: top_targets((rows, length, loss.elr_top)))
    row = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32)
    masked = MaskedBatch(row, row, row, row, None, None)
    weights = jax.ShapeDtypeStruct((rows, length), bool)

    def backward(params, average, masked, weights):
        key = jax.random.key(0) if config.training.dropout else None
        return jax.vjp(lambda params: weighted_loss(params, config, masked, weights, average=average, key=key)[0], params)[1]

    program = jax.make_jaxpr(backward)(params, average, masked, weights).jaxpr
    given = {id(variable) for variable in program.invars}
    saved = {id(variable): variable.aval for variable in program.outvars if id(variable) not in given}
    scores, rest, quarter = 0, 0, length // 4  # queries of a quarter of the row are scored at a time
    for x in saved.values():
        of_block = x.ndim == 5 and x.shape[-2] == quarter and x.shape[-1] % quarter == 0  # of all layers
        if of_block or (x.ndim == 5 and x.shape[-2:] == (length, length)):
            scores += x.size * x.dtype.itemsize
        else:
            rest += x.size * x.dtype.itemsize
    return scores // context, rest // context
