"""What a compiled step sends between devices is what the sharding rules ask for, by kind of collective, on every mesh."""

import math

import jax
import pytest

from rmft_jax.config import load_config
from rmft_jax.training.collectives import collectives
from rmft_jax.training.plan import assumed_inputs, compile_step
from rmft_jax.training.roofline import expected_bytes, expected_kinds

SMALL = ["model.layers=2", "model.width=64", "model.heads=4", "tokenizer.vocab_size=512", "masking.surrogates=16",
         "training.batch_size=8", "training.sequence_length=64", "mesh.replica=1", "out=/nowhere"]  # fmt: skip
FAST = [
    "mesh.tensor=4 model.kv_heads=4",
    "mesh.fsdp=2 mesh.tensor=2 mesh.context=2 training.remat=full",
    "mesh.replica=2 mesh.fsdp=2 mesh.tensor=2 training.remat=full training.accumulation=2",
    "mesh.fsdp=2 mesh.tensor=4 training.remat=dots model.tied=false training.loss_chunk=64",
]
SLOW = [
    "mesh.replica=2",
    "mesh.fsdp=4",
    "mesh.context=2",
    "mesh.tensor=2 training.remat=full model.kv_heads=2",
    "mesh.tensor=2 training.remat=full model.parallel=true",
    "mesh.tensor=2 mesh.context=2 training.remat=dots",
    "mesh.tensor=2 mesh.context=2 training.remat=full model.tied=false",
    "mesh.fsdp=2 mesh.tensor=2 training.accumulation=2",
    "mesh.fsdp=4 mesh.tensor=2 model.positions=learned model.norm=layer model.activation=gelu model.qkv_bias=true",
    "mesh.fsdp=2 mesh.context=2 model.layers=13",
    "mesh.replica=2 mesh.fsdp=4 training.remat=full",
    "mesh.replica=2 mesh.fsdp=2 mesh.context=2",
    "mesh.replica=2 mesh.tensor=2 mesh.context=2 training.remat=full",
    "mesh.replica=2 mesh.context=2 training.accumulation=2 training.remat=full",
]


@pytest.mark.parametrize("settings", [*FAST, *(pytest.param(more, marks=pytest.mark.slow) for more in SLOW)])
def test_a_step_sends_what_the_rules_ask_for(settings):
    """To a percent, or to three integers a token: tokens, places and replacements are sent too, as sums of metrics are."""
    config = load_config(None, [*SMALL, *settings.split()])
    devices = math.prod(vars(config.mesh).values())
    sent = collectives(compile_step(config, assumed_inputs(config), jax.devices()[:devices]).as_text())
    expected = expected_kinds(expected_bytes(config, devices))
    tokens = config.training.batch_size * config.training.sequence_length
    for kind in sent.keys() | expected.keys():
        found = sent.get(kind, {"bytes": 0})["bytes"]
        assert found == pytest.approx(expected.get(kind, 0), rel=0.01, abs=12 * tokens), kind
