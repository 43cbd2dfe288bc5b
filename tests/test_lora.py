"""LoRA: what is trained, what it costs, and that everything downstream sees one plain model."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmft_jax.config import LoraConfig, ModelConfig, load_config
from rmft_jax.data.loader import batches
from rmft_jax.errors import UserError
from rmft_jax.memorization.extraction import audit
from rmft_jax.models.gpt import forward, init_params
from rmft_jax.models.lora import init_adapters, merge, with_adapters
from rmft_jax.training.checkpoints import Checkpoints
from rmft_jax.training.loop import put, train
from rmft_jax.training.mesh import make_mesh, replicated, shardings_for
from rmft_jax.training.optimizer import make_optimizer
from rmft_jax.training.setup import load_blocks
from rmft_jax.training.step import compile_train_step, init_state, model_of

MODELS = {
    "llama": ModelConfig(layers=3, width=32, heads=4, kv_heads=2),
    "gpt2": ModelConfig(layers=2, width=32, heads=2, positions="learned", norm="layer", activation="gelu", qkv_bias=True),
    "deep": ModelConfig(layers=10, width=16, heads=2, parallel=True),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 12)), jnp.int32)


def adapted(model, *, rank=3, targets=("qkv", "out", "up", "down")):
    """Return base parameters and the same with adapters that are not zero."""
    params = init_params(model, 60, jax.random.key(0))
    adapters = init_adapters(params, LoraConfig(rank=rank, targets=targets), jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    return params, with_adapters(params, adapters, jnp.float32(1.5))


@functools.partial(jax.jit, static_argnums=1)
def logits(params, model):
    return forward(params, model, TOKENS, jnp.ones_like(TOKENS))


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_the_same_model(name):
    model = MODELS[name]
    params, more = adapted(model)
    assert jax.tree.structure(merge(more)) == jax.tree.structure(params)
    assert float(jnp.abs(logits(more, model) - logits(params, model)).max()) > 0.1
    np.testing.assert_allclose(logits(more, model), logits(merge(more), model), atol=2e-4)


def test_adapters_change_nothing_at_first():
    model = MODELS["llama"]
    params = init_params(model, 60, jax.random.key(0))
    adapters = init_adapters(params, LoraConfig(rank=4), jax.random.key(1))
    assert np.array_equal(logits(with_adapters(params, adapters, jnp.float32(2)), model), logits(params, model))
    spread = adapters["blocks"]["mlp"]["down"]["lora_a"].std() * model.mlp**0.5
    assert 0.9 < float(spread) < 1.1


def test_gradients_are_those_of_the_whole_matrix_by_the_chain_rule():
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW'."""
    model = MODELS["llama"]
    _, more = adapted(model)
    loss = lambda params: jnp.mean(jax.nn.logsumexp(logits(params, model), axis=-1))  # noqa: E731
    of_matrices = jax.jit(jax.grad(loss))(merge(more))["blocks"]
    of_adapters = jax.jit(jax.grad(lambda a: loss(more | {"adapters": a})))(more["adapters"])["blocks"]
    for part, modules in of_adapters.items():
        for name, gradient in modules.items():
            whole, pair = of_matrices[part][name]["kernel"], more["adapters"]["blocks"][part][name]
            a = 1.5 * jnp.einsum("lio,lro->lir", whole, pair["lora_b"])
            b = 1.5 * jnp.einsum("lio,lir->lro", whole, pair["lora_a"])
            np.testing.assert_allclose(gradient["lora_a"], a, atol=1e-5)
            np.testing.assert_allclose(gradient["lora_b"], b, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_equals_peft(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    peft = pytest.importorskip("peft", reason="needs peft")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from rmft_jax.models.huggingface import export_model

    model = MODELS["llama"]
    params, more = adapted(model, targets=("out", "down"))  # matrices that both have one of
    export_model(params, model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    settings = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=["o_proj", "down_proj"])
    theirs = peft.get_peft_model(theirs, settings).eval()
    names = {"o_proj": ("attention", "out"), "down_proj": ("mlp", "down")}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                layer, module = int(name.split(".layers.")[1].split(".")[0]), name.split(".lora_")[0].split(".")[-1]
                part, ours = names[module]
                which = "lora_a" if "lora_A" in name else "lora_b"
                parameter.copy_(torch.tensor(np.asarray(more["adapters"]["blocks"][part][ours][which][layer]).T))
        expected = theirs(torch.tensor(np.asarray(TOKENS, np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(more, model), expected, atol=1e-4)


@pytest.mark.parametrize("more", ["training.optimizer=muon", "loss.elr_weight=1", "privacy.noise_multiplier=0.2"])
def test_only_adapters_are_trained_and_only_they_have_optimizer_state(tiny, prepared, more):
    config = tiny("lora.rank=2", "training.learning_rate=1e-2", "training.warmup_steps=0", more)
    mesh, rule = make_mesh(config.mesh, jax.devices()[:1]), make_optimizer(config.training, 50)
    state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, rule)
    state = jax.device_put(state, shardings_for(state, mesh))
    begin, losses = jax.tree.map(jnp.copy, state), []
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(state["optimizer"]) <= 2 * size(state["adapters"]) + 10 < size(state["params"]) / 2
    step, bank = compile_train_step(config, rule, mesh, state), jax.device_put(prepared.bank, replicated(mesh))
    batch = next(batches(load_blocks(config, prepared)[0], batch_size=8, seed=0))
    for _ in range(8):
        state, metrics = jax.block_until_ready(step(state, put([batch], mesh), bank))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.02 or config.privacy.on, losses
    for old, new in zip(jax.tree.leaves(begin["params"]), jax.tree.leaves(state["params"]), strict=True):
        assert np.array_equal(old, new)
    for old, new in zip(jax.tree.leaves(begin["adapters"]), jax.tree.leaves(state["adapters"]), strict=True):
        assert not np.array_equal(old, new)


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2)])
def test_on_a_mesh_the_losses_are_the_same(tiny, prepared, sizes):
    def losses(*overrides, devices):
        config = tiny("lora.rank=2", "training.warmup_steps=0", *overrides)
        mesh, rule = make_mesh(config.mesh, jax.devices()[:devices]), make_optimizer(config.training, 50)
        state = init_state(config, prepared.tokenizer.vocab_size, prepared.identities, rule)
        state = jax.device_put(state, shardings_for(state, mesh))
        step, bank = compile_train_step(config, rule, mesh, state), jax.device_put(prepared.bank, replicated(mesh))
        source, out = batches(load_blocks(config, prepared)[0], batch_size=8, seed=0), []
        for _ in range(5):
            state, metrics = jax.block_until_ready(step(state, put([next(source)], mesh), bank))
            out.append(float(metrics["loss"]))
        return out

    fsdp, tensor = sizes
    spread = losses("mesh.replica=1", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}", devices=8)
    np.testing.assert_allclose(spread, losses(devices=1), rtol=1e-5)


def test_a_run_resumes_audits_and_starts_others(tiny, tmp_path):
    base = train(tiny("name=lora-base", "masking.policy=none", "training.steps=6"))
    more = ["lora.rank=2", f"training.init_from={base}", "training.steps=8", "training.learning_rate=1e-2"]
    run = train(tiny("name=lora", *more))
    checkpoints, last = Checkpoints.open(run)
    assert (checkpoints.steps(), last) == ([4, 8], 8)
    checkpoints.close()

    cut = train(tiny("name=cut", *more))
    for path in (cut / "checkpoints" / "8", cut / "evaluation.json"):
        if path.is_dir():
            shutil.rmtree(path)
    assert train(tiny("name=cut", *more)) == cut
    same = [(run / "metrics.jsonl").read_text().splitlines(), (cut / "metrics.jsonl").read_text().splitlines()]
    assert len(same[0]) == len(same[1])

    config = tiny(*more)
    target = jax.eval_shape(lambda: init_params(config.model, 700, jax.random.key(0)))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), target)

    def params_of(path):
        checkpoints, step = Checkpoints.open(path)
        params = checkpoints.restore_params(step, target)
        checkpoints.close()
        return params

    ours, again, plain = params_of(run), params_of(cut), params_of(base)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(again), strict=True))
    changed = ours["blocks"]["mlp"]["down"]["kernel"] - plain["blocks"]["mlp"]["down"]["kernel"]
    assert np.linalg.matrix_rank(np.asarray(changed[0]), tol=1e-4 * float(jnp.abs(changed).max()) * 30) == 2
    assert np.array_equal(ours["embed"], plain["embed"])
    (result,) = audit([run], ["audit.metrics=[]"])
    assert len(result["checkpoints"]) == 2
    train(tiny("name=next", f"training.init_from={run}", "training.steps=2"))


def test_what_can_not_be_is_refused():
    with pytest.raises(UserError, match="lora.rank is 128, not below the 128 rows of the smallest matrix"):
        load_config(None, ["lora.rank=128"])
    with pytest.raises(UserError, match="lora.targets has 'q'"):
        load_config(None, ["lora.rank=2", "lora.targets=[q]"])
    with pytest.raises(UserError, match="name each matrix once"):
        load_config(None, ["lora.rank=2", "lora.targets=[qkv, qkv]"])


def test_state_without_adapters_is_as_it_was(tiny, prepared):
    config = tiny()
    state = init_state(config, 700, prepared.identities, make_optimizer(config.training, 5))
    assert "adapters" not in state and model_of(state) is state["params"]
