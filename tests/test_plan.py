"""The plan of a run: what it says of memory is what arrays and XLA take, and what it advises makes a run fit."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rmft_jax.bench import scaling
from rmft_jax.config import load_config
from rmft_jax.devices import tpu_devices
from rmft_jax.errors import UserError
from rmft_jax.training import loop, setup
from rmft_jax.training.collectives import collectives
from rmft_jax.training.memory import estimate, parse_bytes, say_bytes
from rmft_jax.training.mesh import abstract_mesh, make_mesh, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.plan import assumed_inputs, plan, scaling_table
from rmft_jax.training.step import init_state

SMALL = ["model.width=64", "model.heads=4", "tokenizer.vocab_size=512", "masking.surrogates=16", "training.batch_size=8",
         "training.sequence_length=64", "mesh.replica=1", "out=/nowhere"]  # fmt: skip


def small(*overrides):
    return load_config(None, [*SMALL, *overrides])


def reckon(devices, *overrides):
    config = small(*overrides)
    return estimate(config, assumed_inputs(config), abstract_mesh(config.mesh, devices))


@pytest.mark.parametrize("text, size", [("80GB", 80e9), ("80GiB", 80 * 2**30), ("16e9", 16e9), ("1.5 kb", 1500), ("7", 7)])
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "80XB", "-1GB", "0", "1e400", "8 0GB", "nan"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(UserError, match="no amount of memory"):
        parse_bytes(text)


def test_sizes_are_said_in_the_unit_that_suits_them():
    assert [say_bytes(n) for n in (0, 999, 1000, 1.24e9, 80e9)] == ["0 B", "999 B", "1 kB", "1.24 GB", "80 GB"]


@pytest.mark.parametrize("mesh", [["mesh.fsdp=8"], ["mesh.fsdp=2", "mesh.tensor=2"], ["mesh.replica=2", "mesh.context=2"]])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_state_takes_what_its_arrays_take_on_a_device(mesh, optimizer):
    config = small(*mesh, f"training.optimizer={optimizer}", "loss.elr_weight=1")
    devices = int(np.prod([size for size in vars(config.mesh).values()]))
    state = init_state(config, 512, 5, make_optimizer(config.training, 10))
    state = jax.device_put(state, shardings_for(state, make_mesh(config.mesh, jax.devices()[:devices])))
    terms = reckon(devices, *mesh, f"training.optimizer={optimizer}", "loss.elr_weight=1").arguments
    names = {"params": "parameters", "optimizer": "optimizer", "average": "average of the weights"}
    for name, term in names.items():
        shards = (leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state[name]))
        assert terms[term] == sum(shards)


@pytest.mark.parametrize(
    ("devices", "settings"),
    [
        (1, ["model.layers=10", "training.remat=dots", "training.accumulation=2"]),
        (1, ["model.layers=3", "training.remat=full", "training.loss_chunk=64", "tokenizer.vocab_size=4096"]),
        (8, ["model.layers=10", "mesh.fsdp=4", "mesh.tensor=2", "model.norm=layer", "model.activation=gelu"]),
    ],
)
def test_xla_agrees(devices, settings):
    """Arguments to 1%; temporaries as close as the table of docs/plan.md says of larger models."""
    ratio = plan(small(*settings, "training.sequence_length=128"), devices=devices, compile=True)["compiled"]["ratio"]
    assert ratio["arguments"] == pytest.approx(1, abs=0.01)
    assert ratio["temp"] == pytest.approx(1, abs=0.2)


def test_activations_follow_the_shapes():
    """The softmax keeps its result, and the exponentials or their like: two float32 arrays a layer, of the pairs in reach:
    of B x H x T x T, 5/8 where queries are taken a quarter of a row at a time."""

    def kept(*settings):
        memory = reckon(1, "model.layers=10", "training.sequence_length=256", *settings)
        return memory.phases["backward"]["attention scores"], memory.phases["backward"]["activations"]

    scores, rest = kept()
    assert scores == 2 * 4 * 10 * 8 * 4 * 256 * 256 * 5 // 8
    assert kept("training.sequence_length=512")[0] == 4 * scores
    assert kept("training.batch_size=16")[0] == kept("training.batch_size=32", "training.accumulation=2")[0] == 2 * scores
    assert kept("training.remat=full")[0] == 0 and kept("training.remat=full")[1] < kept("training.remat=dots")[1] < rest
    assert kept("training.dtype=bfloat16")[0] == 0.75 * scores  # one of the two stays float32


def test_a_mesh_divides_what_it_splits():
    one = reckon(1).arguments
    for axis in ("fsdp", "tensor"):
        split = reckon(4, f"mesh.{axis}=4").arguments
        assert split["parameters"] == pytest.approx(one["parameters"] / 4, rel=0.05)
    assert reckon(4, "mesh.replica=4").arguments["parameters"] == one["parameters"]


@pytest.mark.parametrize(
    ("devices", "settings", "says"),
    [
        (8, ["mesh.tensor=8", "model.heads=8", "tokenizer.vocab_size=508"], "vocab_size 508 .*mesh.tensor"),
        (2, ["mesh.fsdp=2", "model.heads=1", "model.width=63", "model.positions=learned"], "model.width 63 is not"),
        (3, ["mesh.replica=-1"], "training.batch_size 8 is not divisible by the 3 devices"),
        (8, ["mesh.fsdp=2"], "does not fit 8 devices"),
    ],
)
def test_what_a_mesh_does_not_divide_is_refused(devices, settings, says):
    with pytest.raises(UserError, match=says):
        plan(small(*settings), devices=devices)


@pytest.mark.parametrize(
    ("devices", "settings", "share", "largest"),
    [
        (1, ["model.layers=10"], 0.5, "activations"),
        (1, ["model.layers=10", "training.sequence_length=512"], 0.7, "attention scores"),
        (1, ["tokenizer.vocab_size=32768", "model.layers=1"], 0.7, "logits"),
        (8, ["mesh.replica=8", "model.width=512", "training.sequence_length=16"], 0.4, "optimizer"),
        (1, ["model.layers=10", "training.batch_size=64"], 0.05, "activations"),
    ],
)
def test_what_is_advised_makes_it_fit(devices, settings, share, largest):
    total = plan(small(*settings), devices=devices)["memory"]["total"]
    result = plan(small(*settings), devices=devices, limit=int(share * total))
    assert result["fits"] is False and f"the largest part is {largest}" in result["error"] and "\n" not in result["error"]
    advice = re.findall(r"[a-z]+\.[a-z_]+=\S+", result["error"])
    assert advice and plan(small(*settings, *advice), devices=devices, limit=int(share * total))["fits"]
    assert plan(small(*settings), devices=devices, limit=total)["fits"]


def test_more_devices_are_advised_where_no_setting_helps():
    settings = ["training.batch_size=64", "model.width=512"]
    smallest = plan(small(*settings, "training.remat=full", "training.optimizer=adafactor"))["memory"]["arguments"]
    limit = sum(smallest.values())  # the parameters fit, the gradients don't
    error = plan(small(*settings), limit=limit)["error"]
    count = int(re.search(r"but (\d+) do", error)[1])
    advice = re.findall(r"[a-z]+\.[a-z_]+=\S+", error)
    assert plan(small(*settings, *advice), devices=count, limit=limit)["fits"]


def test_planning_touches_no_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", None)
    monkeypatch.setattr(jax, "jit", None)
    result = plan(load_config(None, ["out=/nowhere", "training.batch_size=4096", "mesh.fsdp=64"]), devices=4096, limit=10**9)
    assert result["fits"] and result["steps"] is None
    assert result["flops_per_step"] == result["flops_per_token"] * 4096 * 128


def test_steps_and_epochs_are_those_of_the_data(tiny, prepared):
    config = tiny("mesh.replica=1", "training.epochs=3")
    result, (blocks, _) = plan(config), setup.load_blocks(config, prepared)
    assert result["steps"] == setup.make_plan(config, len(blocks)).steps
    assert result["epochs"] == pytest.approx(3, rel=0.1) and "blocks in" in result["data"]


def test_train_refuses_what_cannot_fit_before_it_compiles_or_writes(tiny, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)
    monkeypatch.setattr(setup, "device_memory", lambda: 100_000)
    config = tiny("name=large")
    with pytest.raises(UserError, match="a step takes at least .* of each device, which has 100 kB; .* device"):
        loop.train(config)
    assert not config.run_dir.exists()


def test_the_command_prints_the_plan_and_ends_with_2_where_it_does_not_fit():
    command = [sys.executable, "-m", "rmft_jax.cli", "plan", "configs/models/ladder_13b.yaml", "--devices", "8", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--hbm", "80GB"], capture_output=True, text=True, env=environment)
    result = json.loads(done.stdout)
    assert done.returncode == 2 and result["fits"] is False and result["devices"] == 8
    assert re.fullmatch(r"error: a step takes about .* TB of each device, which has 80 GB; .*: set .*\n", done.stderr)


HLO = """HloModule x, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %ag = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%y), replica_groups=[1,4]<=[4], dimensions={0}
  %agd = bf16[8,4]{1,0} all-gather-done(%ag)
}

%outer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %w = (s32[], /*index=1*/f32[8,4]{1,0}) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %rs = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
}

%never (p: f32[]) -> f32[] {
  %all-reduce.9 = f32[1000]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (p: f32[8,4]) -> f32[] {
  %w2 = (s32[], f32[8,4]{1,0}) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[4]{0}, s8[3]{0}) all-reduce(%a, %b), replica_groups={{0,1,2,3}}, to_apply=%add
  %cp = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,0}}
  ROOT %cpd = f32[6]{0} collective-permute-done(%cp)
}
"""


def test_collectives_are_read_with_their_loops():
    assert collectives(HLO) == {
        "all-reduce": {"count": 16, "bytes": 15 * 128 + 19},
        "all-gather": {"count": 15, "bytes": 15 * 64},
        "reduce-scatter": {"count": 3, "bytes": 3 * 4 * 32},
        "collective-permute": {"count": 1, "bytes": 24},
    }


def test_collectives_of_a_real_program():
    """Seven sums of a matrix over the devices, in a loop."""
    mesh = jax.make_mesh((8,), ("d",))

    def program(x):
        one = jax.shard_map(lambda x: jax.lax.psum(jax.numpy.sin(x), "d"), mesh=mesh, in_specs=P("d"), out_specs=P())
        return jax.lax.scan(lambda x, _: (x + one(x)[0], None), x, length=7)[0]

    x = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=NamedSharding(mesh, P("d")))
    found = collectives(jax.jit(program).lower(x).compile().as_text())
    assert found["all-reduce"] == {"count": 7, "bytes": 7 * 16 * 4}


def test_a_step_sends_what_the_rules_ask_for():
    config = load_config(None, [*SMALL, "model.layers=10", "model.tied=false"])
    result = scaling.run(config, meshes=({}, {"fsdp": 8}, {"replica": 3}))
    alone, fsdp, odd = result["runs"]
    assert alone["collectives"] == {} and alone["ratio"] is None
    assert fsdp["ratio"] == pytest.approx(1, abs=0.1) and fsdp["argument_bytes"] < alone["argument_bytes"] / 4
    assert "not divisible by the 3 devices" in odd["skipped"]
    assert result["ratio"] == result["peer_value"] / result["value"]


def roofline(devices, chip, *overrides):
    return plan(small(*overrides), devices=devices, chip=chip)["roofline"]


def test_the_roofline_by_hand():
    """Of 8 x 64 tokens on 8 chips that split parameters: what each part takes, from published figures of a v5e."""
    settings = ["mesh.fsdp=8", "training.dtype=bfloat16", "model.layers=10"]
    result = plan(small(*settings), devices=8, chip="v5e")
    seconds, flops = result["roofline"]["seconds"], result["flops_per_step"]
    assert seconds["compute"] == pytest.approx(flops / 8 / 197e12)
    assert seconds["gradients"] == pytest.approx(2 * result["parameters"] * 7 / 8 / 200e9)
    assert seconds["update"] >= 4 * 4 * result["parameters"] / 8 * 2 / 800e9  # two moments, parameter and gradient, twice
    assert seconds["activations"] == seconds["keys and values"] == 0
    assert seconds["features"] == pytest.approx(2 * 64 * 64 * 2 * 7 / 8 / 200e9)  # of a row on each chip, there and back
    again = roofline(8, "v5e", *settings, "training.remat=full")["seconds"]["compute"]
    assert again == pytest.approx(4 / 3 * seconds["compute"])
    parts = max(seconds["compute"], seconds["memory"], seconds["weights"] + seconds["gradients"])
    assert result["roofline"]["step_seconds"] == pytest.approx(parts + seconds["update"] + seconds["features"])


def test_what_leaves_a_node_goes_over_the_network():
    """16 GPUs are two nodes of 8: copies in each node send over NVLink, copies across nodes over the network."""
    inside = roofline(8, "h100", "mesh.replica=8")["seconds"]["gradients"]
    across = roofline(16, "h100", "mesh.replica=16", "training.batch_size=16")["seconds"]["gradients"]
    size = 4 * (plan(small(), devices=1)["parameters"] + 512 * 64)  # the embedding is the output too: summed as each
    assert inside == pytest.approx(2 * size * 7 / 8 / 450e9)
    assert across == pytest.approx(2 * (size * 7 / 8 / 450e9 + size / 8 / 2 / 50e9))


def test_scaling_tables_grow_until_something_does_not_divide():
    config = small("mesh.replica=-1", "training.batch_size=4")
    strong, weak = (scaling_table(config, "v5p", most=8, weak=grows) for grows in (False, True))
    assert [row["devices"] for row in strong] == [1, 2, 4]  # 8 chips do not divide 4 rows
    assert [row["batch_size"] for row in weak] == [4, 8, 16, 32]
    assert strong[0]["efficiency"] == weak[0]["efficiency"] == 1 and strong[-1]["efficiency"] < weak[-1]["efficiency"]
    with pytest.raises(UserError, match="unknown chip 'v9': the roofline knows v5e"):
        plan(config, devices=1, chip="v9")


@pytest.mark.parametrize("topology", ["4", "2x2 ", "axb"])
def test_what_is_no_slice_is_refused(topology):
    with pytest.raises(UserError, match="write 16x16 of v5e or v6e"):
        tpu_devices("v5e", topology)


def test_copies_lie_across_slices():
    pytest.importorskip("libtpu", reason="pip install libtpu")
    code = """
from rmft_jax.config import MeshConfig
from rmft_jax.devices import tpu_devices
from rmft_jax.training.mesh import make_mesh
from rmft_jax.errors import UserError
devices = tpu_devices("v5e", "2x2", 2)
mesh = make_mesh(MeshConfig(replica=4, fsdp=2), devices)
print([{device.slice_index for device in part.flat} for part in mesh.devices])
try:
    make_mesh(MeshConfig(replica=1, fsdp=8), devices)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "[{0}, {0}, {1}, {1}]", done.stderr
    assert "mesh.replica 1 is not divisible by the 2 slices" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_13b_on_512_devices_compiles_to_what_is_planned():
    """The whole step of the 13B preset, its blocks a scanned loop, for 512 fake devices."""
    settings = ["training.dtype=float32", "training.batch_size=512", "mesh.replica=1", "mesh.fsdp=512",
                "training.remat=full", "training.loss_chunk=1024", "--devices", "512"]  # fmt: skip
    command = [sys.executable, "-m", "rmft_jax.cli", "plan", "configs/models/ladder_13b.yaml", *settings]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([*command, "--compile", "--json"], capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout)["compiled"]
    assert found["ratio"]["arguments"] == pytest.approx(1, abs=0.01)
    assert found["ratio"]["total"] == pytest.approx(1, abs=0.1)
    sent = sum(kind["bytes"] for kind in found["collectives"].values())
    assert sum(found["expected"].values()) == pytest.approx(sent, rel=0.1)


def test_a_slice_that_is_not_there_is_compiled_for():
    """By the TPU's own compiler: the arguments are the plan's, but for what it pads to tiles of 8 x 128."""
    pytest.importorskip("libtpu", reason="pip install libtpu")
    settings = [*SMALL, "training.dtype=bfloat16", "mesh.fsdp=4", "training.attention=xla", "model.layers=9",
                "model.width=512", "training.remat=full"]  # fmt: skip
    command = [sys.executable, "-m", "rmft_jax.cli", "plan", "configs/synthetic.yaml", *settings, "--json"]
    done = subprocess.run([*command, "--devices", "4", "--chip", "v5e", "--topology", "2x2"], capture_output=True, text=True)
    found = json.loads(done.stdout)["compiled"]
    assert found["compiler"] == "TPU v5e 2x2" and found["ratio"]["arguments"] == pytest.approx(1, abs=0.05)
    assert found["collectives"] is None and found["temp"] > 0
