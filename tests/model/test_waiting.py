"""A training step asks nothing of its device: the host is free to hand over the next step while one is computed.

On the meta device there is nothing to be asked: what would wait for an answer on a GPU fails there.
"""

from dataclasses import replace

import pytest
import torch
from torch.ops import aten
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ivl.checkpoint.folder import Checkpoint
from ivl.data.collate import collate
from ivl.finetune.tune import apply
from ivl.lit.callbacks.monitor import SourceLosses
from ivl.model.internvl import InternVL
from ivl.model.loss import loss_weights
from ivl.options import LoRA, Tune
from ivl.types import Batch, Conversation, Example, Message, nonzero_indices
from tests.model.rows import rows
from tests.tiny import write_checkpoint


class Copies(TorchDispatchMode):
    """Fails where a value goes to the device and the host waits until it is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is aten._to_copy.default and args[0].is_cpu and out.is_meta:
            assert kwargs.get("non_blocking"), "a copy that the host waits for"
        if func is aten.copy_.default and args[0].is_meta and args[1].is_cpu:
            assert args[2:3] == (True,) or kwargs.get("non_blocking"), "a copy that the host waits for"
        return out


class Made(TorchFunctionMode):
    """Fails where Python numbers become a tensor on the device, which is such a copy too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func not in (torch.tensor, torch.Tensor.new_tensor) or not out.is_meta, "made on the device"
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


def batch_of(model: InternVL, packed: bool, tiles=(0, 2, 1)) -> Batch:
    examples = [
        Example(**row, tiles_per_image=[1] * len(row["tiles"]), conversation=Conversation((Message("user", ("?",)),)))
        for row in rows(model, tiles=tiles)
    ]
    return collate(examples, 0, packed, image_id=model.image_token_id)


@pytest.mark.parametrize(
    "architecture", ["Qwen2ForCausalLM", "Phi3ForCausalLM", "InternLM2ForCausalLM", "Qwen3MoeForCausalLM"]
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("tune", [Tune("full", "full", "full"), Tune(language_model=LoRA(4))], ids=["full", "lora"])
def test_a_training_step_waits_for_nothing(tmp_path, architecture, packed, kept, tune):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, architecture))
    model = InternVL.from_config(checkpoint.config, device="meta", image_token_id=checkpoint.image_token_id)
    apply(model, tune)
    model.train()
    model.neftune_alpha = 5.0
    batch = batch_of(model, packed)
    if kept and tune.vision_model == "frozen":
        width = checkpoint.config.projector_width
        features = torch.zeros(len(batch.tiles), checkpoint.config.tokens_per_tile, width)
        batch = replace(batch, features=features, tiles=batch.tiles[:0])
    batch, sources = batch.to("meta", non_blocking=True), SourceLosses()
    model(**batch)  # the first moves the rotary frequencies
    with Copies(), Made():
        weights = loss_weights(batch.labels, batch.row_ids, len(batch), "square")
        out = model(**batch, loss_weights=weights, label_smoothing=0.1)
        sources.add(batch.rows, out.row_losses, out.row_tokens)
        out.loss_sum.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("packed", [False, True])
def test_places_that_are_known_change_nothing(folder, packed):
    model = InternVL.from_pretrained(folder).train()
    for tiles in ((0, 2, 1), (0, 0, 0)):
        batch = batch_of(model, packed, tiles)
        found = []
        for given in (batch, replace(batch, image_positions=None, supervised_positions=None)):
            model.zero_grad()
            out = model(**given)
            out.loss_sum.backward()
            found.append([out.loss_sum.detach(), out.row_tokens, *(p.grad.clone() for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert batch.image_positions.tolist() == nonzero_indices(batch.input_ids == model.image_token_id).tolist()


def test_labels_that_were_taken_away_do_not_count(folder):
    """A row that only fills up a batch of validation."""
    model = InternVL.from_pretrained(folder)
    batch = batch_of(model, packed=False)
    batch.labels[1] = -100
    expected = model(**replace(batch, supervised_positions=None))
    found = model(**batch)
    for name in ("loss_sum", "weight_sum", "num_supervised", "row_losses", "row_tokens"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)
    assert found.row_tokens[1] == 0
