"""Several processes compute what one computes, and each yaml under configs/strategy says what it means to."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ivl.__main__ import main
from tests.lit.processes import finished, ranks, wait
from tests.lit.rows import write_rows
from tests.lit.test_runs import REPO, config, losses

STRATEGIES = REPO / "configs/strategy"
TUNES = {
    "lora": {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 4}},
    "full": {"vision_model": "full", "mlp1": "full", "language_model": "full"},
}


MORE = [("fsdp2", "full"), ("ddp", "lora"), ("ddp", "full")]


def settings(base: Path, tune: str, **changes) -> dict:
    """20 steps of four rows, clipped; every fourth row is text alone, and labels are of unequal count."""
    write_rows(base / "data", 16, "sixteen.jsonl")
    return {
        "data__train": str(base / "data/sixteen.jsonl"),
        "data__val": None,
        "model__tune": TUNES[tune],
        "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "fused": True}},
        "trainer__max_epochs": 5,
        "trainer__gradient_clip_val": 1.0,
        "checkpoint__every_n_train_steps": 1,
        "checkpoint__save_top_k": -1,
    } | changes


def one(base: Path, root: Path, *more: str, **changes) -> None:
    assert main(["fit", "--config", str(config(base, root, data__batch_size=4, **changes)), *more]) == 0


def two(base: Path, root: Path, strategy: str, *more: str, **changes) -> None:
    """The same in two processes, each with one row at a time: four rows are two micro-batches of each."""
    changes |= {"data__batch_size": 1, "trainer__accumulate_grad_batches": 2}
    path = config(base, root, **changes)
    argv = ["fit", "--config", str(path), "--config", str(STRATEGIES / f"{strategy}.yaml"), *more]
    finished(ranks(argv, root), root)


def state(root: Path, name: str = "last") -> dict:
    return torch.load(root / f"run/checkpoints/{name}.ckpt", weights_only=True)


def assert_close(a: Path, b: Path, atol: float = 1e-5) -> None:
    found, expected = state(a)["state_dict"], state(b)["state_dict"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("strategy", "tune"),
    [("fsdp2", "lora"), *(pytest.param(*ids, marks=pytest.mark.slow) for ids in MORE)],
)
def test_two_processes_equal_one(base, tmp_path, strategy, tune):
    changes = settings(base, tune)
    one(base, tmp_path / "one", **changes)
    two(base, tmp_path / "two", strategy, **changes)
    expected = losses(tmp_path / "one")
    assert len(expected) == 20
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-5)
    assert_close(tmp_path / "two", tmp_path / "one", atol=1e-4)  # Adam turns the last bit of a gradient into a step
    if tune == "lora":
        assert (tmp_path / "two/run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_sharded_run_goes_on_under_any_number_of_processes(base, tmp_path):
    """Its checkpoint is a single file with whole tensors, and what it says does not depend on who wrote it."""
    changes = settings(base, "full", trainer__max_epochs=2)
    two(base, tmp_path / "two", "fsdp2", **changes)
    saved = tmp_path / "two/run/checkpoints/epoch=0-step=3.ckpt"
    two(base, tmp_path / "again", "fsdp2", "--ckpt_path", str(saved), **changes)
    for name, tensor in state(tmp_path / "two")["state_dict"].items():
        assert torch.equal(state(tmp_path / "again")["state_dict"][name], tensor), name
    # Where an epoch ends, one process can go on, and what it writes two can.
    ended = tmp_path / "two/run/checkpoints/epoch=0-step=4.ckpt"
    one(base, tmp_path / "one", "--ckpt_path", str(ended), **changes)
    assert_close(tmp_path / "one", tmp_path / "two", atol=1e-4)


def scalars(root: Path, *names: str) -> dict[str, list[float]]:
    events = EventAccumulator(str(root / "run"))
    events.Reload()
    return {name: [e.value for e in events.Scalars(name)] for name in names}


@pytest.mark.slow
def test_a_sharded_model_answers_as_a_whole_one(base, tmp_path):
    """Processes whose answers end at different steps, and that have no picture, wait for one another."""
    changes = settings(base, "full", trainer__max_epochs=1, model__generation={"max_new_tokens": 6})
    changes |= {"data__val": str(base / "data/val.jsonl")}
    two(base, tmp_path / "two", "fsdp2", **changes)
    one(base, tmp_path / "one", **changes)
    names = ("val/loss", "val/exact", "val/iou")
    expected = scalars(tmp_path / "one", *names)
    assert scalars(tmp_path / "two", *names) == {n: pytest.approx(v, abs=1e-5) for n, v in expected.items()}
    argv = ["predict", "--ckpt_path", str(tmp_path / "two/run/checkpoints/last.ckpt")]
    argv += ["--config", str(tmp_path / "one/config.yaml"), "--data.predict", str(base / "data/val.jsonl")]
    assert main([*argv, "--predictions.file", str(tmp_path / "answers.jsonl")]) == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
def test_layers_shared_by_two_processes_equal_one(base, tmp_path):
    changes = settings(base, "lora", trainer__max_epochs=1)
    one(base, tmp_path / "one", **changes)
    path = config(base, tmp_path / "two", data__batch_size=4, **changes)
    argv = ["fit", "--config", str(path), "--config", str(STRATEGIES / "fsdp2.yaml")]
    argv += ["--trainer.strategy.tensor_parallel_size", "2"]
    finished(ranks(argv, tmp_path / "two"), tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_of_them(base, tmp_path):
    changes = settings(base, "lora", trainer__max_epochs=200, checkpoint__save_top_k=1)
    path = config(base, tmp_path, data__batch_size=1, **changes)
    processes = ranks(["fit", "--config", str(path), "--config", str(STRATEGIES / "ddp.yaml")], tmp_path)
    wait(processes[0], lambda: list((tmp_path / "run/checkpoints").glob("*.ckpt")))
    processes[1].terminate()
    finished(processes, tmp_path, status=143)
    assert "--ckpt_path" in (tmp_path / "rank0.log").read_text()


@pytest.mark.parametrize("path", sorted(STRATEGIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_strategy_is_understood(base, tmp_path, path, capsys):
    """What a yaml names exists and takes its settings: the whole config is parsed, nothing is built."""
    argv = ["fit", "--config", str(config(base, tmp_path)), "--config", str(path), "--print_config"]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code in (0, None)
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    wanted = yaml.safe_load(path.read_text())["trainer"]["strategy"]
    if isinstance(wanted, str):
        assert found == wanted
    else:
        assert found["class_path"] == wanted["class_path"]
        assert wanted["init_args"].items() <= found["init_args"].items()


@pytest.mark.parametrize("given", ["strategy/deepspeed_zero2", "strategy/deepspeed_zero3", "deepspeed_stage_2"])
def test_deepspeed_that_is_not_installed_is_one_line(base, tmp_path, given, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else real(name, *a))
    option = ["--config", given] if "/" in given else ["--trainer.strategy", given]
    argv = ["fit", "--config", str(config(base, tmp_path)), *option, "--trainer.accelerator", "cpu"]
    assert main([*argv, "--trainer.devices", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: trainer.strategy ") and error.count("\n") == 1
    assert "pip install 'ivl[deepspeed]'" in error


def test_classic_fsdp_and_deepspeed_are_built(base):
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    FSDPStrategy(**yaml.safe_load((STRATEGIES / "fsdp.yaml").read_text())["trainer"]["strategy"]["init_args"])
    pytest.importorskip("deepspeed", reason="the package deepspeed is not installed")
    for stage in (2, 3):
        given = yaml.safe_load((STRATEGIES / f"deepspeed_zero{stage}.yaml").read_text())["trainer"]["strategy"]
        assert DeepSpeedStrategy(**given["init_args"]).config["zero_optimization"]["stage"] == stage


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_strategy_trains_on_a_gpu(base, tmp_path, strategy):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if "deepspeed" in strategy:
        pytest.importorskip("deepspeed", reason="the package deepspeed is not installed")
    changes = settings(base, "lora", trainer__accelerator="gpu", trainer__max_epochs=1)
    path = config(base, tmp_path, data__batch_size=4, **changes)
    argv = ["fit", "--config", str(path), "--config", str(STRATEGIES / f"{strategy}.yaml")]
    finished(ranks(argv, tmp_path, 1), tmp_path)
    one(base, tmp_path / "one", **changes)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
