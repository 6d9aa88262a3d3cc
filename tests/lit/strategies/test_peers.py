"""Several processes: where one ends, all end, with its line and without the traceback of a broken connection."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.lit.processes import finished, ranks, wait
from tests.lit.rows import write_rows
from tests.lit.test_runs import config
from tests.lit.test_strategies import STRATEGIES


def argv_of(base: Path, root: Path, **changes) -> list[str]:
    rows = write_rows(root / "data", 16)
    changes = {"data__train": str(rows), "data__val": None, "data__batch_size": 1, "data__shuffle": False} | changes
    path = config(base, root, **{"checkpoint__every_n_train_steps": 1, **changes})
    return ["fit", "--config", str(path), "--config", str(STRATEGIES / "ddp.yaml")]


def errors(root: Path) -> list[str]:
    logs = [(root / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert all("Traceback" not in log for log in logs), logs
    lines = [[line for line in log.splitlines() if line.startswith("error: ")] for log in logs]
    assert all(len(found) == 1 for found in lines), logs
    return [found[0] for found in lines]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_row_that_one_process_cannot_read_ends_all_with_its_line(base, tmp_path, workers):
    argv = argv_of(base, tmp_path, data__num_workers=workers, checkpoint__every_n_train_steps=None)
    rows, image = tmp_path / "data/train.jsonl", tmp_path / "data/bad.png"
    Image.effect_noise((400, 400), 100).save(image)
    image.write_bytes(image.read_bytes()[:100_000])
    lines = rows.read_text().splitlines()
    lines[5] = json.dumps({"query": "<image>What?", "response": "a cat", "images": ["bad.png"]})  # the second's third
    rows.write_text("\n".join(lines) + "\n")
    finished(ranks(argv, tmp_path), tmp_path, status=2, limit=120)
    heard, told = errors(tmp_path)
    assert "train.jsonl:6" in told and "bad.png" in told
    assert heard == f"error: process 1: {told.removeprefix('error: ')}"
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_with_a_line(base, tmp_path, killed):
    argv = argv_of(base, tmp_path, trainer__max_epochs=1000)
    both = ranks(argv, tmp_path)
    wait(both[1], lambda: list((tmp_path / "run/checkpoints").glob("last.ckpt")))
    both[killed].kill()
    other = both[1 - killed]
    other.join(120)
    status = other.exitcode
    other.kill()
    log = (tmp_path / f"rank{1 - killed}.log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert status == 2 and "Traceback" not in log, log[-3000:]
    assert lines and "has ended without a word" in lines[0] and len(lines) == 1
