"""Names and folders of releases: those that load, and those that are refused by name with the way out."""

import json
import re
from pathlib import Path

import pytest

from ivl import hub
from ivl.__main__ import main
from ivl.architecture.families import find_model
from ivl.types import UserError
from tests.tiny import write_checkpoint

DOCS = Path(__file__).resolve().parents[1] / "docs"
NAMES = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (DOCS / "models.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
"""Rows of the table of names that were tried: names, what becomes of them"""
TRIED = [(name, result) for names, result, *_ in NAMES for name in re.findall(r"`([^`]+)`", names)]


@pytest.mark.parametrize(("name", "result"), TRIED, ids=[name for name, _ in TRIED])
def test_the_table_of_names(name, result, tmp_path, monkeypatch):
    """A model of the table, or one line that names the kind and the way out before anything is fetched."""
    monkeypatch.chdir(tmp_path)
    kind = result.removeprefix("refused: ")
    if kind == result:
        row = find_model(name)
        assert (row.variant_of or row.name) == result.strip("`") if row else result == "by its files"
        return
    with pytest.raises(UserError) as caught:
        hub.resolve(name, offline=False)
    assert f"is not loaded here ({kind})" in str(caught.value) and (
        "take " in str(caught.value) or "use " in str(caught.value)
    )


def test_the_table_has_every_kind():
    from ivl.hub.unsupported import UNSUPPORTED

    assert {result.removeprefix("refused: ") for _, result in TRIED if "refused" in result} == {
        row.kind for row in UNSUPPORTED
    }


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"flash_mode": True}, "Flash"),
        ({"flash_relative_threshold": 0.5}, "Flash"),
        ({"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "GPT-OSS"),
        ({"llm_config": {"architectures": ["InternLM2VEForCausalLM"]}}, "Mono-InternVL"),
        ({"model_type": "internvlu_chat"}, "InternVL-U"),
        ({"model_type": "interns1"}, "Intern-S1"),
        ({"text_config": {"model_type": "gpt_oss"}, "llm_config": None}, "GPT-OSS"),
        ({"model_type": "intern_vit_6b"}, "vision encoders"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "export"])
def test_a_folder_under_any_name_is_refused_by_its_config(tmp_path, capsys, change, kind, command):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"} | change))
    words = {
        "plan": ["--config", "internvl3-8b", "--model.pretrained"],
        "export": ["--out", str(tmp_path / "o"), "--base"],
    }
    assert main([command, *words[command], str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"is not loaded here ({kind}" in error


@pytest.mark.parametrize("name", ["OpenGVLab/InternVL3-8B-Instruct", "internvl3_5-8b-hf", "internvl2-8b-pretrain"])
def test_plan_knows_a_variant(name, capsys):
    assert main(["plan", "--config", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


OLD = {"ps_version": "v1", "dynamic_image_size": False, "use_thumbnail": False, "max_dynamic_patch": 6}


@pytest.mark.parametrize(("template", "layer"), [("internvl_zh", -2), ("Hermes-2", -1)], ids=["V1.1", "V1.2"])
def test_the_shapes_of_1_1_and_1_2_load(tmp_path, template, layer):
    """LLaMA and Yi under the 6B tower, one tile, the first pixel shuffle. The released weights were not at hand."""
    from PIL import Image

    from ivl import Chat, InternVL, Processor
    from ivl.chat import Settings

    folder = write_checkpoint(
        tmp_path,
        "LlamaForCausalLM",
        "6b",
        template,
        "yi",
        overrides=OLD | {"select_layer": layer, "template": template},
    )
    processor = Processor.from_pretrained(folder)
    image = Image.new("RGB", (200, 60), "red")
    assert processor({"query": "<image>What is it?", "images": [image]}).tiles_per_image == [1]
    chat = Chat(InternVL.from_pretrained(folder), processor, settings=Settings(max_new_tokens=3))
    assert isinstance(chat.ask("<image>What is it?", [image]), str)
