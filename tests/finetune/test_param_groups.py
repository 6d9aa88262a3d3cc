"""Optimizer groups: every trainable tensor once, and the rates that were asked for."""

import itertools

import pytest
import torch

from ivl.finetune import tune
from ivl.finetune.param_groups import groups_table, param_groups, scale_rates, vectors
from ivl.model.internvl import InternVL
from ivl.options import Blocks, LoRA, Rate, Rates, Tune, VisionRate
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2")


WAYS = list(
    itertools.product(
        ("frozen", "full", LoRA(rank=2), Blocks(1)),
        ("full", LoRA(rank=2)),
        ("full", LoRA(rank=2, dora=False)),
        (None, "full"),
    )
)


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_every_trainable_tensor_is_in_exactly_one_group(folder, decay):
    for vision, mlp1, language, head in WAYS:
        model = InternVL.from_pretrained(folder)
        tune.apply(model, Tune(vision, mlp1, language, head=head))
        groups = param_groups(model, Rates(vision_model=VisionRate(layer_decay=decay)))
        grouped = [id(p) for g in groups for p in g["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
        assert len({g["name"] for g in groups}) == len(groups)


def test_rates_and_decay_per_part(folder):
    model = InternVL.from_pretrained(folder)
    tune.apply(model, Tune(vision_model="full", mlp1="full", language_model=LoRA(rank=2), head="full"))
    rates = Rates(
        vision_model=VisionRate(lr=1e-4, weight_decay=0.2, layer_decay=0.5),
        mlp1=Rate(lr=3e-4),
        head=Rate(weight_decay=0),
    )
    optimizer = torch.optim.AdamW(param_groups(model, rates), lr=1e-3, weight_decay=0.1)
    scale_rates(optimizer)
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        # two blocks: the last has the part's rate
        "vision_model.embeddings": (pytest.approx(1e-4 / 4), 0.2),
        "vision_model.embeddings_no_decay": (pytest.approx(1e-4 / 4), 0.0),
        "vision_model.00": (pytest.approx(1e-4 / 2), 0.2),
        "vision_model.00_no_decay": (pytest.approx(1e-4 / 2), 0.0),
        "vision_model.01": (1e-4, 0.2),
        "vision_model.01_no_decay": (1e-4, 0.0),
        "mlp1": (3e-4, 0.1),
        "mlp1_no_decay": (3e-4, 0.0),
        "language_model": (1e-3, 0.1),
        "head": (1e-3, 0),
    }
    assert all("scale" not in g for g in optimizer.param_groups)
    block = model.vision_model.encoder.layers[1].mlp.fc1.weight
    group = next(g for g in optimizer.param_groups if g["name"] == "vision_model.01")
    assert any(p is block for p in group["params"])
    table = groups_table(optimizer)
    assert len(table.splitlines()) == 11 and "vision_model.00_no_decay" in table


def test_what_is_split_before_it_is_grouped_keeps_its_decay(folder):
    """Classic FSDP leaves a flat shard of each weight, and a prefix in names."""
    model = InternVL.from_pretrained(folder)
    tune.apply(model, Tune("full", "full", "full"))
    whole, decay_free = param_groups(model), vectors(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()[:1]
    model.vision_model.encoder = torch.nn.ModuleDict({"_fsdp_wrapped_module": model.vision_model.encoder})
    split = param_groups(model, decay_free=decay_free)
    assert [(g["name"], len(g["params"])) for g in split] == [(g["name"], len(g["params"])) for g in whole]
    assert [g.get("weight_decay") for g in split] == [g.get("weight_decay") for g in whole]
