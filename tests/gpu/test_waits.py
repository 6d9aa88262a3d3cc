"""A GPU is never waited for within a step: torch raises where the host would wait."""

from contextlib import contextmanager

import pytest
import torch

from ivl.finetune.tune import apply
from ivl.lit.training.loss_normalizer import LOSS_UNIT, clip, scale, total_norm
from ivl.model.internvl import InternVL
from ivl.model.loss import loss_weights
from ivl.options import LoRA, Tune
from tests.model.test_waiting import batch_of
from tests.tiny import write_checkpoint


@contextmanager
def no_waits(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "architecture", ["Qwen2ForCausalLM", "InternLM2ForCausalLM", "Phi3ForCausalLM", "Qwen3MoeForCausalLM"]
)
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("tune", [Tune("full", "full", "full"), Tune(language_model=LoRA(4))], ids=["full", "lora"])
def test_a_whole_step(tmp_path, device, architecture, is_packed, tune):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path, architecture), dtype="bfloat16", device=device)
    apply(model, tune)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = batch_of(model, is_packed)
    batch = batch.pin_memory() if device.type == "cuda" else batch

    def step() -> torch.Tensor:
        on_device = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            weights = loss_weights(on_device.labels, on_device.row_ids, len(on_device), "square")
            out = model(**on_device, loss_weights=weights)
        (out.loss_sum / LOSS_UNIT).backward()
        grads = [p.grad for p in trained if p.grad is not None]
        scale(grads, LOSS_UNIT / out.weight_sum.clamp(min=1))
        norm = total_norm(grads)
        clip(grads, 1.0, norm)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad()
        return out.loss_sum.detach()

    step()  # workspaces, tables and moments are made
    with no_waits(device):
        loss = step()
    assert torch.isfinite(loss)
