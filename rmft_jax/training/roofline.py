"""The least time that a train step can take: what it computes, moves and sends, against what a chip can (docs/plan.md)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from rmft_jax.config import Config
from rmft_jax.models.gpt import flops_per_token, init_params
from rmft_jax.training.losses import DTYPES
from rmft_jax.training.memory import Memory
from rmft_jax.training.mesh import mesh_sizes


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


def step_time(config: Config, vocab_size: int, memory: Memory, devices: int, chip: Chip) -> dict:
    """Return the least seconds of a train step on so many chips, by the formulas of docs/plan.md.

    Returns seconds (of compute, memory, update, weights, gradients, activations, `keys and values`), step_seconds,
    tokens_per_second, mfu, and bound, the part that takes longest.
    """
    sizes, training = mesh_sizes(config.mesh, devices), config.training
    tokens = training.batch_size * training.sequence_length
    flops = tokens * flops_per_token(config.model, vocab_size, training.sequence_length, config.lora)
    again = 4 / 3 if training.remat == "full" else 1.0
    sent = expected_bytes(config, devices)
    replica, fsdp, tensor, context = (sizes[name] for name in ("replica", "fsdp", "tensor", "context"))
    shared = sent["gradients"] / fsdp
    seconds = {
        "compute": again * flops / devices / chip.flops,
        "memory": _moved(config, vocab_size, memory, sizes) / chip.bandwidth,
        "update": 2 * _updated(memory) / chip.bandwidth,
        "weights": _gather(sent["weights"], fsdp, tensor * context, chip),
        "gradients": _gather(sent["gradients"], fsdp, tensor * context, chip)
        + 2 * _gather(shared, replica, fsdp * tensor * context, chip)
        + 2 * _gather(shared, context, 1, chip),
        "activations": 2 * _gather(sent["activations"], tensor, context, chip),
        "keys and values": _gather(sent["keys and values"], context, 1, chip),
    }
    beside = max(seconds["compute"], seconds["memory"], seconds["weights"] + seconds["gradients"])
    total = beside + seconds["update"] + seconds["activations"] + seconds["keys and values"]
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
    weights = _count(config)[1] * width / sizes["tensor"]
    return training.accumulation * (3 * weights + 2 * (kept["activations"] + kept["attention scores"] + logits))


def _updated(memory: Memory) -> int:
    arguments = memory.arguments
    trained = arguments["adapters"] or arguments["parameters"]
    return trained + arguments["optimizer"] + arguments["average of the weights"] + memory.phases["update"]["gradients"]


def _gather(size: float, count: int, stride: int, chip: Chip) -> float:
    """Return the seconds in which `count` chips, `stride` apart, come to hold all of an array of `size` bytes that is spread
    over them, or sum it so that it is spread; first between groups, then within each."""
    inner = min(count, max(1, chip.group // stride))
    outer = math.ceil(count / inner)
    return size * (1 - 1 / inner) / chip.link + size / inner * (1 - 1 / outer) / chip.network


def _count(config: Config) -> tuple[int, int]:
    """Return the parameters of the blocks, and of everything."""
    params = jax.eval_shape(lambda: init_params(config.model, config.tokenizer.vocab_size, jax.random.key(0)))
    blocks, everything = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params["blocks"], params))
    return blocks, everything


def expected_bytes(config: Config, devices: int) -> dict[str, int]:
    """Return what a step has to send over a mesh by the rules of `training.mesh`: bytes a device, as `collectives` counts.

    With r, f, t, c devices along replica, fsdp, tensor, context; w bytes an element; L blocks of N parameters, an output
    matrix of O, P parameters in all; A microbatches of B rows of T tokens for each group of devices that shares rows:
      weights, f > 1: each block gathered for the forward pass and again for the backward pass, the output matrix once:
        A (2 L N + O) w / t (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3)
      gradients, r f c > 1: summed over the devices that have other tokens, A P w / t
      activations, t > 1: a sum after attention and MLP, forward and backward (Shoeybi et al. 2019, arXiv 1909.08053), the
        forward ones twice under remat full, and one each for the embedding and the output: A (4 L + 2) B T E w / c
      keys and values, c > 1: gathered forward, their gradients summed backward: A 4 L B T G D w / t
    """
    sizes, model, training = mesh_sizes(config.mesh, devices), config.model, config.training
    width, times = jnp.dtype(DTYPES[training.dtype]).itemsize, training.accumulation
    blocks, everything = _count(config)
    rows = training.batch_size // times // (sizes["replica"] * sizes["fsdp"])
    tensor, tokens, again = sizes["tensor"], rows * training.sequence_length, training.remat == "full"
    output = config.tokenizer.vocab_size * model.width
    sums = (4 + 2 * again) * model.layers + 2
    keys = tokens * model.groups * model.head_dim
    return {
        "weights": (sizes["fsdp"] > 1) * times * (2 * blocks + output) * width // tensor,
        "gradients": (devices > tensor) * times * everything * width // tensor,
        "activations": (tensor > 1) * times * sums * tokens // sizes["context"] * model.width * width,
        "keys and values": (sizes["context"] > 1) * times * (4 + 2 * again) * model.layers * keys * width // tensor,
    }
