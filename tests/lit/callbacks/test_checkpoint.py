"""A run that was stopped goes on as if it had not: files that are whole, the same batches, losses and weights."""

import io
import json
import os
import random
import signal
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from ivl.__main__ import main
from ivl.checkpoint.ckpt_file import damage
from ivl.checkpoint.newest import newest_checkpoint
from ivl.lit.callbacks.checkpoint import Checkpoints
from ivl.lit.loaders import Pace
from ivl.lit.run.random_state import random_state, set_random_state
from tests.lit import test_runs
from tests.lit.processes import started, wait
from tests.lit.rows import write_rows
from tests.lit.test_runs import config, losses

LORA = {"vision_model": "full", "mlp1": "full", "language_model": {"rank": 2, "dropout": 0.3}}
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
COMMON = {"model__tune": LORA, "model__optimizer": ADAM, "trainer__max_epochs": 3, "trainer__gradient_clip_val": 1.0}


def run(base: Path, root: Path, *more: str, **changes) -> None:
    assert main(["fit", "--config", str(config(base, root, **COMMON | changes)), *more]) == 0


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def assert_same(root: Path, whole: Path) -> None:
    found, expected = weights(root), weights(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def mixture(base: Path) -> list[dict]:
    write_rows(base / "data", 9, "first.jsonl")
    write_rows(base / "data", 7, "second.jsonl")
    return [
        {"path": str(base / "data/first.jsonl"), "repeat": 0.7},
        {"path": str(base / "data/second.jsonl"), "repeat": 1.5},
    ]


def kinds(base: Path) -> dict[str, dict]:
    write_rows(base / "data", 14, "many.jsonl")
    rows = {"data__train": str(base / "data/many.jsonl"), "trainer__accumulate_grad_batches": 2}
    return {
        "padded": rows | {"data__batch_size": 2},
        "grouped": rows | {"data__batch_size": 2, "data__group_by_length": True},
        "packed": rows | {"data__packing": True, "data__pack_tokens": 600},
        "mixed": rows | {"data__train": None, "data__mixture": mixture(base), "data__batch_size": 2},
        "by steps": rows | {"data__batch_size": 2, "trainer__max_steps": 9, "trainer__max_epochs": -1},
        # A validation in the middle of a window: its checkpoint holds the position where the window began.
        "validated": rows
        | {"data__batch_size": 2, "trainer__val_check_interval": 3, "checkpoint__monitor": "val/loss"},
    }


EACH = {"checkpoint__save_top_k": -1, "checkpoint__every_n_train_steps": 1}


def resumes_exactly(base: Path, root: Path, kind: str, workers: int, picked: list[int] | None = None, **more) -> None:
    changes = kinds(base)[kind] | {"data__num_workers": workers, "data__val": None} | more
    if kind == "validated":
        changes |= {"data__val": str(base / "data/val.jsonl"), "checkpoint__save_top_k": -1}
    else:
        changes |= EACH
    run(base, root / "whole", **changes)
    steps = {}
    for path in (root / "whole/run/checkpoints").glob("epoch*.ckpt"):
        steps[torch.load(path, weights_only=True)["global_step"]] = path
    assert len(steps) > 4
    expected = losses(root / "whole")
    if kind == "by steps":
        del steps[9]  # from there nothing is left to do, and nothing is written
    for step in sorted(steps) if picked is None else picked:
        path = steps[step]
        again = root / f"from{step}"
        run(base, again, "--ckpt_path", str(path), **changes)
        if step < len(expected):
            assert losses(again) == expected[step:], (step, path)
        assert_same(again, root / "whole")


@pytest.mark.parametrize(("kind", "picked"), [("padded", [4, 6]), ("packed", [2]), ("validated", [5])])
def test_a_resumed_run_equals_the_uninterrupted_one(base, tmp_path, kind, picked):
    resumes_exactly(base, tmp_path, kind, 0, picked)


def test_more_workers_on_the_way_change_nothing(base, tmp_path, monkeypatch):
    resumes_exactly(base, tmp_path / "plain", "padded", 0, [])
    paces = []
    monkeypatch.setattr(Pace, "of", lambda *_: paces.append(Pace(1, 2, window=1, tolerated=-1.0)) or paces[-1])
    resumes_exactly(base, tmp_path / "paced", "padded", None, [2])
    assert {pace.workers for pace in paces} == {2}
    assert losses(tmp_path / "paced/whole") == losses(tmp_path / "plain/whole")
    assert_same(tmp_path / "paced/whole", tmp_path / "plain/whole")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["padded", "grouped", "packed", "mixed", "by steps", "validated"])
def test_a_run_resumes_exactly_from_every_step(base, tmp_path, kind, workers):
    resumes_exactly(base, tmp_path, kind, workers)


def test_saved_before_the_first_step_a_resumed_run_keeps_the_random_state(base, tmp_path):
    """Resumed at the end of an epoch, a run saves once before any step: that checkpoint is no less exact."""
    changes = kinds(base)["packed"] | EACH | {"data__val": None, "trainer__max_epochs": 3}
    run(base, tmp_path / "whole", **changes)
    ends = (tmp_path / "whole/run/checkpoints").glob("epoch=0-*.ckpt")
    path = max(ends, key=lambda p: torch.load(p, weights_only=True)["global_step"])
    torch.manual_seed(99)
    kept = Checkpoints()
    progress = SimpleNamespace(is_last_batch=True, current=SimpleNamespace(ready=0, processed=0, completed=0))
    trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        num_training_batches=1,
        state=SimpleNamespace(fn="validate"),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    loaded = torch.load(path, weights_only=True)
    kept.on_load_checkpoint(trainer, None, loaded)
    again = {"loops": loaded["loops"]}
    kept.on_save_checkpoint(trainer, None, again)
    assert torch.equal(again["random"][0]["torch"], loaded["random"][0]["torch"])


def test_a_run_resumed_at_the_end_of_an_epoch_is_resumed_again(base, tmp_path):
    changes = kinds(base)["packed"] | EACH | {"data__val": None, "trainer__max_epochs": 3}
    run(base, tmp_path / "whole", **changes)
    steps = torch.load(tmp_path / "whole/run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    first = steps // 3
    for n, start in enumerate((first, 2 * first, 2 * first + 1)):
        (path,) = (tmp_path / ("whole" if n == 0 else "again0") / "run/checkpoints").glob(f"*-step={start}.ckpt")
        run(base, tmp_path / f"again{n}", "--ckpt_path", str(path), **changes)
        assert losses(tmp_path / f"again{n}") == losses(tmp_path / "whole")[start:]
        assert_same(tmp_path / f"again{n}", tmp_path / "whole")


# -- processes that end before their time --------------------------------------------------------------------------


def saved_more(folder: Path, known: set[Path]) -> bool:
    return bool(set(folder.glob("*.ckpt")) - known)


def killed(base: Path, root: Path, count: int, seed: int, **changes) -> None:
    """Kill a run `count` times, resume it each time, let it end; its weights are those of a run that was let alone.

    In turn: at any moment from the start on, while a checkpoint is being written, and at any moment after one.
    """
    last_two = {"checkpoint__save_top_k": 2, "checkpoint__monitor": "step", "checkpoint__mode": "max"}
    changes = kinds(base)["packed"] | EACH | last_two | {"data__val": None} | changes
    run(base, root / "whole", **changes)
    argv = ["fit", "--config", str(config(base, root / "cut", **COMMON | changes)), "--ckpt_path", "last"]
    folder, draw, moments = root / "cut/run/checkpoints", random.Random(seed), []
    for n in range(count):
        expected, log = newest_checkpoint([folder]), root / f"{n}.log"
        process = started(argv, log)
        if n % 3 == 0:
            time.sleep(draw.uniform(0, 4))
        else:
            wait(process, partial(saved_more, folder, set(folder.glob("*.ckpt"))))
        if n % 3 == 1:
            for _ in range(draw.randrange(4)):
                wait(process, lambda: not list(folder.glob(".*.part")))
                wait(process, lambda: list(folder.glob(".*.part")))
        elif n % 3 == 2:
            time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        moments.append(bool(list(folder.glob(".*.part"))))
        assert all(damage(path) is None for path in folder.glob("*.ckpt"))
        assert expected is None or n % 3 == 0 or f"--ckpt_path last: {expected}" in log.read_text()
    process = started(argv, root / "last.log")
    process.join()
    assert process.exitcode == 0, (root / "last.log").read_text()
    assert_same(root / "cut", root / "whole")
    assert any(moments), "no kill fell into the writing of a checkpoint"


def test_killed_at_any_moment_a_run_loses_nothing_that_was_saved(base, tmp_path):
    killed(base, tmp_path, 3, seed=0, trainer__max_epochs=15)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_thirty_times(base, tmp_path, workers):
    killed(base, tmp_path, 30, seed=1, trainer__max_epochs=100, data__num_workers=workers)


@pytest.mark.parametrize(
    ("number", "status"),
    [pytest.param(signal.SIGTERM, 143, id="TERM"), pytest.param(signal.SIGINT, 130, id="INT", marks=pytest.mark.slow)],
)
def test_a_signal_ends_the_step_and_saves(base, tmp_path, number, status):
    changes = kinds(base)["padded"] | {"data__val": None, "trainer__max_epochs": 8}
    run(base, tmp_path / "whole", **changes)
    argv = ["fit", "--config", str(config(base, tmp_path / "cut", **COMMON | changes)), "--ckpt_path", "last"]
    process = started(argv, tmp_path / "log")
    wait(process, lambda: list((tmp_path / "cut/run/checkpoints").glob("*.ckpt")))  # of the first epoch
    os.kill(process.pid, number)
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == status, said
    last = tmp_path / "cut/run/checkpoints/last.ckpt"
    assert f"--ckpt_path {last}" in said and "Traceback" not in said and "weights_only" not in said
    assert torch.load(last, weights_only=True)["global_step"] < 32
    assert main(argv) == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_several_are_kept_without_a_number_to_choose_by(base, tmp_path):
    """The newest, as other trainers' save_total_limit does; Lightning alone refuses."""
    test_runs.fit(base, tmp_path, checkpoint__save_top_k=2, checkpoint__every_n_train_steps=1)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "epoch=0-step=2.ckpt", "epoch=0-step=3.ckpt", "last.ckpt",
    ]  # fmt: skip


def test_last_passes_over_broken_checkpoints_and_says_so(base, tmp_path, capsys):
    run(base, tmp_path, **kinds(base)["padded"] | EACH | {"data__val": None, "trainer__max_epochs": 1})
    *_, second, newest = sorted((tmp_path / "run/checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    second.write_bytes(data)
    newest.write_bytes(newest.read_bytes()[:-100])
    argv = ["fit", "--config", str(config(base, tmp_path, **COMMON | kinds(base)["padded"]))]
    assert main([*argv, "--ckpt_path", str(newest)]) == 2
    assert f"error: {newest}: not a whole checkpoint" in capsys.readouterr().err
    notices: list[str] = []
    assert newest_checkpoint([newest.parent], notices.append) not in (None, second, newest)
    assert {text.split(": ")[0] for text in notices if "passed over" in text} == {str(second), str(newest)}
    for path in newest.parent.glob("*.ckpt"):
        path.write_bytes(b"PK")
    assert main([*argv, "--ckpt_path", "last"]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


def test_beside_a_run_stand_its_versions_and_the_digests_of_its_data(base, tmp_path):
    run(base, tmp_path, trainer__max_epochs=1)
    found = json.loads((tmp_path / "run/versions.json").read_text())
    assert found["versions"]["torch"] == metadata.version("torch")
    assert set(found["data"]) == {str(base / "data/train.jsonl"), str(base / "data/val.jsonl")}


def test_random_numbers_go_on():
    kept = io.BytesIO()
    torch.save([random_state()], kept)
    draw = lambda: (torch.rand(3).tolist(), numpy.random.rand(), random.random())  # noqa: E731
    first = draw()
    kept.seek(0)
    set_random_state(torch.load(kept, weights_only=True), rank=1)
    assert draw() == first
