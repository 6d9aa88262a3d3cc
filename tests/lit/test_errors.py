"""A run that ends with an error has saved what was trained; a misspelt number is told before the first step."""

from importlib import import_module
from typing import Any

import pytest
import torch

from ivl.__main__ import main
from ivl.lit.module import LitInternVL
from ivl.types import UserError
from tests.lit.callbacks.test_checkpoint import COMMON, assert_same, run
from tests.lit.rows import write_rows
from tests.lit.test_runs import config, scalars


def settings(base, **more) -> dict:
    """Four steps of two micro-batches an epoch, and no checkpoint but the last of an epoch."""
    write_rows(base / "data", 16, "sixteen.jsonl")
    changes = {"data__train": str(base / "data/sixteen.jsonl"), "data__batch_size": 2, "trainer__max_epochs": 2}
    return COMMON | changes | {"data__val": None, "trainer__accumulate_grad_batches": 2} | more


def failing(monkeypatch, method: str, call: int, error: BaseException, owner: Any = LitInternVL) -> None:
    """`owner.method` raises `error` at its n-th call, and never again."""
    calls, real = iter(range(1, 10**6)), getattr(owner, method)

    def wrapped(*args, **given):
        if next(calls) == call:
            raise error
        return real(*args, **given)

    monkeypatch.setattr(owner, method, wrapped)


def argv_of(base, root, **changes) -> list[str]:
    return ["fit", "--config", str(config(base, root, **changes)), "--ckpt_path", "last"]


@pytest.mark.parametrize(
    ("call", "error", "status", "step"),
    [
        (12, UserError("row.jsonl:3: cannot be read"), 2, 5),
        (13, torch.OutOfMemoryError("CUDA out of memory"), 2, 6),
        (9, MemoryError(), 2, 4),
        pytest.param(14, RuntimeError("anything"), 1, 6, marks=pytest.mark.slow),
    ],
)
def test_the_state_is_saved_before_the_program_ends(base, tmp_path, monkeypatch, caplog, call, error, status, step):
    changes = settings(base)
    run(base, tmp_path / "whole", **changes)
    argv = argv_of(base, tmp_path / "cut", **changes)
    with monkeypatch.context() as patch:
        failing(patch, "training_step", call, error)
        if status == 2:
            patch.setattr(LitInternVL, "training_step", guarded(LitInternVL.training_step))
        assert main(argv) == status
    last = tmp_path / "cut/run/checkpoints/last.ckpt"
    assert f"the state of step {step} is saved; go on with the same command and --ckpt_path" in caplog.text
    assert step == 4 or torch.load(last, weights_only=True)["global_step"] == step
    assert main(argv) == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")


def guarded(step):
    """Memory that runs out comes from inside the step."""

    def training_step(self, batch, batch_idx):
        self.batch = batch
        with self.memory("forward"):
            return step(self, batch, batch_idx)

    return training_step


def test_an_error_in_a_validation_loses_neither_the_step_nor_the_validation(base, tmp_path, monkeypatch):
    changes = settings(base, data__val=str(base / "data/val.jsonl"), data__eval_batch_size=1)
    run(base, tmp_path / "whole", **changes)
    argv = argv_of(base, tmp_path / "cut", **changes)
    with monkeypatch.context() as patch:
        failing(patch, "validation_step", 7, UserError("row.jsonl:3: cannot be read"))
        assert main(argv) == 2
    assert main(argv) == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")
    assert scalars(tmp_path / "cut", "val/loss") == scalars(tmp_path / "whole", "val/loss")


def test_weights_that_are_changed_in_part_are_not_saved(base, tmp_path, monkeypatch, caplog):
    failing(monkeypatch, "adam", 6, MemoryError(), import_module("torch.optim.adam"))
    argv = argv_of(base, tmp_path, **settings(base))
    assert main(argv) == 2
    assert "the state of step 1 is not saved: the error came while the optimizer" in caplog.text
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_error_at_the_end_costs_neither_the_last_step_nor_the_adapter(base, tmp_path, monkeypatch):
    from ivl.lit.callbacks.monitor import Watch

    failing(monkeypatch, "on_train_batch_end", 8, OSError(28, "No space left on device"), Watch)
    argv = argv_of(base, tmp_path, **settings(base, trainer__max_epochs=1))
    assert main(argv) != 0
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


# -- monitors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor", ["eval_loss", "val_loss", "val/los", "val/vqa"])
def test_a_number_that_is_not_logged_is_refused_before_the_first_step(base, tmp_path, capsys, monitor):
    assert main(["fit", "--config", str(config(base, tmp_path)), "--checkpoint.monitor", monitor]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        f"checkpoint.monitor {monitor}: no such number is logged; expected one of val/loss, val/exact, val/single/loss"
        in line
    )
    assert not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "run/trained.txt").exists()


def test_early_stopping_waits_for_a_number_that_is_logged_and_for_its_better_side(base, tmp_path, capsys):
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val_loss"}}
    argv = ["fit", "--config", str(config(base, tmp_path, trainer__callbacks=[stop]))]
    assert main(argv) == 2
    assert "EarlyStopping's monitor val_loss: no such number" in capsys.readouterr().err
    stop["init_args"] = {"monitor": "val/exact"}
    assert main(["fit", "--config", str(config(base, tmp_path, trainer__callbacks=[stop]))]) == 2
    assert "EarlyStopping: monitor val/exact: expected mode max, found min" in capsys.readouterr().err


@pytest.mark.parametrize("monitor", ["lr/x", "memory/x", "memory/device_gib", "speed/mfu", ""])
def test_names_that_depend_on_the_optimizer_or_the_device_are_checked_before_the_first_step(
    base, tmp_path, capsys, monitor
):
    assert main(["fit", "--config", str(config(base, tmp_path)), "--checkpoint.monitor", monitor]) == 2
    assert f"checkpoint.monitor {monitor or repr('')}: no such number is logged" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_worst_checkpoint_is_not_kept_as_the_best(base, tmp_path, capsys):
    argv = ["--checkpoint.monitor", "val/loss", "--checkpoint.mode", "max"]
    assert main(["fit", "--config", str(config(base, tmp_path)), *argv]) == 2
    assert "checkpoint: monitor val/loss: expected mode min, found max" in capsys.readouterr().err


def test_numbers_that_are_logged_may_be_monitored(base, tmp_path):
    for n, monitor in enumerate(["val/loss", "val/exact", "val/grounding/iou", "train/loss", "lr/language_model"]):
        argv = ["fit", "--config", str(config(base, tmp_path / str(n))), "--checkpoint.monitor", monitor]
        assert main(argv) == 0
        names = sorted(path.name for path in (tmp_path / f"{n}/run/checkpoints").iterdir())
        assert names == ["epoch=0-step=3.ckpt", "last.ckpt"]
