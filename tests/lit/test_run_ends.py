"""End of a run: which scores, checkpoints and adapters are offered; one run per folder."""

import multiprocessing

import pytest
import torch

from ivl.__main__ import main
from ivl.lit.run.lock import run_lock
from ivl.types import UserError
from tests.lit.rows import write_rows
from tests.lit.test_runs import config


def _holds(folder, held, done):
    with run_lock(folder):
        held.set()
        done.wait(60)


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(base, tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_holds, args=(tmp_path / "run/checkpoints", held, done))
    other.start()
    try:
        assert held.wait(60)
        argv = ["fit", "--config", str(config(base, tmp_path))]
        assert main(argv) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"another run (process {other.pid} on " in line
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".checkpoints.lock"]
        with pytest.raises(UserError, match="another run"), run_lock(tmp_path / "run/checkpoints"):
            pass
    finally:
        done.set()
        other.join()
    with run_lock(tmp_path / "run/checkpoints"):  # free again
        pass


def test_scores_at_the_end_are_not_those_of_the_sanity_check(base, tmp_path, capsys):
    """Two steps, and no validation falls into them."""
    changes = {"trainer__max_steps": 2, "trainer__max_epochs": -1, "trainer__num_sanity_val_steps": 2}
    assert main(["fit", "--config", str(config(base, tmp_path, **changes))]) == 0
    printed = capsys.readouterr().out
    assert "held-out rows: no validation fell into the run's 2 steps" in printed and "exact" not in printed
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert f"--ckpt_path {last} --data.predict FILE.jsonl  # step 2, the last" in printed


def test_the_best_and_the_last_are_both_offered(base, tmp_path, capsys):
    """The optimizer makes the loss worse: the best is not the last."""
    from ivl.checkpoint.ckpt_file import trained_state

    tune = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 2}}
    changes = {"model__tune": tune, "trainer__max_epochs": 3, "trainer__check_val_every_n_epoch": 1}
    changes |= {"model__optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3, "maximize": True}}}
    write_rows(base / "data", 8, "eight.jsonl")
    path = config(base, tmp_path, data__train=str(base / "data/eight.jsonl"), **changes)
    assert main(["fit", "--config", str(path), "--checkpoint.monitor", "val/loss"]) == 0
    run, printed = tmp_path / "run", capsys.readouterr().out
    (best,) = [p for p in (run / "checkpoints").glob("*.ckpt") if p.name != "last.ckpt"]
    assert torch.load(best, weights_only=True)["global_step"] < 6
    assert f"--ckpt_path {best} --data.predict FILE.jsonl  # step 2, the best by val/loss" in printed
    assert f"--ckpt_path {run}/checkpoints/last.ckpt --data.predict FILE.jsonl  # step 6, the last" in printed
    from safetensors.torch import load_file

    table = [line.split() for line in printed.splitlines() if line.split()[:1] in (["epoch"], ["1"], ["2"], ["3"])]
    assert table[0][:4] == ["epoch", "step", "time", "loss"] and "exact" in table[0]
    assert [line[:2] for line in table[1:]] == [["1", "2"], ["2", "4"], ["3", "6"]]
    assert all(line[4:6] == ["0.0", "%"] for line in table[1:]), table
    adapters = [load_file(run / name / "adapter_model.safetensors") for name in ("adapter", "adapter-best")]
    for adapter, path in zip(adapters, (run / "checkpoints/last.ckpt", best)):
        sums = sorted(float(tensor.abs().sum()) for tensor in adapter.values())
        assert sums == pytest.approx(sorted(float(tensor.abs().sum()) for tensor in trained_state(path).values()))
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "out"), "--adapter_only"]) == 0
    assert f"step 6; the best by val/loss is that of step 2: {best}" in capsys.readouterr().out
