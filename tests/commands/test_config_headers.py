"""The numbers on top of the configs are those that the present code computes."""

from pathlib import Path

import pytest
import yaml

from ivl.architecture.config import Config
from ivl.architecture.families import MODELS, config_for, find_model
from ivl.commands.config_headers import body, header, new_config, recipes, simulated
from ivl.commands.models import config_of, memory
from ivl.estimate.training_step import ShallowModel, TrainSetup
from ivl.options import LoRA, Tune

REPO = Path(__file__).resolve().parents[2]
FAST = ("internvl2-2b", "internvl-chat-v1_5-int8")


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, marks=() if r.name in FAST else pytest.mark.slow, id=r.name) for r in MODELS],
)
def test_a_header_is_up_to_date(row):
    """Else: python -m ivl plan --headers configs"""
    path = REPO / config_of(row)
    text = path.read_text(encoding="utf-8")
    assert text == header(path) + body(text)


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_the_document_s_ways_are_there(row):
    """LoRA on one device, layers over two, DDP with ZeRO-2 on two, and in full on four."""
    ways = [(recipe.strategy, recipe.devices) for recipe in recipes(row, REPO / "configs") if not recipe.quantize]
    full = [] if row.int8 else [("fsdp2", 4)]
    assert ways == [("single", 1), ("layer_split", 2), ("zero2", 2), *full]
    written = (REPO / config_of(row)).read_text(encoding="utf-8")
    assert written.count(" GB on each of 2 devices") == 2 and written.count(" GB on each of 4 devices") == len(full)


@pytest.mark.parametrize("row", [row for row in MODELS if not row.in_document], ids=lambda row: row.name)
def test_other_models_share_tiles_as_the_official_recipe_does(row):
    """Each is the document's config with its own name: one that is missing is written so."""
    text = (REPO / config_of(row)).read_text(encoding="utf-8")
    assert body(text) == new_config(row, REPO / "configs")
    settings = yaml.safe_load(text)
    assert settings["data"]["share_tiles"] is True and settings["model"]["pretrained"] == row.huggingface


def test_a_recipe_needs_its_files(tmp_path):
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune/qlora.yaml").write_text("")
    assert [r.stacked for r in recipes(find_model("internvl2-2b"), tmp_path)] == [(), ("tune/qlora.yaml",)]
    assert [r.stacked for r in recipes(find_model("internvl-chat-v1_5-int8"), tmp_path)] == [()]


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, marks=() if r.name in FAST else pytest.mark.slow, id=r.name) for r in MODELS],
)
def test_the_table_of_models_is_up_to_date(row):
    """Else: python -m ivl plan --headers configs"""
    assert memory(row).lora / 1e9 == simulated(row, REPO / "configs")


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_models_says_what_the_header_says(row):
    text = (REPO / config_of(row)).read_text(encoding="utf-8")
    assert f"#     {memory(row).lora / 1e9:.0f} GB on one device" in text


def test_a_release_in_8_bits_is_planned_as_it_is_stored():
    """Its tower, projector and head too: its files have 26.1 GB (see tests/commands/test_models.py)."""
    row = find_model("internvl-chat-v1_5-int8")
    config = Config.from_dict(config_for(row))
    sketch = ShallowModel(config, TrainSetup(Tune(language_model=LoRA(rank=8)), "bf16-mixed"))
    base = sum(p.weights - 4 * p.trainable for p in sketch.parameters().values())
    assert base == pytest.approx(memory(row).weights, rel=0.001)
