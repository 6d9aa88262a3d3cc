"""Layers over several devices of one process compute what one device does."""

from pathlib import Path

import pytest
import torch
import yaml

from ivl.__main__ import main
from ivl.finetune import tune as tuning
from tests.lit.rows import write_rows
from tests.lit.test_runs import REPO, config, losses, scalars
from tests.second import SecondDevice
from tests.tiny import write_checkpoint

SPLIT = REPO / "configs/strategy/layer_split.yaml"
TUNES = {
    "lora": {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 4, "dropout": 0.2}},
    "full": {"vision_model": "full", "mlp1": "full", "language_model": "full"},
}
LAYERS = "language_model.model.layers"
MAP = {"": "cpu", "vision_model.encoder.layers.1": "meta", f"{LAYERS}.1": "meta", f"{LAYERS}.2": "meta"}
"""There, back, there again, and back"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model", llm={"num_hidden_layers": 4})
    write_rows(folder / "data", 16)
    write_rows(folder / "data", 5, "val.jsonl")
    (folder / "map.yaml").write_text(yaml.safe_dump(MAP))
    return folder


def settings(tune: str, **changes) -> dict:
    """20 steps of two micro-batches, clipped; every fourth row is text alone."""
    return {
        "data__batch_size": 2,
        "data__val": None,
        "model__tune": TUNES[tune],
        "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
        "trainer__max_epochs": 5,
        "trainer__accumulate_grad_batches": 2,
        "trainer__gradient_clip_val": 0.1,
        "checkpoint__every_n_train_steps": 1,
        "checkpoint__save_top_k": -1,
    } | changes


def fit(base: Path, root: Path, *more: str, **changes) -> None:
    assert main(["fit", "--config", str(config(base, root, **changes)), *more]) == 0


def over(*options: str) -> list[str]:
    return ["--config", str(SPLIT), *options]


def two(base: Path) -> list[str]:
    return over("--trainer.strategy.device_map", str(base / "map.yaml"))


def checkpoint(root: Path, name: str = "last") -> dict:
    return torch.load(root / f"run/checkpoints/{name}.ckpt", weights_only=True)


def assert_close(a: Path, b: Path, atol: float) -> None:
    found, expected = checkpoint(a)["state_dict"], checkpoint(b)["state_dict"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0)


@pytest.fixture
def same_start(monkeypatch):
    """Under `SecondDevice` a model without weights draws numbers as well; a LoRA shall begin with the same ones."""
    apply = tuning.apply

    def seeded(*args) -> None:
        torch.manual_seed(7)
        apply(*args)

    monkeypatch.setattr(tuning, "apply", seeded)


MORE = [("lora", True), ("full", False)]


@pytest.mark.parametrize(
    ("tune", "recomputed"),
    [("lora", False), ("full", True), *(pytest.param(*ids, marks=pytest.mark.slow) for ids in MORE)],
)
def test_two_devices_equal_one(base, tmp_path, same_start, tune, recomputed):
    changes = settings(tune, model__checkpointing={"vision_model": recomputed, "language_model": recomputed})
    if recomputed and tune == "lora":  # torch keeps no random state for a device of this name
        changes["model__tune"] = TUNES["lora"] | {"language_model": {"rank": 4}}
    fit(base, tmp_path / "one", **changes)
    with SecondDevice():
        fit(base, tmp_path / "two", *two(base), **changes)
    expected = losses(tmp_path / "one")
    assert len(expected) == 20
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-5)
    assert scalars(tmp_path / "two", "train/grad_norm") == pytest.approx(
        scalars(tmp_path / "one", "train/grad_norm"), rel=1e-4
    )
    assert_close(tmp_path / "two", tmp_path / "one", atol=1e-4)


def test_a_split_run_resumes_exactly_and_validates_and_answers(base, tmp_path):
    """Also on one device, and one that began on one device."""
    changes = settings("lora", trainer__max_epochs=2, data__val=str(base / "data/val.jsonl"))
    with SecondDevice():
        fit(base, tmp_path / "two", *two(base), **changes)
        saved = str(next((tmp_path / "two/run/checkpoints").glob("epoch=0-step=3*.ckpt")))
        fit(base, tmp_path / "again", *two(base), "--ckpt_path", saved, **changes)
    assert losses(tmp_path / "again") == losses(tmp_path / "two")[3:]
    assert_close(tmp_path / "again", tmp_path / "two", atol=0)
    fit(base, tmp_path / "one", "--ckpt_path", saved, **changes)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two")[3:], abs=1e-5)
    last = str(tmp_path / "two/run/checkpoints/last.ckpt")
    with SecondDevice():
        assert main(["validate", "--ckpt_path", last]) == 0
    strategies = {
        "split": ["--trainer.strategy.device_map", "null", "--trainer.strategy.devices", "[cpu, cpu]"],
        "whole": ["--trainer.strategy", "auto"],
    }
    answers = []
    for name, strategy in strategies.items():
        file = tmp_path / f"{name}.jsonl"
        rows = ["--data.predict", str(base / "data/val.jsonl"), "--predictions.file", str(file)]
        assert main(["predict", "--ckpt_path", last, *strategy, *rows]) == 0
        answers.append(file.read_text())
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 5


def test_layers_are_planned_by_what_the_run_takes(base, tmp_path, caplog):
    """On a CPU both devices are the same one, so all is equal bit for bit."""
    changes = settings("full", trainer__max_epochs=1)
    fit(base, tmp_path / "one", **changes)
    with caplog.at_level("INFO"):
        fit(base, tmp_path / "two", *over("--trainer.strategy.devices", "[cpu, cpu]"), **changes)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one", atol=0)
    (said,) = [r.getMessage() for r in caplog.records if "layers over devices" in r.getMessage()]
    assert "lm_head" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["devices", "[cpu, cpu]", "device_max_memory", "[1MB, 1MB]"], "devices: the model takes about"),
        (["devices", "[cpu, cpu]", "device_map", "x.yaml"], "device_map: says where everything goes"),
        (["device_map", "absent.yaml"], "absent.yaml: cannot be read"),
        (["devices", "0"], "LayerSplit finds no GPU here; expected two or more"),
    ],
)
def test_mistakes(base, tmp_path, capsys, options, message):
    argv = [f"--trainer.strategy.{word}" if n % 2 == 0 else word for n, word in enumerate(options)]
    path = config(base, tmp_path, **settings("full"))
    assert main(["fit", "--config", str(path), *over(*argv)]) == 2
    assert message in capsys.readouterr().err


def test_more_processes_are_refused(base, tmp_path, capsys):
    path = config(base, tmp_path, **settings("lora"))
    assert main(["fit", "--config", str(path), *over("--trainer.devices", "2")]) == 2
    assert "trainer.devices: 2 on 1 machines; expected 1" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("tune", TUNES)
def test_on_two_gpus(base, tmp_path, tune):
    """Recomputed with dropout as well: each device has random numbers of its own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    changes = settings(tune, trainer__accelerator="gpu")
    fit(base, tmp_path / "two", *over("--trainer.strategy.devices", "2"), **changes)
    both = {"model__checkpointing": {"vision_model": True, "language_model": True}}
    fit(base, tmp_path / "again", *over("--trainer.strategy.devices", "2"), **changes | both)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "two"), abs=1e-3)
    if tune == "full":
        fit(base, tmp_path / "one", **changes)
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
