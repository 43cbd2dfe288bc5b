"""Goodput: time that is charged once, steps that are lost, and warnings of input and stragglers."""

import json

import pytest

from rmft_jax.training.goodput import PHASES, Goodput, describe_goodput, summarize
from rmft_jax.training.loop import train
from rmft_jax.training.peers import stragglers


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_each_second_is_charged_to_the_innermost_phase(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path / "goodput.json", clock)
    clock.now += 5
    with goodput.of("compile"):
        clock.now += 3
    goodput.begin(0)
    with goodput.of("evaluation"):
        clock.now += 2
        with goodput.of("checkpoint"):
            clock.now += 1
        clock.now += 2
    clock.now += 7
    goodput.reach(14)
    found = json.loads((tmp_path / "goodput.json").read_text())
    assert found["seconds"] == {"start": 5, "compile": 3, "input": 0, "step": 7, "evaluation": 4, "checkpoint": 1, "lost": 0,
                                "down": 0}  # fmt: skip
    assert found["total_seconds"] == 20 and found["goodput_pct"] == pytest.approx(35) == goodput.pct


def start(at, begin, end, step_seconds, other=10.0):
    seconds = dict.fromkeys(PHASES, 0.0) | {"step": step_seconds, "start": other}
    return {"at": at, "until": at + step_seconds + other, "from_step": begin, "to_step": end, "seconds": seconds}


def test_steps_that_are_taken_again_are_lost():
    """Killed at 50 with a checkpoint at 40; then at 60, whose checkpoint was damaged, so that it goes on from 30."""
    starts = [start(0, 0, 50, 100), start(200, 40, 60, 40), start(300, 30, 100, 140)]
    found = summarize(starts)
    assert found["lost_steps"] == 20 + 20 and found["restarts"] == 2
    seconds = found["seconds"]
    assert seconds["lost"] == pytest.approx(40 + 40) and seconds["step"] == pytest.approx(60 + 140)
    assert seconds["down"] == 90 + 50 and found["total_seconds"] == 450
    assert sum(seconds.values()) == pytest.approx(found["total_seconds"])  # nothing is counted twice or left out
    assert "2 restarts, 40 steps lost" in describe_goodput(found)


def test_a_run_keeps_account_of_all_its_starts(tiny, capsys):
    config = tiny("name=accounts", "training.steps=12", "training.log_every=1", "checkpoint.count=1", "model.layers=1")
    directory = train(config)
    found = json.loads((directory / "goodput.json").read_text())
    seconds = found["seconds"]
    assert sum(seconds.values()) == pytest.approx(found["total_seconds"], rel=1e-6)
    assert all(seconds[phase] > 0 for phase in PHASES) and seconds["lost"] == seconds["down"] == 0
    assert found["starts"][0]["to_step"] == 12 and "goodput" in capsys.readouterr().err
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= record["goodput_pct"] <= 100 for record in records)
    seconds_of_steps = 12 * 512 / records[-1]["tokens_per_second"]
    assert seconds["step"] < 20 * seconds_of_steps + 5  # compiling is not among them


def test_stragglers_are_those_far_beyond_the_others():
    assert stragglers({0: 0.01, 1: 0.011, 2: 0.2, 3: 0.01}, step=0.5) == [2]
    assert stragglers({0: 0.01, 1: 0.011, 2: 0.2, 3: 0.01}, step=5.0) == []  # the devices do not notice
    assert stragglers({0: 0.2, 1: 0.2}, step=0.5) == []
    assert stragglers({0: 0.3}, step=0.5) == stragglers({}, step=0.5) == []
