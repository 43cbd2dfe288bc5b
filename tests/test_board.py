"""Scalars of a run: what TensorBoard gets, and what leaves the machine for Weights & Biases if that is asked for."""

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from rmft_jax.config import load_config
from rmft_jax.errors import UserError
from rmft_jax.training.board import Board
from rmft_jax.training.loop import train


def scalars(folder):
    """Return the (name, step, value) in TensorBoard's files."""
    found = []
    for path in (folder / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_both_get_the_scalars_and_wandb_no_paths(tmp_path, monkeypatch):
    sent, started = [], {}
    run = SimpleNamespace(log=sent.append, finish=lambda: sent.append("finished"))
    wandb = SimpleNamespace(init=lambda **settings: started.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = load_config(None, ["training.wandb=mail", "source.path=/home/ann/secret.jsonl", "source.format=jsonl",
                                "training.init_from=/home/ann/start", f"out={tmp_path}"])  # fmt: skip
    board = Board(tmp_path, config, 0)
    board.add_scalar("loss", 2.5, 3)
    board.close()
    assert sent == [{"loss": 2.5, "step": 3}, "finished"] and scalars(tmp_path) == [("loss", 3, 2.5)]
    assert started["project"] == "mail" and started["name"] == "rmft" and "model" in started["config"]
    assert "ann" not in json.dumps({key: value for key, value in started.items() if key != "dir"}, default=str)


def test_without_a_project_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    board = Board(tmp_path, load_config(), 0)
    board.add_scalar("loss", 1.0, 1)
    board.close()
    assert scalars(tmp_path) == [("loss", 1, 1.0)]
    with pytest.raises(UserError, match="pip install 'rmft-jax.wandb.'"):
        train(load_config(None, ["training.wandb=mail", f"out={tmp_path}"]))
