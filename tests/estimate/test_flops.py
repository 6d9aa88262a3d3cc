"""Operations of a step, against torch's own counter on the whole model and real tensors."""

from itertools import cycle
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ivl.architecture.config import Config
from ivl.estimate import flops
from ivl.estimate.flops import Costs, Work, costs, model_costs
from ivl.estimate.training_step import TrainSetup
from ivl.finetune import tune
from ivl.model.internvl import InternVL
from ivl.options import Blocks, LoRA, Tune
from tests.tiny import FAMILIES, TOWERS, config

IMAGE, VOCABULARY = 9, 300
LORA = LoRA(rank=4)
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


def counted(
    model: InternVL, tiles: int, lengths: list[int], supervised: int, backward: bool = True
) -> tuple[int, Work]:
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
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter, torch.set_grad_enabled(backward):
        loss = model(**batch).loss
        if backward:
            loss.backward()
    return counter.get_total_flops(), Work(tiles, total, sum(n * n for n in lengths), supervised)


def build(raw: dict, mode: Tune, kernel: str = "sdpa", checkpointing: bool = False) -> InternVL:
    model = InternVL.from_config(Config.from_dict(raw), attention=kernel, image_token_id=IMAGE)
    tune.apply(model, mode)
    model.set_checkpointing(checkpointing, checkpointing)
    return model


def tiny(architecture: str = "Qwen2ForCausalLM", vision: str = "300m", layers: int | None = None) -> dict:
    _, template, extra = FAMILIES[architecture]
    raw = config(architecture, vision, template, {"last": VOCABULARY}, extra, {})
    for part in ("vision_config", "llm_config") if layers else ():
        raw[part]["num_hidden_layers"] = layers
    return raw


@pytest.mark.parametrize(("kernel", "checkpointing"), [("eager", False), ("sdpa", True)])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_what_torch_counts(mode: str, kernel: str, checkpointing: bool):
    model = build(tiny(layers=4), MODES[mode], kernel, checkpointing)
    total, work = counted(model, tiles=3, lengths=[40], supervised=9)
    setup = TrainSetup(
        MODES[mode], attention=kernel, vision_checkpointing=checkpointing, language_checkpointing=checkpointing
    )
    assert costs(model.config, setup, supervised=9).total(work) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize(("architecture", "vision"), zip(FAMILIES, cycle(TOWERS)))
def test_every_family(architecture: str, vision: str):
    how = Tune("full", "full", LORA)
    model = build(tiny(architecture, vision), how)
    total, work = counted(model, tiles=2, lengths=[20, 13], supervised=9)
    assert costs(model.config, TrainSetup(how), supervised=9).total(work) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("mode", ["lora", "last block"])
def test_stacks_of_any_depth(mode: str, layers: int):
    model = build(tiny(layers=layers), MODES[mode])
    total, work = counted(model, tiles=2, lengths=[33], supervised=7)
    assert costs(model.config, TrainSetup(MODES[mode]), supervised=7).total(work) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("supervised", [512, 513, 1300])
def test_logits_that_are_made_again_are_counted(supervised: int):
    model = build(tiny(), MODES["lora"])
    total, work = counted(model, tiles=1, lengths=[1400], supervised=supervised)
    found = costs(model.config, TrainSetup(MODES["lora"]), supervised=supervised)
    assert found.total(work) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("how", [LoRA(4, dora=True), LoRA(4, dropout=0.1, rslora=True), LoRA(4, init="pissa")])
def test_every_kind_of_lora_is_counted_without_weights(how: LoRA):
    assert model_costs(Config.from_dict(tiny()), Tune(language_model=how)).token > 0


def test_a_frozen_part_costs_one_two_or_three():
    """The model's own operations: those of a formula, nothing twice."""
    config = Config.from_dict(tiny())
    llm, P = config.llm, config.tokens_per_tile
    width, inner, layers = llm["hidden_size"], llm["intermediate_size"], llm["num_hidden_layers"]
    heads, groups = llm["num_attention_heads"], llm["num_key_value_heads"]
    linear = 2 * layers * (width * (2 * width + 2 * groups * width // heads) + 3 * width * inner)
    pair, head = 4 * width * layers, 2 * width * llm["vocab_size"]

    def of(**modes: Any) -> Costs:
        return model_costs(config, Tune(**{"language_model": "frozen"} | modes))

    full, projector = of(language_model="full"), of(mlp1="full")
    for found, times in ((of(head="full"), (1, 1, 2)), (full, (3, 3, 3)), (projector, (2, 3, 2))):
        expected = [n * operations for n, operations in zip(times, (linear, pair, head))]
        assert [found.token, found.pair, found.supervised] == pytest.approx(expected)
    one = 2 * P * config.llm["hidden_size"] * (config.projector_width + width)
    frozen = of(head="full").tile
    assert (
        projector.tile == frozen + 2 * one - 0
    )  # its first layer's input is the tower's, which needs no gradient, but
    low = of(language_model=LoRA(1))
    assert 1.9 * linear < low.token < 2.1 * linear and low.tile == frozen


def test_the_last_blocks_of_a_tower():
    config = Config.from_dict(tiny(layers=4))
    modes = Blocks(1), Blocks(2), Blocks(4), "full"
    tiles = [model_costs(config, Tune(vision_model=mode, language_model="frozen")).tile for mode in modes]
    frozen = model_costs(config, Tune(language_model=LORA)).tile
    assert frozen < tiles[0] < tiles[1] < tiles[2] < tiles[3] < 3 * frozen
    assert tiles[2] - tiles[1] == pytest.approx(2 * (tiles[1] - tiles[0]))


def test_the_reference_costs_a_forward_of_the_plain_model():
    raw, setup = tiny(), TrainSetup(MODES["lora everywhere"])
    model = InternVL.from_config(Config.from_dict(raw), image_token_id=IMAGE)
    total, work = counted(model, 3, [40, 25], 20, backward=False)
    assert flops.forward_costs(Config.from_dict(raw), setup).total(work) == pytest.approx(total, rel=1e-6)


def test_counting_draws_no_random_numbers():
    """A run that measures its utilisation is the run that does not."""
    state = torch.get_rng_state()
    model_costs(Config.from_dict(tiny()), Tune("full", "full", LoRA(4, dropout=0.1)))
    assert torch.equal(state, torch.get_rng_state())
