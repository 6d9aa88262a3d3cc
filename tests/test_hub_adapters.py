"""Adapters by a hub's name: config and weights are fetched and checked, once; a folder here wins."""

import json

import pytest

from ivl import hub
from ivl.__main__ import main
from ivl.commands.chat import _trained
from ivl.hub import resolve_adapter
from ivl.options import ChatSessionOptions
from ivl.types import UserError
from tests.hub_server import Hub, serve
from tests.lit.rows import write_rows
from tests.lit.test_runs import config
from tests.test_hub import BOTH, caches, contents  # noqa: F401
from tests.tiny import write_checkpoint

NAME = "me/boards-lora"
KEPT = {
    "adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": "internvl2-2b"}).encode(),
    "adapter_model.safetensors": bytes(range(256)) * 40,
    "vit.safetensors": b"of ms-swift",
}
LEFT_OUT = {"README.md": b"# card", "training_args.bin": b"a pickle", "tokenizer.json": b"{}"}


@pytest.fixture
def server(caches, monkeypatch):  # noqa: F811
    with serve(Hub(NAME, KEPT | LEFT_OUT)) as opened:
        monkeypatch.setenv("HF_ENDPOINT", opened.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", opened.url)
        yield opened


@BOTH
def test_an_adapter_is_fetched_once(server, place, monkeypatch):
    monkeypatch.setattr(hub._settings, "hub", place)
    folder = resolve_adapter(NAME)
    assert contents(folder) == KEPT
    server.log.clear()
    assert resolve_adapter(NAME) == folder and server.log == []


def test_the_revision_of_the_model_is_not_the_adapter_s(server, monkeypatch):
    monkeypatch.setattr(hub._settings, "revision", "v2")
    resolve_adapter(NAME)
    assert not any("v2" in path for _, path, _ in server.log)
    server.log.clear()
    resolve_adapter(f"{NAME}@{server.commit}")
    assert not server.log or any(server.commit in path for _, path, _ in server.log)


@pytest.mark.parametrize("name", [NAME, "me", "runs/version_0/adapter", "./adapter", "runs/none"])
def test_folders_and_paths_stay_what_they_are(server, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    assert str(resolve_adapter(name)) == name.removeprefix("./") and server.log == []


def test_a_model_is_no_adapter(server):
    with pytest.raises(UserError, match="is a model, not an adapter"):
        resolve_adapter("OpenGVLab/InternVL2-2B")
    assert server.log == []


@BOTH
def test_a_repository_without_an_adapter(server, place, monkeypatch):
    monkeypatch.setattr(hub._settings, "hub", place)
    del server.files["adapter_model.safetensors"]
    with pytest.raises(UserError, match=r"not a PEFT adapter .*no adapter_model\.safetensors"):
        resolve_adapter(NAME)


def test_chat_takes_it_and_its_base(server):
    trained = _trained(ChatSessionOptions(adapter=NAME))
    assert trained.base == "internvl2-2b" and contents(trained.adapter) == KEPT and trained.where == NAME


def test_a_fit_goes_on_training_it(server, tmp_path):
    """The run's config has the name, and the experiment its files."""
    base = tmp_path / "base"
    write_checkpoint(base / "model")
    write_rows(base / "data", 4, "train.jsonl")
    tune = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 2}}
    path = config(base, tmp_path / "one", model__tune=tune, data__val=None)
    assert main(["fit", "--config", str(path)]) == 0
    adapter = tmp_path / "one/run/adapter"
    server.files.update({name: (adapter / name).read_bytes() for name in KEPT if name[0] == "a"})
    del server.files["vit.safetensors"]
    path = config(base, tmp_path / "two", model__tune=None, data__val=None)
    assert main(["fit", "--config", str(path), "--model.adapter", NAME]) == 0
    assert f"adapter: {NAME}" in (tmp_path / "two/run/config.yaml").read_text()
    assert (tmp_path / "two/run/adapter/adapter_model.safetensors").is_file()
