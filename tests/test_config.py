"""What the config accepts, and what it says when it does not."""

from pathlib import Path

import pytest

from rmft_jax.config import Config, load_config, to_yaml
from rmft_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_the_commented_config_is_the_default():
    assert load_config(CONFIGS / "synthetic.yaml") == Config()


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load_and_survive_yaml(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_overrides_win_and_keep_their_types():
    config = load_config(None, ["training.learning_rate=1e-4", "seed=7", "audit.sets=[web]", "name=123", "out=a b"])
    assert (config.training.learning_rate, config.seed, config.audit.sets) == (1e-4, 7, ("web",))
    assert config.name == "123" and config.out == "a b"


def test_names_of_methods():
    names = {(): "rmft", ("masking.policy=none",): "baseline", ("masking.policy=none", "dedup.policy=near"): "dedup",
             ("dedup.policy=near",): "rmft+dedup", ("name=x",): "x"}  # fmt: skip
    for overrides, name in names.items():
        assert load_config(None, list(overrides)).run_name == name


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainin.steps=3", "unknown key trainin in the defaults (did you mean training?)"),
        ("training.batchsize=3", "did you mean training.batch_size?"),
        ("training.batch_size=many", "training.batch_size in the defaults is 'many': it must be a whole number"),
        ("training.batch_size=2.5", "a whole number"),
        ("training.batch_size=true", "a whole number"),
        ("training.learning_rate=fast", "it must be a number"),
        ("training.learning_rate=nan", "training.learning_rate is nan"),
        ("masking.policy=keep_frist", "did you mean keep_first?"),
        ("audit.sets=[heldout, mail]", "audit.sets has 'mail'"),
        ("audit.sets=[]", "audit.sets is empty"),
        ("model.heads=3", "model.width 128 is not divisible by model.heads 3"),
        ("model.width=4", "even head width"),
        ("training.batch_size=6 mesh.replica=4", "training.batch_size 6 is not divisible by the 4 devices"),
        ("masking.margin=127", "leaves no room"),
        ("source.format=jsonl", "source.path is empty"),
        ("mesh.replica=0", "use positive sizes"),
        ("name=../up", "one directory name"),
        ("training=3", "it is a section"),
        ("seed", "write key.path=value"),
        ("training.epochs=0", "both 0"),
        ("model.width=", "a whole number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override, says):
    with pytest.raises(UserError) as error:
        load_config(None, override.split(" ") if "[" not in override else [override])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"a: [", "not valid YAML"), (b"- 1\n", "is a list"), (b"\xff\xfe\x00", "not valid YAML"), (b"seed: {a: 1}", "seed")],
)
def test_broken_files(tmp_path, content, says):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
