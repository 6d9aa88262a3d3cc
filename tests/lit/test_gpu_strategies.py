"""Strategies that Lightning lets run on GPUs alone, run on two processes of a CPU with its checks taken away.

What they do between processes is the same there. Not shown: that a checkpoint of classic FSDP goes on (on a CPU torch
saves one moment of Adam in the place of the other), and what is asynchronous on a GPU.
"""

import argparse
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from ivl.__main__ import main
from tests.lit.processes import finished, ranks
from tests.lit.test_runs import config, losses
from tests.lit.test_strategies import STRATEGIES, one, settings, state

TRANSFORMER = "[ivl.model.vision.Layer,transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer]"
WHOLE = ["--trainer.strategy.init_args.auto_wrap_policy", TRANSFORMER]
IN_MEMORY = [f"--trainer.strategy.init_args.offload_{what}=false" for what in ("optimizer", "parameters")]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"
)


# torch's own: two processes of a CPU, an FSDP module of two linear layers and `state_dict()` are enough.
old_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="classic FSDP's state dict on a CPU ends with a segmentation fault under torch 2.11",
)


def fsdp_on_cpu() -> None:
    import torch.distributed.fsdp.fully_sharded_data_parallel as fsdp
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
    from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle

    def handle(state, *_):
        state._device_handle = _FSDPDeviceHandle(torch.device("cpu"), torch.cpu)
        return state

    _AcceleratorConnector._check_strategy_and_fallback = lambda self: None
    fsdp._init_device_handle = handle


def deepspeed_on_cpu() -> None:
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import lightning.pytorch.strategies.deepspeed as lightning_deepspeed
    from lightning.pytorch.accelerators import CPUAccelerator

    lightning_deepspeed.CUDAAccelerator = CPUAccelerator
    lightning_deepspeed._validate_device_index_selection = lambda devices: None
    namespace = SimpleNamespace(Namespace=lambda device_rank: argparse.Namespace(device_rank=-1))
    lightning_deepspeed.argparse = namespace


def run(base: Path, root: Path, strategy: str, *more: str, **changes) -> None:
    """In two processes, each with half of the rows of a step."""
    given = yaml.safe_load((STRATEGIES / f"{strategy}.yaml").read_text())["trainer"]["strategy"]
    path = config(base, root, **changes | {"data__batch_size": 2, "trainer__strategy": given})
    prepare = deepspeed_on_cpu if "deepspeed" in strategy else fsdp_on_cpu
    finished(ranks(["fit", "--config", str(path), *more], root, prepare=prepare), root)


@pytest.mark.parametrize(
    ("strategy", "tune", "more"),
    [
        pytest.param("fsdp", "full", WHOLE, marks=old_torch),
        pytest.param("fsdp", "lora", [], marks=[pytest.mark.slow, old_torch]),
        pytest.param("fsdp", "lora", WHOLE, marks=[pytest.mark.slow, old_torch]),
        *(
            pytest.param(f"deepspeed_zero{stage}", tune, more, marks=needs_deepspeed)
            for stage, more in ((2, []), (3, IN_MEMORY))
            for tune in ("lora", "full")
        ),
    ],
)
def test_two_processes_equal_one(base, tmp_path, strategy, tune, more):
    """Losses and weights, with weight decay and clipping; what a run leaves is what other commands take."""
    changes = settings(base, tune, trainer__max_epochs=2)
    changes["model__optimizer"]["init_args"]["weight_decay"] = 0.3
    one(base, tmp_path / "one", **changes)
    run(base, tmp_path / "two", strategy, *more, **changes)
    expected = losses(tmp_path / "one")
    assert len(expected) == 8
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-5)
    checkpoints = tmp_path / "two/run/checkpoints"
    file = checkpoints / ("weights.pt" if "deepspeed" in strategy else "last.ckpt")
    found = torch.load(file, weights_only=True)["state_dict"]
    wanted = state(tmp_path / "one")["state_dict"]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=0)
    assert (tmp_path / "two/run/adapter/adapter_model.safetensors").is_file() == (tune == "lora")
    argv = ["predict", "--config", str(tmp_path / "one/config.yaml"), "--data.predict", str(base / "data/val.jsonl")]
    assert main([*argv, "--ckpt_path", str(file), "--predictions.file", str(tmp_path / "answers.jsonl")]) == 0
    out = tmp_path / "exported"
    assert main(["export", "--run", str(tmp_path / "two/run"), "--out", str(out)]) == 0
    assert (out / "config.json").is_file()


@needs_deepspeed
@pytest.mark.parametrize(("stage", "more"), [(2, []), (3, IN_MEMORY)])
def test_a_deepspeed_run_goes_on(base, tmp_path, stage, more, capsys):
    changes = settings(base, "lora", trainer__max_epochs=2)
    run(base, tmp_path / "run", f"deepspeed_zero{stage}", *more, **changes)
    saved = tmp_path / "run/run/checkpoints/epoch=0-step=3.ckpt"
    run(base, tmp_path / "again", f"deepspeed_zero{stage}", *more, "--ckpt_path", str(saved), **changes)
    first, second = (
        torch.load(tmp_path / name / "run/checkpoints/weights.pt", weights_only=True)["state_dict"]
        for name in ("run", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    assert main(["validate", "--config", str(config(base, tmp_path / "one")), "--ckpt_path", str(saved)]) == 2
    assert "a folder of DeepSpeed's, for its `fit` alone; take " in capsys.readouterr().err
