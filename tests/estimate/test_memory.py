"""What is predicted from a shallow copy, against the allocations of the whole model on real tensors."""

from dataclasses import replace

import pytest
import torch

from ivl.architecture.config import Config
from ivl.architecture.families import config_for, find_model
from ivl.estimate.memory import memory_needed, split_sizes, state_bytes
from ivl.estimate.training_step import BatchShape, MemTracker, ShallowModel, TrainSetup
from ivl.finetune import tune
from ivl.model.internvl import InternVL
from ivl.options import Blocks, LoRA, Tune
from tests.estimate.test_flops import IMAGE, MODES, tiny

DEEP = 6
LORA = Tune(language_model=LoRA(rank=4))


def deep() -> Config:
    raw = tiny()
    raw["vision_config"]["num_hidden_layers"] = raw["llm_config"]["num_hidden_layers"] = DEEP
    return Config.from_dict(raw)


def measured(setup: TrainSetup, micro: BatchShape) -> tuple[int, int, int]:
    """Most bytes up to the loss and in backward, and those that forward keeps: of the real thing."""
    config = deep()
    model = InternVL.from_config(config, attention=setup.attention, image_token_id=IMAGE)
    tune.apply(model, setup.tune)
    model.set_checkpointing(setup.vision_checkpointing, setup.language_checkpointing)
    ids = torch.full((micro.rows, micro.length), 3)
    ids.view(-1)[: micro.tiles * config.tokens_per_tile] = IMAGE
    labels = torch.full_like(ids, -100)
    labels.view(-1)[-micro.supervised :] = 5
    batch = {"input_ids": ids, "labels": labels, "tiles": torch.zeros(micro.tiles, 3, 56, 56, dtype=torch.uint8)}
    if micro.packed:
        batch["row_ids"] = torch.zeros_like(ids)
        batch["position_ids"] = torch.arange(micro.length)[None]
        batch["tiles_per_row"] = torch.tensor([micro.tiles])
    tally = MemTracker(model)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: tally.ignore(p.grad))
    with tally:
        loss = model(**batch).loss_sum
        forward, kept = tally.mark(), tally.live
        loss.backward()
        return forward, tally.mark(), kept


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", ["lora", "projector", "tower", "last block", "full", "lora everywhere"])
def test_the_real_model_takes_what_is_predicted(mode: str, checkpointing: bool, packed: bool):
    setup = TrainSetup(MODES[mode], vision_checkpointing=checkpointing, language_checkpointing=checkpointing)
    micro = BatchShape(1 if packed else 2, 600, 16, 200, packed)
    found = ShallowModel(deep(), setup).activations(micro)
    forward, backward, kept = measured(setup, micro)
    assert found.forward == pytest.approx(forward, rel=0.05)
    assert found.backward == pytest.approx(backward, rel=0.05)
    assert found.saved == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_autograd_saves_is_what_is_kept(mode: str, monkeypatch):
    """torch's own account: the storages handed to saved-tensor hooks or kept by them instead, weights apart."""
    config, micro = deep(), BatchShape(2, 600, 16, 200)
    model = InternVL.from_config(config, attention="sdpa", image_token_id=IMAGE)
    tune.apply(model, MODES[mode])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def counted(pack, unpack):
        def both(tensor):
            kept = pack(tensor)
            for each in (kept,) if isinstance(kept, torch.Tensor) else kept[0].inputs:
                count(each)
            return kept

        return hooks(both, unpack)

    hooks = torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counted)
    ids = torch.full((2, 600), 3)
    ids.view(-1)[: 16 * config.tokens_per_tile] = IMAGE
    labels = torch.full_like(ids, -100)
    labels.view(-1)[-200:] = 5
    with hooks(count, lambda t: t):
        model(ids, labels=labels, tiles=torch.zeros(16, 3, 56, 56, dtype=torch.uint8))
    found = ShallowModel(config, TrainSetup(MODES[mode])).activations(micro)
    assert found.saved == pytest.approx(sum(saved.values()), rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_are_those_of_the_whole_model(mode: str):
    config = deep()
    model = InternVL.from_config(config, device="meta")
    with torch.device("meta"):
        tune.apply(model, MODES[mode])
    for part, found in ShallowModel(config, TrainSetup(MODES[mode])).parameters().items():
        own = [p for n, p in model.named_parameters() if tune.part_of(n) == part]
        assert found.total == sum(p.numel() for p in own)
        assert found.trainable == sum(p.numel() for p in own if p.requires_grad)
        assert found.weights == sum(p.numel() * p.element_size() for p in own)


def test_a_released_model_from_its_row_alone():
    row = find_model("internvl2-2b")
    sketch = ShallowModel(
        Config.from_dict(config_for(row)), TrainSetup(Tune(language_model=LoRA(rank=8)), "bf16-mixed")
    )
    parts = sketch.parameters()
    trained = sum(p.trainable for p in parts.values())
    assert sum(p.total for p in parts.values()) - trained == row.parameters
    assert sum(p.weights for p in parts.values()) == 2 * row.parameters + 4 * trained


def test_logits_do_not_grow_with_the_length():
    sketch = ShallowModel(deep(), TrainSetup(LORA))
    logits = [sketch.activations(BatchShape(1, n, 0, n)).logits for n in (512, 1024, 2048)]
    assert len(set(logits)) == 1


def test_more_devices_and_less_precision_take_less():
    config, micro = deep(), BatchShape(2, 300, 8, 100)
    full = TrainSetup(Tune("full", "full", "full"), on_gpu=False)
    of = lambda **changed: memory_needed(ShallowModel(config, TrainSetup(**(vars(full) | changed))), micro)  # noqa: E731
    alone, sharded = of(), of(strategy="fsdp2", devices=4)
    assert sharded.weights == alone.weights / 4 and sharded.optimizer == alone.optimizer / 4
    assert of(strategy="ddp", devices=2).total == alone.total + alone.weights
    assert of(optimizer="torch.optim.SGD").optimizer == alone.optimizer / 2
    assert of(tune=LORA).total < alone.total
    assert of(tune=LORA, precision="bf16-mixed", quantize="nf4").weights < of(tune=LORA, precision="bf16-mixed").weights


def splits(layers: int, devices: int):
    """Every way to give layers to devices, in order."""
    if devices == 1:
        return [[layers]]
    return [[first, *rest] for first in range(layers + 1) for rest in splits(layers - first, devices - 1)]


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("mode", ["lora", "full", "lora everywhere"])
def test_layers_are_spread_as_evenly_as_they_can_be(mode: str, devices: int):
    setup = TrainSetup(MODES[mode], on_gpu=False, strategy="layer_split", devices=devices)
    sketch, micro = ShallowModel(deep(), setup), BatchShape(2, 300, 8, 100)
    found = split_sizes(sketch, sketch.activations(micro))
    each = found.layers[0] + found.beside
    loads = [
        max(found.main + first * each, max(found.once + n * each for n in rest))
        for first, *rest in splits(DEEP, devices)
    ]
    alone = memory_needed(ShallowModel(deep(), TrainSetup(MODES[mode], on_gpu=False)), micro)
    fullest = memory_needed(sketch, micro)
    # The moments of a step are told apart in `need` and not in the plan, so it may take less.
    assert alone.total / devices < fullest.total <= min(loads) < alone.total
    # One device holds everything, counted in the same way.
    assert memory_needed(ShallowModel(deep(), replace(setup, devices=1)), micro) == alone


def test_optimizers():
    assert state_bytes("torch.optim.AdamW") == 8 and state_bytes("bitsandbytes.optim.AdamW8bit") == 2


def test_blocks_beyond_the_tower_are_refused():
    with pytest.raises(ValueError, match="expected 1 to 6 blocks, found 7"):
        ShallowModel(deep(), TrainSetup(Tune(vision_model=Blocks(7))))
