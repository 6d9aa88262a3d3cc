"""Whole runs: what is logged, what is kept in which type, and how a run that goes wrong ends."""

import logging

import pytest
import torch
import yaml

from ivl.__main__ import main
from ivl.checkpoint.weights import Files, save_weights
from ivl.model.internvl import InternVL
from tests.lit.test_runs import REPO, config, fit, scalars
from tests.tiny import write_checkpoint

FUSED = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "weight_decay": 0.1, "fused": True}}


def events(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(root / "run"), size_guidance={"images": 0})
    found.Reload()
    return found


def test_what_is_watched_and_that_what_trains_stays_float32_under_bf16_true(base, tmp_path, capsys):
    state = fit(
        base,
        tmp_path,
        model__tune={"vision_model": {"last": 1}, "mlp1": "full", "language_model": {"rank": 4}, "head": "full"},
        model__rates={"mlp1": {"lr": 0.001}, "vision_model": {"lr": 0.0001, "layer_decay": 0.5}},
        model__optimizer=FUSED,
        model__neftune=5.0,
        model__metrics=["exact", "anls", "iou"],
        model__checkpointing={"vision_model": True, "language_model": True},
        checkpoint__monitor="val/anls",
        checkpoint__mode="max",
        trainer__callbacks=[
            {"class_path": "EarlyStopping", "init_args": {"monitor": "val/anls", "mode": "max", "patience": 50}}
        ],
        trainer__precision="bf16-true",
        trainer__gradient_clip_val=0.01,
        trainer__enable_progress_bar=True,
        trainer__max_epochs=2,
    )
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    kept = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    moments = [v for s in kept["optimizer_states"][0]["state"].values() for v in s.values() if torch.is_tensor(v)]
    assert {m.dtype for m in moments} == {torch.float32}
    found = events(tmp_path)
    tags = set(found.Tags()["scalars"])
    groups = ("vision_model.01", "vision_model.01_no_decay", "mlp1", "mlp1_no_decay", "language_model", "head")
    assert {f"lr/{name}" for name in groups} == {tag for tag in tags if tag.startswith("lr/")}
    assert tags >= {f"train/loss/{name}" for name in ("single", "turns", "grounding", "text")}
    assert tags >= {"val/anls", "val/text/anls", "val/grounding/iou", "val/single/loss", "memory/process_gib"}
    assert [e.value for e in found.Scalars("lr/mlp1")] == [torch.tensor(0.001).item()] * 6
    assert all(value > 0.01 for value in scalars(tmp_path, "train/grad_norm"))  # before clipping
    losses = scalars(tmp_path, "train/loss")
    assert losses[-1] < losses[0]
    written = (tmp_path / "run/trained.txt").read_text()
    assert "language_model.model.layers.0.self_attn.q_proj" in written and "LoRA on 14 layers" in written
    assert "vision_model.01_no_decay" in written
    printed = capsys.readouterr()
    assert "ANLS" in printed.out
    assert "tokens/s=" in printed.out + printed.err and "left=0:00" in printed.out + printed.err
    best = [path for path in (tmp_path / "run/checkpoints").glob("*.ckpt") if path.name != "last.ckpt"]
    scored = torch.load(best[0], weights_only=True)["callbacks"]
    assert any(s.get("monitor") == "val/anls" and s.get("best_model_score") is not None for s in scored.values())


def spoilt(folder):
    """A checkpoint whose vision tower gives NaN: rows with pictures have no finite loss, rows without have one."""
    model = InternVL.from_pretrained(write_checkpoint(folder))
    with torch.no_grad():
        model.vision_model.embeddings.class_embedding.fill_(float("nan"))
    for path in set(Files.of(folder).where.values()):
        path.unlink()
    save_weights(model.state_dict(), folder, "native", model.config, 10**9)
    return folder


def test_rows_that_are_not_finite_are_named_skipped_and_in_the_end_stop_the_run(base, tmp_path, capsys, caplog):
    common = {
        "model__pretrained": str(spoilt(tmp_path / "spoilt")),
        "model__tune": {"language_model": {"rank": 2}},
        "model__optimizer": FUSED,
        "data__batch_size": 1,
        "data__shuffle": False,
        "trainer__limit_val_batches": 0,
    }
    state = fit(base, tmp_path / "goes_on", **common)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)  # the text rows trained it
    assert "(row2)" in caplog.text and "(row3)" not in caplog.text
    path = config(base, tmp_path / "stops", model__stop_after_bad=3, **common)
    assert main(["fit", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "not finite 3 steps in a row, up to step 2; rows: " in error and "train.jsonl:3 (row2)" in error


def test_out_of_memory_names_rows_and_what_to_lower(base, tmp_path, capsys, monkeypatch):
    def forward(self, **batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(InternVL, "forward", forward)
    assert main(["fit", "--config", str(config(base, tmp_path, data__shuffle=False, data__batch_size=2))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for words in (
        "error: out of memory in forward, with 2 rows of ",
        "train.jsonl:1 (row0)",
        " tiles: ",
        "lower data.batch_size (2)",
        "data.max_tiles (",
        "model.checkpointing.language_model: true",
    ):
        assert words in error


def test_moments_of_eight_bits_stack_on_a_released_models_optimizer(base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    path = config(base, tmp_path, trainer__max_steps=2, trainer__limit_val_batches=0)
    raw = yaml.safe_load(path.read_text())
    raw["model"]["optimizer"] = yaml.safe_load((REPO / "configs/internvl2_2b.yaml").read_text())["model"]["optimizer"]
    path.write_text(yaml.safe_dump(raw))
    assert main(["fit", "--config", str(path), "--config", str(REPO / "configs/tune/adamw_8bit.yaml")]) == 0
    assert len(scalars(tmp_path, "train/loss")) == 2
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert any(t.dtype == torch.uint8 for t in tensors(state))


def test_a_released_models_optimizer_is_fused_but_under_a_loss_scale(base, tmp_path, caplog):
    raw = yaml.safe_load((REPO / "configs/internvl2_2b.yaml").read_text())["model"]["optimizer"]
    for precision, fused in (("bf16-mixed", True), ("16-mixed", False)):
        path = config(base, tmp_path / precision, model__optimizer=raw, trainer__max_steps=1, data__val=None)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert main(["fit", "--config", str(path), "--trainer.precision", precision]) == 0
        assert ("model.optimizer: not fused" in caplog.text) != fused
        saved = torch.load(tmp_path / precision / "run/checkpoints/last.ckpt", weights_only=True)
        assert saved["optimizer_states"][0]["param_groups"][0]["fused"] is fused


def tensors(state) -> list[torch.Tensor]:
    """All tensors of nested dictionaries: bitsandbytes keeps its own in one more."""
    if torch.is_tensor(state):
        return [state]
    return [t for value in state.values() for t in tensors(value)] if isinstance(state, dict) else []
