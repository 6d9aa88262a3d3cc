"""Ctrl-C, SIGTERM and SIGHUP, as terminals and schedulers send them: to all processes of a run at once."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from ivl.__main__ import main
from ivl.checkpoint.ckpt_file import damage
from ivl.lit.module import LitInternVL
from tests.lit.callbacks.test_checkpoint import COMMON, EACH, assert_same, run
from tests.lit.processes import CTRL_C, Terminal, in_own_group, on_terminal, started, wait
from tests.lit.rows import write_rows
from tests.lit.test_runs import config, losses, scalars


def settings(base: Path, workers: int = 2, validated: bool = False, **more) -> dict:
    """Windows of two micro-batches, a checkpoint after each; 60 held-out rows take seconds where they are wanted."""
    write_rows(base / "data", 16, "sixteen.jsonl")
    write_rows(base / "data", 60, "long.jsonl")
    held_out = {"data__val": str(base / "data/long.jsonl"), "data__eval_batch_size": 1} if validated else {}
    return COMMON | EACH | {
        "data__train": str(base / "data/sixteen.jsonl"),
        "data__val": None,
        "data__batch_size": 2,
        "data__num_workers": workers,
        "trainer__accumulate_grad_batches": 2,
        "trainer__max_epochs": 3,
        "checkpoint__save_top_k": 1,
    } | held_out | more  # fmt: skip


def checkpoints(root: Path) -> list[Path]:
    return list((root / "run/checkpoints").glob("*.ckpt"))


def at_step(root: Path, step: int) -> bool:
    return bool(list((root / "run/checkpoints").glob(f"epoch=*-step={step}.ckpt")))


def send(process, number: int) -> None:
    os.killpg(process.pid, number)


def begun(base: Path, root: Path, *more: str, **changes):
    argv = ["fit", "--config", str(config(base, root, **changes)), "--ckpt_path", "last", *more]
    return argv, partial(started, argv, root / "log")


def ended(process, status: int, text: str, limit: float = 60.0) -> None:
    process.join(limit)
    code = process.exitcode
    process.kill()
    assert code == status, (code, text[-3000:])
    assert "Traceback" not in text and "Error" not in text, text[-3000:]


def goes_on(base: Path, root: Path, argv: list[str], **changes) -> None:
    """The same command ends where a run that was let alone does, with the same weights, losses and scores."""
    run(base, root / "whole", **changes)
    assert main(argv) == 0
    assert_same(root / "cut", root / "whole")
    if changes.get("data__val"):
        assert scalars(root / "cut", "val/loss") == scalars(root / "whole", "val/loss")
    found, expected = losses(root / "cut"), losses(root / "whole")
    assert len(found) >= len(expected) - 1  # Lightning logs a step after its end, and the run ends there
    assert set(found) <= set(expected)


# -- fit ---------------------------------------------------------------------------------------------------------


def stopped_by_ctrl_c(base: Path, root: Path, **changes) -> None:
    terminal = Terminal()
    argv, start = begun(base, root / "cut", **changes)
    process = start(prepare=partial(on_terminal, terminal.name))
    wait(process, lambda: at_step(root / "cut", 2))
    terminal.type(CTRL_C)
    process.join(60)
    ended(process, 130, terminal.text)
    last = root / "cut/run/checkpoints/last.ckpt"
    assert f"--ckpt_path {last}" in terminal.text.replace("\r\n", "\n")
    terminal.close()
    goes_on(base, root, argv, **changes)


def test_ctrl_c_in_a_terminal_saves_the_step_under_way(base, tmp_path):
    stopped_by_ctrl_c(base, tmp_path, **settings(base, 2))


def test_sigterm_to_all_processes_in_a_validation_saves_and_the_validation_is_done_again(base, tmp_path):
    changes = settings(base, 1, validated=True, trainer__max_epochs=1)
    argv, start = begun(base, tmp_path / "cut", **changes)
    process = start(prepare=in_own_group)
    wait(process, lambda: at_step(tmp_path / "cut", 4))  # the last of the epoch
    time.sleep(0.3)
    send(process, signal.SIGTERM)
    process.join(60)
    ended(process, 143, (tmp_path / "cut/log").read_text())
    goes_on(base, tmp_path, argv, **changes)


def test_a_lost_terminal_saves_the_step_under_way(base, tmp_path):
    changes = settings(base, 0, trainer__max_epochs=30)
    terminal = Terminal()
    _, start = begun(base, tmp_path, **changes)
    process = start(prepare=partial(on_terminal, terminal.name))
    wait(process, lambda: at_step(tmp_path, 2))
    terminal.close()
    ended(process, 129, terminal.text)
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] < 120


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("step", [2, 4, 5])
def test_ctrl_c_at_any_time(base, tmp_path, workers, validated, step):
    changes = settings(base, workers, validated, trainer__val_check_interval=3 if validated else 1.0)
    terminal = Terminal()
    argv, start = begun(base, tmp_path / "cut", **changes)
    process = start(prepare=partial(on_terminal, terminal.name))
    wait(process, lambda: at_step(tmp_path / "cut", step))
    time.sleep(0.5 if validated else 0)
    terminal.type(CTRL_C)
    process.join(60)
    ended(process, 130, terminal.text)
    goes_on(base, tmp_path, argv, **changes)


def with_slow_validation(mark: Path) -> None:
    """Begin a group of processes, and let each batch of a validation take a second and leave a mark."""
    in_own_group()
    step = LitInternVL.validation_step

    def slow(*arguments, **options):
        mark.touch()
        time.sleep(1)
        return step(*arguments, **options)

    LitInternVL.validation_step = slow


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_in_the_sanity_check_ends_at_once(base, tmp_path, number, workers):
    changes = settings(base, workers, validated=True, trainer__num_sanity_val_steps=60)
    _, start = begun(base, tmp_path, **changes)
    process = start(prepare=partial(with_slow_validation, tmp_path / "validating"))
    wait(process, lambda: (tmp_path / "validating").exists())
    send(process, number)
    process.join(20)
    ended(process, 128 + number, (tmp_path / "log").read_text())
    assert not checkpoints(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_ctrl_c_ends_at_once_and_the_last_whole_checkpoint_stays(base, tmp_path, workers):
    changes = settings(base, workers, trainer__accumulate_grad_batches=8, trainer__max_epochs=1000)
    terminal = Terminal()
    _, start = begun(base, tmp_path, **changes)
    process = start(prepare=partial(on_terminal, terminal.name))
    wait(process, lambda: checkpoints(tmp_path))
    os.kill(process.pid, signal.SIGSTOP)  # the second comes before the step has ended
    terminal.type(CTRL_C)
    time.sleep(0.4)
    known = {path: path.stat().st_mtime_ns for path in checkpoints(tmp_path)}
    os.kill(process.pid, signal.SIGCONT)
    begin = time.monotonic()
    while process.is_alive() and time.monotonic() < begin + 20:
        terminal.type(CTRL_C)
        time.sleep(0.1)
    ended(process, 130, terminal.text)
    assert known and all(damage(path) is None for path in checkpoints(tmp_path))


# -- predict -----------------------------------------------------------------------------------------------------


def stopped_prediction(base: Path, root: Path, number: int, status: int, workers: int) -> None:
    write_rows(base / "data", 60, "long.jsonl")
    path = config(base, root, data__num_workers=workers, model__generation={"max_new_tokens": 16})
    argv = ["predict", "--config", str(path), "--data.predict", str(base / "data/long.jsonl")]
    argv += ["--predictions.file", str(root / "answers.jsonl"), "--model.batching.rows", "1"]
    process = started(argv, root / "log", prepare=in_own_group)
    part = root / "answers.jsonl.part0"
    wait(process, lambda: part.exists() and part.read_bytes().count(b"\n") > 2)
    send(process, number)
    process.join(30)
    text = (root / "log").read_text()
    ended(process, status, text)
    done = part.read_bytes().count(b"\n")
    assert 2 < done < 60 and f"{done} of 60" in text
    assert main(argv) == 0
    rows = [json.loads(line) for line in (root / "answers.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(60))


def test_ctrl_c_ends_a_prediction_which_goes_on(base, tmp_path):
    stopped_prediction(base, tmp_path, signal.SIGINT, 130, 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_prediction_which_goes_on(base, tmp_path, number, status, workers):
    stopped_prediction(base, tmp_path, number, status, workers)
