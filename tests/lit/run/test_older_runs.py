"""A run of version 0.1.0 goes on, answers and is exported: its files are read by this version."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from ivl.__main__ import main
from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint

OLD = Path(__file__).parent / "version_0_1_0"
BASE_SHA256 = "1c189a9d3effaa52221eb3778a8045e8123e4a2c11486faa46c9d420038e958d"
"""Of the base's model.safetensors when the run was made: random weights of seed 0"""


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    """The stopped run's folder, in a working directory with its model and rows."""
    write_checkpoint(tmp_path / "base")
    if hashlib.sha256((tmp_path / "base/model.safetensors").read_bytes()).hexdigest() != BASE_SHA256:
        pytest.skip("this torch draws other random weights for the base of the recorded run")
    write_rows(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    folder = Path("begun/version_0")
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("adapter_of_four_steps", "README.md"))
    return folder


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(old_run, caplog):
    checkpoint = str(old_run / "checkpoints/last.ckpt")
    with caplog.at_level("INFO"):
        assert main(["fit", "--config", str(old_run / "config.yaml"), "--ckpt_path", checkpoint]) == 0
    assert "resumed at step 3" in caplog.text
    resumed = load_file("begun/version_1/adapter/adapter_model.safetensors")
    expected = load_file(OLD / "adapter_of_four_steps/adapter_model.safetensors")
    assert resumed.keys() == expected.keys()
    assert max((resumed[name] - expected[name]).abs().max().item() for name in expected) < 1e-6


def test_rows_are_answered_by_it(old_run):
    arguments = ["--ckpt_path", str(old_run / "checkpoints/last.ckpt"), "--data.predict", "data/train.jsonl"]
    assert main(["predict", *arguments, "--predictions.file", "answers.jsonl"]) == 0
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [line["index"] for line in answers] == list(range(12))
    assert all(isinstance(line["response"], str) and "error" not in line for line in answers)


def test_it_is_exported(old_run):
    assert main(["export", "--run", str(old_run), "--out", "merged"]) == 0
    assert Path("merged/config.json").is_file()


# -- options --------------------------------------------------------------------------------------------------------


def flat(options: dict, prefix: str = "") -> dict[str, object]:
    """Nested options as one level, `data.video.fps` and so on."""
    found = {}
    for key, value in options.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def test_all_its_options_are_known_and_the_defaults_are_the_same_but_for_those_of_the_page(
    tmp_path, capsys, monkeypatch
):
    """`options.yaml`: all options of fit with their defaults, printed by version 0.1.0."""
    monkeypatch.chdir(tmp_path)
    printed = []
    for argv in (["--model.pretrained", "internvl2-2b"], ["--config", str(OLD / "options.yaml")]):
        monkeypatch.setattr("sys.argv", ["ivl", "fit", *argv, "--print_config"])
        with pytest.raises(SystemExit) as stop:
            main(["fit", *argv, "--print_config"])
        assert not stop.value.code
        printed.append(flat(yaml.safe_load(capsys.readouterr().out)))
    old = flat(yaml.safe_load((OLD / "options.yaml").read_text()))
    assert old.keys() <= printed[0].keys() and printed[1].items() >= old.items()
    page = (Path(__file__).parents[3] / "docs/upgrading.md").read_text(encoding="utf-8")
    other = {name for name in old if old[name] != printed[0][name]}
    assert other == set(re.findall(r"^\| `([\w.]+)` \| `", page, re.MULTILINE))
