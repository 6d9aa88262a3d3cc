"""Runs of a mixture of experts: processes whose tokens go to different experts, the auxiliary loss, resuming."""

from pathlib import Path

import pytest
import torch

from ivl.__main__ import main
from ivl.checkpoint.weights import Files
from ivl.commands.export import export
from ivl.model.internvl import InternVL
from tests.lit.rows import write_rows
from tests.lit.test_runs import config, fit, losses, scalars
from tests.lit.test_strategies import assert_close, one, settings, two
from tests.model.rows import padded, rows
from tests.tiny import write_checkpoint

MOE = "Qwen3MoeForCausalLM"
EXPERTS = {"q_proj", "gate_up_proj", "down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model", MOE, llm={"num_experts": 32, "moe_intermediate_size": 8})
    write_rows(folder / "data")
    write_rows(folder / "data", 5, "val.jsonl")
    return folder


@pytest.mark.parametrize("tune", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_processes_whose_tokens_go_to_different_experts_do_not_wait_for_one_another(base, tmp_path, tune):
    """Some experts have no token on any process, others on one alone; two processes train as one does."""
    changes = settings(base, tune, trainer__max_epochs=1)
    changes["model__optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
    if tune == "lora":
        changes["model__tune"] = {"language_model": {"rank": 2, "targets": sorted(EXPERTS)}}
    one(base, tmp_path / "one", **changes)
    two(base, tmp_path / "two", "fsdp2", **changes)
    assert min(scalars(tmp_path / "two", "experts/unused")) > 0
    for tag in ("experts/unused", "experts/busiest"):
        assert scalars(tmp_path / "two", tag) == pytest.approx(scalars(tmp_path / "one", tag), abs=1e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert_close(tmp_path / "two", tmp_path / "one", atol=1e-4)


def test_the_auxiliary_loss_trains_balance_and_a_resumed_run_goes_on_exactly(base, tmp_path, capsys):
    changes = {
        "model__tune": {"language_model": {"rank": 2, "targets": sorted(EXPERTS)}, "vision_model": "frozen"},
        "model__router_aux_loss": 0.5,
        "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        "trainer__max_epochs": 2,
        "trainer__enable_progress_bar": True,
        "trainer__limit_val_batches": 0,
        "checkpoint__every_n_train_steps": 1,
        "checkpoint__save_top_k": -1,
    }
    whole = fit(base, tmp_path / "whole", **changes)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in whole} == EXPERTS
    assert whole["model.language_model.model.layers.0.mlp.experts.down_proj.lora_A.default.weight"].shape == (32, 2, 8)
    assert "busiest expert=" in "".join(capsys.readouterr())
    aux = scalars(tmp_path / "whole", "train/router_aux_loss")
    assert aux[-1] < aux[0]
    without = fit(base, tmp_path / "without", **changes | {"model__router_aux_loss": 0.0})
    name = "model.language_model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert not torch.equal(without[name], whole[name])
    saved = tmp_path / "whole/run/checkpoints/epoch=0-step=2.ckpt"
    again = fit(base, tmp_path / "again", "--ckpt_path", str(saved), **changes)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_an_auxiliary_loss_without_experts_is_refused(tmp_path, capsys):
    write_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "data")
    path = config(tmp_path, tmp_path / "run", model__router_aux_loss=0.1, data__val=None)
    assert main(["fit", "--config", str(path)]) == 2
    assert "model.router_aux_loss: 0.1, and this model has no experts" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["released", "hf"])
def test_experts_trained_in_full_are_exported_one_by_one(base, tmp_path, layout):
    tune = {"vision_model": "frozen", "mlp1": "frozen", "language_model": "full"}
    changes = {"model__tune": tune, "trainer__max_steps": 2, "trainer__limit_val_batches": 0}
    fit(base, tmp_path, **changes)
    export(str(tmp_path / "out"), run=str(tmp_path / "run/checkpoints/last.ckpt"), layout=layout)
    prefix = {"released": "language_model.model", "hf": "model.language_model"}[layout]
    names = Files.of(tmp_path / "out").where
    assert (
        f"{prefix}.layers.1.mlp.experts.31.gate_proj.weight" in names and f"{prefix}.layers.1.mlp.gate.weight" in names
    )
    before, after = (InternVL.from_pretrained(path) for path in (base / "model", tmp_path / "out"))
    batch = padded(rows(before))
    with torch.no_grad():
        old, new = (model(**batch, return_logits=True).logits for model in (before, after))
    assert not torch.allclose(old, new[..., : old.shape[-1]])
