"""The least time that a train step can take: what it computes, moves and sends, against what a chip can (docs/plan.md)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from rmft_jax.config import Config
from rmft_jax.models.gpt import LOGICAL_AXES, UNROLL, flops_per_token, init_params
from rmft_jax.training.losses import DTYPES
from rmft_jax.training.memory import Memory
from rmft_jax.training.mesh import AXES, RULES, mesh_sizes


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do, by its maker.

    flops: a second, dense, bfloat16. memory: bytes. bandwidth: bytes a second of its memory. link: bytes a second that it
    sends over all links to chips of its group, TPU slice or GPU node, of at most `group` chips; network: to other groups.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    group: int
    network: float


# Cloud TPU's system architecture pages and NVIDIA's data sheet of the H100 SXM, in nodes with one 400 Gb/s adapter a GPU.
CHIPS = {
    "v5e": Chip(197e12, 16e9, 800e9, 200e9, 256, 3.125e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6144, 6.25e9),
    "v6e": Chip(918e12, 32e9, 1600e9, 400e9, 256, 12.5e9),
    "h100": Chip(989.4e12, 80e9, 3350e9, 450e9, 8, 50e9),
}

# What `expected_bytes` names, and the kind of collective that sends it.
KINDS = {
    "weights": "all-gather",
    "gradients": "all-reduce",
    "features": "all-to-all",
    "activations": "all-reduce",
    "keys and values": "all-gather",
    "their gradients": "all-reduce",
}


def step_time(config: Config, vocab_size: int, memory: Memory, devices: int, chip: Chip) -> dict:
    """Return the least seconds of a train step on so many chips, by the formulas of docs/plan.md.

    Returns seconds (of compute, memory, update, weights, gradients, activations, `keys and values`, features), step_seconds,
    tokens_per_second, mfu, and bound, the part that takes longest.
    """
    sizes, training = mesh_sizes(config.mesh, devices), config.training
    tokens = training.batch_size * training.sequence_length
    flops = tokens * flops_per_token(config.model, vocab_size, training.sequence_length, config.lora)
    again = 4 / 3 if training.remat == "full" else 1.0
    sent = expected_bytes(config, devices)
    replica, fsdp, tensor, context = (sizes[name] for name in ("replica", "fsdp", "tensor", "context"))
    held, element = _held(config, sizes), training.accumulation * jnp.dtype(DTYPES[training.dtype]).itemsize
    summed = element * (sum(held.values()) - held["looked up"])
    shared = (summed + element * held["looked up"]) / fsdp
    seconds = {
        "compute": again * flops / devices / chip.flops,
        "memory": _moved(config, vocab_size, memory, sizes) / chip.bandwidth,
        "update": 2 * _updated(memory) / chip.bandwidth,
        "weights": _gather(sent["weights"], fsdp, tensor * context, chip),
        "gradients": _gather(summed, fsdp, tensor * context, chip)
        + 2 * _gather(shared, replica, fsdp * tensor * context, chip)
        + 2 * _gather(shared, context, 1, chip),
        "activations": 2 * _gather(sent["activations"], tensor, context, chip),
        "keys and values": _gather(sent["keys and values"] + sent["their gradients"], context, 1, chip),
        "features": _exchange(sent["features"], fsdp, tensor * context, chip),
    }
    beside = max(seconds["compute"], seconds["memory"], seconds["weights"] + seconds["gradients"])
    total = beside + sum(seconds[name] for name in ("update", "activations", "keys and values", "features"))
    return {
        "seconds": seconds,
        "step_seconds": total,
        "tokens_per_second": tokens / total,
        "mfu": flops / (total * devices * chip.flops),
        "bound": max(seconds, key=seconds.get),
    }


def _moved(config: Config, vocab_size: int, memory: Memory, sizes: dict[str, int]) -> float:
    """Return the bytes that the loss and its gradient move between a chip and its memory."""
    training, kept = config.training, memory.phases["backward"]
    width = jnp.dtype(DTYPES[training.dtype]).itemsize
    rows = training.batch_size / training.accumulation / (sizes["replica"] * sizes["fsdp"])
    logits = rows * training.sequence_length / sizes["context"] * vocab_size / sizes["tensor"] * (4 + width)
    held = _held(config, sizes)
    weights = (sum(held.values()) - held["output"] * config.model.tied) * width
    return training.accumulation * (3 * weights + 2 * (kept["activations"] + kept["attention scores"] + logits))


def _updated(memory: Memory) -> int:
    arguments = memory.arguments
    trained = arguments["adapters"] or arguments["parameters"]
    return trained + arguments["optimizer"] + arguments["average of the weights"] + memory.phases["update"]["gradients"]


def _gather(size: float, count: int, stride: int, chip: Chip) -> float:
    """Return the seconds in which `count` chips, `stride` apart, come to hold all of an array of `size` bytes that is spread
    over them, or sum it so that it is spread; first between groups, then within each."""
    inner, outer = _near(count, stride, chip)
    return size * (1 - 1 / inner) / chip.link + size / inner * (1 - 1 / outer) / chip.network


def _exchange(size: float, count: int, stride: int, chip: Chip) -> float:
    """Return the seconds in which `count` chips, `stride` apart, send each other equal parts of `size` bytes."""
    inner, outer = _near(count, stride, chip)
    return size * (1 - 1 / inner) / outer / chip.link + size * (1 - 1 / outer) / chip.network


def _near(count: int, stride: int, chip: Chip) -> tuple[int, int]:
    """Return how many of `count` chips, `stride` apart, are in one group, and in how many groups all are."""
    inner = min(count, max(1, chip.group // stride))
    return inner, math.ceil(count / inner)


def _held(config: Config, sizes: dict[str, int]) -> dict[str, int]:
    """Return the parameters that a device has of the whole ones by mesh.tensor: matrices of blocks, which mesh.fsdp splits
    further, vectors, the output matrix, and what is looked up: embedding, which may be the same, and learned positions."""
    params = jax.eval_shape(lambda: init_params(config.model, config.tokenizer.vocab_size, jax.random.key(0)))
    held = dict.fromkeys(("matrices", "vectors", "output", "looked up"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(key.key for key in path)
        axes = next(axes for suffix, axes in LOGICAL_AXES.items() if names[-len(suffix) :] == suffix)
        size = leaf.size // (sizes["tensor"] if any(RULES.get(axis) == "tensor" for axis in axes if axis) else 1)
        if names[-1] == "embed":
            held["looked up"] += size
        elif names[0] == "output":
            held["output"] += size
        else:
            held["matrices" if "embed" in axes else "vectors"] += size
        if names == ("embed",) and config.model.tied:
            held["output"] += size
    return held


def expected_bytes(config: Config, devices: int) -> dict[str, int]:
    """Return what a step has to send over a mesh by the rules of `training.mesh`: bytes a device, as `collectives` counts.

    With r, f, t, c devices along replica, fsdp, tensor, context; w bytes an element; L blocks of N parameters, of which a
    device has N / t (but norms whole); an embedding and an output matrix, the same or not, of V E each; A microbatches of n
    tokens for each device. Sums over several axes go from one to the next, and are n/f where fsdp has split them:
      weights, f > 1: each block gathered for the forward pass and again for the backward pass, the output matrix once, as it
        stays the same: (A 2 L N + V E) w / t (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3). Up to models.gpt.UNROLL
        blocks without remat are no loop, and XLA then gathers them once for all microbatches
      gradients, r f c > 1: summed over the devices that have other tokens. Of the blocks S L N, of the output V E, of the
        embedding, whose features each device of fsdp has for the rows of all, (S - [f > 1]) V E; each A w / t, with
        S = [f > 1] + [r > 1] / f + [c > 1] / f, but of blocks 1 + [r c > 1] / f where f > 1: there r and c are one sum
      features, f > 1: of the tokens' embeddings, exchanged for rows, and their gradients back: 2 A n E w
      activations, t > 1: a sum after attention and MLP, forward and backward (Shoeybi et al. 2019, arXiv 1909.08053), after
        attention once more where remat full computes it again for what follows; one for the embedding and one for the
        gradient of the output's features: A (4 L + 2) n E w, and of the softmax three numbers a token: 12 A n
      keys and values, c > 1: gathered forward, and again backward where the blocks are a loop: A 2 L n c G D w / t
      their gradients, c > 1: summed backward: A 2 L n c G D w / t
    Those are of adamw and lion, which send nothing but a few sums for the norm.
    """
    sizes, model, training = mesh_sizes(config.mesh, devices), config.model, config.training
    width, times = jnp.dtype(DTYPES[training.dtype]).itemsize, training.accumulation
    replica, fsdp, tensor, context = (sizes[name] for name in AXES)
    held, split = _held(config, sizes), fsdp > 1
    tokens = training.batch_size // times // (replica * fsdp) * training.sequence_length // context
    keys = 2 * model.layers * tokens * context * model.groups * model.head_dim // tensor
    over, whole = (replica > 1) + (context > 1), devices > tensor
    looped = training.remat != "none" or model.layers > UNROLL
    of_blocks = 1 + (over > 0) / fsdp if split else over
    summed = of_blocks * held["matrices"] + whole * (held["output"] + held["vectors"])
    sums = (4 + (training.remat == "full" and not model.parallel)) * model.layers + 2
    return {
        "weights": split * ((times if looped else 1) * 2 * held["matrices"] + held["output"]) * width,
        "gradients": times * int(summed + over * held["looked up"] / fsdp) * width,
        "features": split * times * 2 * tokens * model.width * width,
        "activations": (tensor > 1) * times * (sums * tokens * model.width * width + 12 * tokens),
        "keys and values": (context > 1) * times * (1 + looped) * keys * width,
        "their gradients": (context > 1) * times * keys * width,
    }


def expected_kinds(expected: dict[str, int]) -> dict[str, int]:
    """Return the bytes of `expected_bytes` by the kind of collective that sends them, of those that send anything.

    A sum whose result is split over the devices is an all-reduce here, as on CPU; where XLA has a reduce-scatter, that is
    given as many bytes.
    """
    kinds: dict[str, int] = {}
    for name, size in expected.items():
        if size:
            kinds[KINDS[name]] = kinds.get(KINDS[name], 0) + size
    return kinds
