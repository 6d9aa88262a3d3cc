"""The table of `python -m ivl models`, and the document's configs that it names."""

import re
from pathlib import Path

import pytest
import yaml

from ivl.__main__ import run_command
from ivl.architecture.config import Config
from ivl.architecture.families import MODELS, VARIANTS, config_for, find_model
from ivl.commands.models import config_of, memory
from ivl.estimate.training_step import ShallowModel, TrainSetup
from ivl.hub.unsupported import UNSUPPORTED
from ivl.options import LoRA, Tune

REPO = Path(__file__).resolve().parents[2]


def main(*argv: str) -> int:
    return run_command("models", list(argv))


def test_the_table_has_every_model_and_fits_a_terminal(capsys):
    assert main() == 0
    text = capsys.readouterr().out
    for row in MODELS:
        assert re.search(rf"^{row.name} .*{config_of(row)}", text, re.MULTILINE), row.name
        assert f" {row.huggingface} · {row.tower} + {row.llm}" in text
    words = set(text.replace(",", " ").split())
    assert {row.name for row in VARIANTS} <= words
    assert all(row.kind in " ".join(text.split()) for row in UNSUPPORTED)
    assert max(len(line) for line in text.splitlines()) <= 120
    first = {line.index("configs/") for line in text.splitlines() if "B  " in line and "configs/" in line}
    assert len(first) == 1


def test_a_word_narrows_it(capsys):
    assert main("internvl2-8b") == 0
    assert capsys.readouterr().out.count("OpenGVLab/") == 1
    assert main("Qwen3") == 0
    assert capsys.readouterr().out.count("OpenGVLab/") >= 6
    assert main("internvl3_5-8b-instruct") == 0
    assert capsys.readouterr().out.count("OpenGVLab/") == 1
    assert main("llava") == 1
    assert "no released model has 'llava'" in capsys.readouterr().out


def test_memory_is_of_the_documents_order():
    """The document ran V1.5 in bfloat16 with 4096 tokens on an A100: 55 GB; it trained a LoRA of it within 80 GB."""
    need = memory(find_model("internvl-chat-v1_5"))
    assert need.inference / 1e9 == pytest.approx(55, abs=3)
    assert need.inference < need.lora < 80e9


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_memory_is_weights_and_what_they_need(row):
    need = memory(row)
    assert row.parameters < need.weights <= 2 * row.parameters
    assert need.weights < need.inference < need.weights + 6e9
    assert need.weights < need.lora < need.weights + 15e9


@pytest.mark.parametrize("name", ["internvl2-1b", "internvl-chat-v1_5", "internvl-chat-v1_5-int8", "internvl3_5-8b"])
def test_weights_are_those_of_a_plan(name):
    row = find_model(name)
    setup = TrainSetup(Tune(language_model=LoRA(1)), "bf16-mixed")
    parts = ShallowModel(Config.from_dict(config_for(row)), setup).parameters().values()
    planned = sum(part.weights - 4 * part.trainable for part in parts)
    assert memory(row).weights == pytest.approx(planned, rel=0.01)


def test_eight_bits_weigh_what_the_release_does():
    """Its six files on the hub: 4.97, 4.92, 4.99, 4.97, 4.97 and 1.32 GB."""
    assert memory(find_model("internvl-chat-v1_5-int8")).weights / 1e9 == pytest.approx(26.14, abs=0.1)


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_the_config_to_start_from_exists(row):
    assert (REPO / config_of(row)).is_file()


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_a_config_says_what_it_is_for(row):
    path = REPO / config_of(row)
    text = path.read_text(encoding="utf-8")
    assert find_model(yaml.safe_load(text)["model"]["pretrained"]) is row
    assert f"#   python -m ivl fit --config configs/{path.name} --data.train" in text
    assert f" To run it: {memory(row).inference / 1e9:.0f} GB." in text
