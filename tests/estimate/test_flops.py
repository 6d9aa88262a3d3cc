"""Operations, against torch's own counter; devices by their names."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ivl.config import Config
from ivl.estimate import flops
from ivl.estimate.flops import Adapter, Recomputed, Trained, Work
from ivl.estimate.hardware import DEVICES, find_device
from ivl.finetune import tune
from ivl.finetune.tune import Blocks, LoRA, Tune, described
from ivl.model.internvl import InternVL
from ivl.model.loss import token_losses
from tests.tiny import FAMILIES, TOWERS, config

IMAGE, VOCABULARY = 9, 300
LORA, LOW = LoRA(rank=4), Adapter(4)
MODES = {
    "lora": Tune(language_model=LORA),
    "lora of some": Tune(language_model=LoRA(rank=4, targets=["o_proj", "down_proj"])),
    "projector": Tune(mlp1="full", language_model="frozen"),
    "tower": Tune(vision_model="full", language_model="frozen"),
    "last block": Tune(vision_model=Blocks(1), language_model=LORA),
    "full": Tune("full", "full", "full"),
    "full, tower frozen": Tune("frozen", "full", "full"),
    "full, embeddings frozen": Tune("frozen", "frozen", "full", "frozen", "frozen"),
    "lora everywhere": Tune(LORA, LORA, LORA, head=LORA),
    "head": Tune(language_model="frozen", head="full"),
}
aten = torch.ops.aten


def _forward(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


def _backward(grad, query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_backward_flop_count(grad, query, key, value)


def _product(added, left, right, *args, out_shape=None, **kwargs):
    return 2 * left[0] * left[1] * right[1]


# The counter knows the fused kernels of CUDA, not that of a CPU, nor products added in place; the formulas are its own.
CPU_KERNELS = {
    aten.addmm_: _product,
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def counted(model: InternVL, tiles: int, lengths: list[int], supervised: int) -> tuple[int, Work]:
    """What torch counts in a forward and backward of rows that are packed where they differ in length."""
    per_tile, size = model.config.tokens_per_tile, model.config.image_size
    total = sum(lengths)
    ids = torch.full((1, total), 3)
    ids[0, 1 : 1 + tiles * per_tile] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[0, -supervised:] = 5
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if len(lengths) > 1:
        batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        batch["row_ids"] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
        batch["tiles_per_row"] = torch.tensor([tiles] + [0] * (len(lengths) - 1))
    if tiles:
        batch["tiles"] = torch.zeros(tiles, 3, size, size, dtype=torch.uint8)
    with FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops(), Work(tiles, total, sum(n * n for n in lengths), supervised)


def build(raw: dict, mode: Tune, kernel: str = "sdpa", checkpointing: bool = False) -> InternVL:
    model = InternVL.from_config(Config.from_dict(raw), attention=kernel, image_token_id=IMAGE)
    tune.apply(model, mode)
    model.set_checkpointing(checkpointing, checkpointing)
    return model


def tiny(architecture: str = "Qwen2ForCausalLM", vision: str = "300m") -> dict:
    _, template, extra = FAMILIES[architecture]
    return config(architecture, vision, template, {"last": VOCABULARY}, extra, {})


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_what_torch_counts(mode: str, kernel: str, checkpointing: bool):
    model = build(tiny(), MODES[mode], kernel, checkpointing)
    recomputed = Recomputed(checkpointing, checkpointing, scores=kernel == "sdpa", last_mlp=kernel != "sdpa")
    total, work = counted(model, tiles=3, lengths=[40], supervised=9)
    assert flops.training_flops(model.config, described(MODES[mode]), work, recomputed).total == pytest.approx(
        total, rel=1e-3
    )


@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family(architecture: str, vision: str):
    model = build(tiny(architecture, vision), Tune("full", "full", LORA))
    total, work = counted(model, tiles=2, lengths=[20, 13], supervised=9)
    trained = Trained("full", "full", LOW)
    assert flops.training_flops(model.config, trained, work).total == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_model_of_sixty_million(mode: str):
    """With both parts recomputed; the vocabulary is that of Qwen2 in small."""
    raw = tiny()
    raw["vision_config"] |= {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6}
    raw["vision_config"] |= {"intermediate_size": 1536, "image_size": 224}
    raw["llm_config"] |= {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    raw["llm_config"] |= {"intermediate_size": 2048, "vocab_size": 20000}
    raw["force_image_size"] = 224
    model = build(raw, MODES[mode], checkpointing=True)
    assert 55e6 < sum(p.numel() for p in model.parameters()) < 75e6
    total, work = counted(model, tiles=1, lengths=[96], supervised=16)
    mine = flops.training_flops(model.config, described(MODES[mode]), work, Recomputed(True, True))
    assert mine.total == pytest.approx(total, rel=2e-3)


def test_forward_and_its_parts():
    model = build(tiny(), Tune("full", "full", "full"))
    work = Work(tiles=3, tokens=40, pairs=1600, supervised=40)
    forward = flops.training_flops(model.config, Trained(), work, flops.NOTHING)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
        model.tile_features(torch.zeros(3, 3, 56, 56, dtype=torch.uint8))
        assert forward.vision_model + forward.mlp1 == counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
        model(torch.full((1, 40), 3))  # logits everywhere
        assert forward.language_model + forward.head == counter.get_total_flops()


def test_a_frozen_part_costs_one_two_or_three():
    config = Config.from_dict(tiny())
    work = Work(tokens=100, supervised=100)  # no pairs
    layers = config.llm["num_hidden_layers"]
    linear = 100 * layers * sum(2 * layer.inputs * layer.outputs for layer in flops.llm_block(config).linears)
    of = lambda **parts: flops.training_flops(config, Trained(**parts), work, flops.NOTHING)  # noqa: E731
    assert of(head="full").language_model == linear
    assert of(language_model="full").language_model == 3 * linear
    assert of(mlp1="full", language_model="frozen").language_model == linear, "no tile, so no gradient reaches it"
    assert 1.9 * linear < of(language_model=Adapter(1)).language_model < 2 * linear
    with_tiles = Work(tiles=1, tokens=100)
    assert flops.training_flops(config, Trained(mlp1="full"), with_tiles, flops.NOTHING).language_model == 2 * linear


def test_the_last_blocks_of_a_tower():
    config = Config.from_dict(tiny())
    work = Work(tiles=1, tokens=8)
    costs = [
        flops.training_flops(config, Trained("full", vision_blocks=n), work, flops.NOTHING).vision_model
        for n in (1, 2, None)
    ]
    assert flops.vision_flops(config) < costs[0] < costs[1] <= costs[2] < 3 * flops.vision_flops(config)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("h100", "H100-80GB"),
        ("a100-40gb", "A100-40GB"),
    ],
)
def test_a_device_is_found_by_what_its_driver_says(name: str, row: str):
    assert find_device(name) is DEVICES[row]


@pytest.mark.parametrize("name", ["", "NVIDIA GeForce GTX 1080", "cpu"])
def test_an_unknown_device_is_none(name: str):
    assert find_device(name) is None


@pytest.mark.parametrize("supervised", [1, 511, 512, 513, 1024, 1300])
def test_logits_of_all_chunks_but_the_last_are_made_again(supervised):
    """As torch counts them in the loss itself."""
    head, hidden = torch.nn.Linear(4, 10, bias=False), torch.randn(supervised, 4, requires_grad=True)
    head.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        token_losses(head, hidden, torch.zeros(supervised, dtype=torch.long), 512).sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 10 * supervised * (2 + flops.unkept(supervised))
