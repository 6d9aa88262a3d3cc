"""Folders given in a wrong place: the message says what they are and where they belong."""

import json
from pathlib import Path

import pytest

from ivl.__main__ import main
from ivl.architecture.families import find_model
from ivl.hub import resolve
from ivl.types import UserError
from tests.tiny import write_checkpoint


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "b/ase"}))
    return folder


def run(folder: Path) -> Path:
    adapter(folder / "adapter")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.ckpt").write_bytes(b"")
    (folder / "config.yaml").write_text("model: {pretrained: x}")
    return folder


def cache(folder: Path) -> Path:
    (folder / "models--a--b/snapshots/0").mkdir(parents=True)
    (folder / "models--a--b/snapshots/0/config.json").write_text("{}")
    return folder


def nested(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    return folder


def quantised(**settings):
    def make(folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


MODELS = {
    "adapter": (adapter, r"is a PEFT adapter, not a model; give it with --adapter .* made for \(b/ase\)"),
    "run": (run, r"is a run, not a model; give it with --ckpt_path .* or --run"),
    "cache": (cache, r"is a hub's cache; give the model's OWNER/NAME, or .*models--a--b/snapshots/0"),
    "one model's cache": (lambda f: cache(f) / "models--a--b", r"is a hub's cache; .*snapshots/0"),
    "nested": (nested, r"there is one in model; give that folder"),
    "awq": (quantised(quantization_config={"quant_method": "awq"}), r"quantised \(AWQ\)"),
    "gptq": (quantised(llm_config={"quantization_config": {"quant_method": "gptq"}}), r"quantised \(GPTQ\)"),
    "4 bits": (quantised(quantization_config={"load_in_4bit": True}), r"quantised \(bitsandbytes, 4 bits\)"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_model_is_named(tmp_path, capsys, kind):
    make, message = MODELS[kind]
    folder = make(tmp_path / "given")
    with pytest.raises(UserError, match=message):
        resolve(folder)
    assert main(["chat", "--model", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}: ")


def test_a_file_is_no_model(tmp_path, capsys):
    file = write_checkpoint(tmp_path / "model") / "config.json"
    assert main(["chat", "--model", str(file)]) == 2
    assert f"error: {file}: is a file; give the checkpoint's folder, {file.parent}" in capsys.readouterr().err


def test_the_release_in_8_bits_is_read(tmp_path):
    make = quantised(quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"})
    assert resolve(make(tmp_path / "int8")) == tmp_path / "int8"


def test_what_is_no_adapter_is_named(tmp_path, capsys):
    folder, model = run(tmp_path / "run"), write_checkpoint(tmp_path / "model")
    for given, message in (
        (folder, f"is a run, not an adapter; give its adapter, {folder / 'adapter'}"),
        (model, "is a model, not an adapter; give it with --model (chat), --base (export) or --model.pretrained"),
        (tmp_path / "none", "no such folder; expected a PEFT adapter"),
        (tmp_path, "no adapter_config.json; expected a PEFT adapter's folder"),
        (model / "model.safetensors", f"is a file; give the adapter's folder, {model}"),
    ):
        for argv in (
            ["chat", "--adapter", str(given)],
            ["export", "--out", str(tmp_path / "o"), "--adapter", str(given)],
        ):
            assert main(argv) == 2
            assert f"error: {given}: {message}" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_named(tmp_path, capsys):
    folder, other = run(tmp_path / "run"), adapter(tmp_path / "adapter")
    for argv, message in (
        (
            ["export", "--out", str(tmp_path / "o"), "--run", str(other)],
            f"--run {other}: is an adapter, not a run; give it",
        ),
        (["chat", "--ckpt_path", str(other)], f"--ckpt_path {other}: is an adapter, not a run; give it with --adapter"),
        (
            ["predict", "--ckpt_path", str(other)],
            f"--ckpt_path {other}: is an adapter, not a run; give it with --model.adapter",
        ),
        (["predict", "--ckpt_path", str(folder)], f"{folder}: no whole checkpoint in checkpoints/"),
    ):
        assert main(argv) == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_a_revision_does_not_hide_a_model():
    assert find_model("OpenGVLab/InternVL2-2B@main") is find_model("internvl2-2b@v1.0") is find_model("internvl2-2b")
