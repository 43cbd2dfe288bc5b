"""Presets hold what their names say, and `include` takes keys from other files in a fixed order."""

from pathlib import Path

import jax
import pytest
import yaml

from rmft_jax.config import load_config, to_yaml
from rmft_jax.errors import UserError
from rmft_jax.includes import find_model
from rmft_jax.models.gpt import count_params, init_params

MODELS = Path(__file__).parents[1] / "configs" / "models"
PRESETS = sorted(path.stem for path in MODELS.glob("*.yaml"))
# Of the published weights: a file of tensors says how many numbers are in it.
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1_5b": 1_557_611_200,
    "pythia_160m": 162_322_944,
    "smollm2_135m": 134_515_008,
    "qwen3_0_6b": 596_049_920,
}


def parameters(name):
    config = load_config(MODELS / f"{name}.yaml")
    return count_params(jax.eval_shape(lambda: init_params(config.model, config.tokenizer.vocab_size, jax.random.key(0))))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_its_name_says(name):
    """All of them, embeddings included, as these families count; GPT-2 XL is published as 1.5B, with 1.558B."""
    _, *digits = name.split("_")
    size = float(".".join(digits)[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert parameters(name) == pytest.approx(size, rel=0.04)


def test_presets_span_1m_to_13b():
    sizes = [parameters(name) for name in PRESETS]
    assert min(sizes) < 1.1e6 and max(sizes) > 12e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_of_published_models_have_their_parameters_exactly(name):
    assert parameters(name) == PUBLISHED[name]


def write(folder, **files):
    for name, tree in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))


def test_own_keys_win_then_later_includes_then_those_of_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", one={"model": {"layers": 1, "width": 16, "heads": 1}, "seed": 1})
    write(tmp_path / "sub", two={"include": "one.yaml", "model": {"layers": 2, "mlp_width": 32}, "seed": 2})
    write(tmp_path, low={"name": "low", "seed": 9, "training": {"steps": 7}})
    write(tmp_path, top={"include": ["sub/one.yaml", "sub/two.yaml"], "model": {"width": 24}})
    monkeypatch.chdir(tmp_path)
    config = load_config("top.yaml", ["include=low.yaml", "model.heads=2"])
    model = config.model
    assert (model.layers, model.width, model.heads, model.mlp_width) == (2, 24, 2, 32)
    assert (config.seed, config.name, config.training.steps) == (2, "low", 7)
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "top.yaml").model.layers == 2  # relative to the file, wherever the command runs


def test_a_resolved_config_names_no_include(tmp_path):
    config = load_config(None, [f"include={MODELS / 'gpt2_14m.yaml'}"])
    assert "include" not in to_yaml(config)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config and config.model.positions == "learned"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"top": {"include": "gpt2_124.yaml"}, "gpt2_124m": {}}, r"gpt2_124.yaml \(included by .*did you mean gpt2_124m"),
        ({"top": {"include": "b.yaml"}, "b": {"include": "top.yaml"}}, "circle .*top.yaml -> .*b.yaml -> .*top.yaml"),
        ({"top": {"include": "top.yaml"}}, "circle"),
        ({"top": {"include": {"a": 1}}}, "it must be a file or a list of files"),
        ({"top": {"include": "b.yaml"}, "b": {"modell": {}}}, "unknown key modell in .*b.yaml"),
        ({"top": {"include": "b.yaml"}, "b": [1]}, "b.yaml is a list"),
        ({"top": {"model": {"include": "b.yaml"}}}, "unknown key model.include"),
    ],
)
def test_what_is_wrong_with_an_include_is_said_in_one_line(tmp_path, files, says):
    write(tmp_path, **files)
    with pytest.raises(UserError, match=says) as error:
        load_config(tmp_path / "top.yaml")
    assert "\n" not in str(error.value)


def test_a_model_is_a_path_or_a_name_here_or_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("llama_10m") == MODELS / "llama_10m.yaml"
    (tmp_path / "configs" / "models").mkdir(parents=True)
    write(tmp_path / "configs" / "models", llama_10m={}, mine={})
    assert find_model("llama_10m") == Path("configs/models/llama_10m.yaml") == find_model("configs/models/llama_10m.yaml")
    with pytest.raises(UserError, match=r"unknown model 'llama_10': .*mine|did you mean llama_10m"):
        find_model("llama_10")
