"""A GPU computes what the CPU does: logits, losses, gradients and answers, of every family."""

import pytest
import torch

from ivl.finetune.tune import apply
from ivl.inference.engine import Engine
from ivl.inference.generate import requests_of
from ivl.model.internvl import InternVL
from ivl.options import Batching, LoRA, Tune
from tests.model.rows import packed, padded, rows
from tests.tiny import FAMILIES, write_checkpoint


def pair_of_models(folder, device, dtype="float32"):
    """The model on the CPU in float32, and on the device."""
    return InternVL.from_pretrained(folder), InternVL.from_pretrained(folder, dtype=dtype, device=device)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_losses_and_gradients(tmp_path, device, architecture):
    cpu, gpu = pair_of_models(write_checkpoint(tmp_path, architecture), device)
    made = rows(cpu)
    for batch in (padded(made, extra=3), packed(made, extra=3)):
        found = []
        for model, of_model in ((cpu, batch), (gpu, batch.to(device))):
            model.zero_grad()
            out = model(**of_model, return_logits=True)
            out.loss.backward()
            grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
            found.append((out.logits.detach().cpu(), out.loss.detach().cpu(), grads))
        torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1][1], found[0][1], atol=1e-5, rtol=1e-5)
        assert found[0][2].keys() == found[1][2].keys()
        for name, grad in found[0][2].items():
            torch.testing.assert_close(found[1][2][name], grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_bfloat16(tmp_path, device, architecture):
    """Packed rows take another kernel than padded ones: both stay near float32, and near each other."""
    cpu, gpu = pair_of_models(write_checkpoint(tmp_path, architecture), device, "bfloat16")
    made = rows(cpu)
    with torch.no_grad():
        expected = float(cpu(**padded(made)).loss)
        found = [float(gpu(**batch.to(device)).loss) for batch in (padded(made), packed(made))]
    assert found == pytest.approx([expected, expected], abs=0.05)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_step_of_the_optimizer_in_autocast(tmp_path, device, name):
    """Frozen weights in bfloat16, what trains in float32, the fused AdamW."""
    tune = Tune("full", "full", "full") if name == "full" else Tune(language_model=LoRA(4, dropout=0.0))
    folder, losses = write_checkpoint(tmp_path), {}
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = InternVL.from_pretrained(folder, dtype="bfloat16", device=where)
        apply(model, tune)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        batch = packed(rows(model)).to(where)
        losses[where] = []
        for _ in range(4):
            with torch.autocast(where.type, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[where].append(loss.item())
    expected, found = losses[torch.device("cpu")], losses[device]
    assert found == pytest.approx(expected, abs=0.03) and found[-1] < found[0]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_answers(tmp_path, device, architecture):
    """With CUDA graphs, without, several at once, by beams: those of the CPU."""
    cpu, gpu = pair_of_models(write_checkpoint(tmp_path, architecture), device)
    prompts = padded([row for n in range(4) for row in rows(cpu, seed=n)])
    expected = cpu.generate(prompts, max_new_tokens=12)
    assert gpu.generate(prompts.to(device), max_new_tokens=12) == expected
    few = Engine(gpu, batching=Batching(rows=3), max_new_tokens=12)
    requests = requests_of(prompts.to(device))
    for request in requests:
        few.submit(request)
    assert {request.key: request.answer for request in few.run()} == dict(enumerate(expected))
    beams = cpu.generate(prompts, max_new_tokens=8, num_beams=3)
    assert gpu.generate(prompts.to(device), max_new_tokens=8, num_beams=3) == beams


def test_the_recorded_checkpoints(golden, device):
    """Logits of the CPU, and those that the reference implementation computed."""
    from tests.model.conftest import RECORDED, Recorded

    for name in RECORDED:
        recorded = Recorded(name, golden)
        batch = {key: value.to(device) for key, value in recorded.batch().items()}
        cpu, gpu = pair_of_models(recorded.folder, device)
        with torch.no_grad():
            expected = cpu(**recorded.batch(), return_logits=True).logits
            found = gpu(**batch, return_logits=True).logits.cpu()
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4, msg=name)
        reference = recorded.arrays("forward.npz")
        row, position = reference["full_rows_index"].long().unbind(1)
        torch.testing.assert_close(found[row, position], reference["full_rows"], atol=2e-4, rtol=1e-4, msg=name)
