"""Losses of ms-swift's and LLaMA-Factory's own training on an export, as benchmarks/train_step.py compares steps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.judges.make_env import REPO
from tests.judges.side import interpreter, run

pytestmark = pytest.mark.judge
BENCHMARKS = REPO / "benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import models
    import train_step

    return models, train_step


@pytest.mark.parametrize(("name", "close"), [("ms-swift", 0.02), ("llamafactory", 0.02)])
def test_a_peer_trains_the_same_steps(step, tmp_path, capsys, monkeypatch, name, close):
    interpreter(name)
    models, train_step = step
    model = models.write(tmp_path / "tiny", "tiny")
    models.write_twin(tmp_path / "tiny-hf", model)
    rows, steps = train_step.write_rows(tmp_path / "mixed-3", 12), 3
    script = BENCHMARKS / "peers" / train_step.PEERS[name]
    printed = run(name, [script, tmp_path / "tiny-hf", rows, str(steps), "1", "1", "lora", "0"], tmp_path)
    theirs = json.loads(printed.splitlines()[-1])
    assert len(theirs["times"]) == steps + 1 and theirs["peak_gb"] > 0.1
    argv = ["--side", "ours", "--model", model, "--rows", rows, "--steps", steps, "--max_tiles", 1, "--no_dropout"]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *map(str, argv)])
    train_step.main()
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=close)


def test_one_tile_or_twelve(tmp_path):
    """What the peer's plugin cannot do is said, not measured."""
    python = interpreter("llamafactory")
    script = BENCHMARKS / "peers" / "llama_factory.py"
    words = [python, script, tmp_path, tmp_path, "1", "6", "1", "lora", "0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode and "--max_tiles 1 or 12, not 6" in done.stderr
