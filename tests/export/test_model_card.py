"""Model card of an export: written from the run, readable by the hub, without paths of this machine."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from ivl.commands.export import export
from ivl.export.model_card import hub_id
from ivl.options import LoRA, Tune
from tests.commands.test_export import write_run
from tests.tiny import write_checkpoint

RECORD = {
    "rows": {"/home/ann/boards.jsonl": 120, "held.jsonl": 10},
    "base": {"name": "x", "commit": None, "digest": "0"},
    "versions": {"torch": "2.11", "ivl": "0.1.0"},
    "processes": 2,
    "device": "cpu",
}
SCORES = {"": {"rows": 10.0, "loss": 0.25, "exact": 0.875}, "a|b": {"rows": 10.0, "exact": 0.875}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    base = write_checkpoint(root / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# The base\nlicense: none\n")
    data = {"train": ["/home/ann/boards.jsonl", "owner/signs:en#5"], "val": "held.jsonl", "batch_size": 4}
    write_run(root / "run", base, Tune(language_model=LoRA(rank=4)), data)
    settings = yaml.safe_load((root / "run/config.yaml").read_text())
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 0.0003, "betas": [0.9, 0.999], "amsgrad": False},
    }
    settings["model"]["optimizer"] = optimizer
    (root / "run/config.yaml").write_text(
        yaml.safe_dump(settings | {"trainer": {"max_epochs": 3}, "seed_everything": 0})
    )
    (root / "run/versions.json").write_text(json.dumps(RECORD))
    (root / "run/scores.json").write_text(json.dumps({"fits": [{"step": 30, "scores": SCORES}]}))
    return root / "run"


def test_a_card_tells_what_was_trained_on_what(run, tmp_path):
    card = ModelCard.load(export(str(tmp_path / "merged"), run=str(run)) / "README.md")
    assert card.data.license == "apache-2.0" and card.data.datasets == ["owner/signs"]
    assert card.data.library_name == "transformers" and "internvl" in card.data.tags
    for part in (
        "# merged",
        "`base`, fine-tuned (language model)",
        "| boards.jsonl | 120 | trained on |",
        "| held.jsonl | 10 | held out |",
        "| model.tune.language_model | init default, rank 4 |",
        "AdamW: betas (0.9, 0.999), lr 0.0003 |",
        "| data.batch_size | 4 |",
        "| trainer.max_epochs | 3 |",
        "| seed_everything | 0 |",
        "| processes | 2 |",
        "after step 30",
        "| a\\|b | 10 | - | 0.875 |",
        "| all | 10 | 0.25 | 0.875 |",
        "torch 2.11",
        "apache-2.0, as its base base.",
        "chat --model merged",
    ):
        assert part in card.text, part
    assert str(run.parent) not in card.content and "/home/ann" not in card.content


def test_a_card_of_an_adapter_is_peft_s(run, tmp_path):
    card = ModelCard.load(export(str(tmp_path / "lora"), run=str(run), adapter_only=True) / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "LoRA of language model for `base`" in card.text and str(run.parent) not in card.content


def test_a_card_without_a_run_holds_what_is_known(run, tmp_path):
    card = ModelCard.load(export(str(tmp_path / "copy"), base=str(run.parent / "base"), layout="hf") / "README.md")
    assert "## Training" not in card.text and "hf layout" in card.text and card.data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("internvl2-2b", "OpenGVLab/InternVL2-2B"),
        ("internvl2-2b@v1", "OpenGVLab/InternVL2-2B"),
        ("internvl2-8b-pretrain", "OpenGVLab/InternVL2-Pretrain-Models"),
        ("me/tiny:part@v2", "me/tiny"),
        ("somewhere", None),
    ],
)
def test_the_base_is_named_as_the_hub_does(base, name):
    assert hub_id(base) == name


def test_a_snapshot_of_the_cache_is_named_as_the_hub_does(tmp_path):
    folder = tmp_path / "models--me--tiny/snapshots/0123"
    folder.mkdir(parents=True)
    assert hub_id(str(folder), folder) == "me/tiny"
