"""Hub names given in the wrong place: each is refused by its config, before weights come, with what to do instead."""

import json

import pytest

from ivl import hub
from ivl.__main__ import main
from ivl.data.sets.sources import row_files
from ivl.hub import resolve, resolve_adapter
from ivl.types import UserError
from tests.hub_server import LARGE, Hub, serve
from tests.lit.rows import write_rows
from tests.lit.test_runs import config
from tests.test_hub import BOTH, CONFIG, KEPT, caches  # noqa: F401
from tests.tiny import write_checkpoint

NAME = "me/some-name"
ADAPTER = {
    "adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": "internvl2-2b"}).encode(),
    "adapter_model.safetensors": b"of the adapter",
}
LLAMA = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()
LLAVA = json.dumps({"model_type": "llava", "vision_config": {}, "text_config": {}}).encode()
AWQ = json.dumps(json.loads(CONFIG) | {"quantization_config": {"quant_method": "awq"}}).encode()
NO_MODELS = {
    "an adapter": (ADAPTER, r"is a PEFT adapter, not a model; .* --model\.adapter .*\(internvl2-2b\)"),
    "a language model": (KEPT | {"config.json": LLAMA}, r"is no InternVL chat model .*'LlamaForCausalLM'.* lists"),
    "another vision model": (KEPT | {"config.json": LLAVA}, r"is no InternVL chat model .*'llava'"),
    "quantised weights": (KEPT | {"config.json": AWQ}, r"quantised \(AWQ\)"),
    "no config": ({"model.safetensors": b"of a painter", "model_index.json": b"{}"}, r"has no config\.json"),
    "a broken config": (KEPT | {"config.json": b"{}"}, r"is no InternVL chat model"),
}


@pytest.fixture
def server(caches, monkeypatch):  # noqa: F811
    with serve(Hub(NAME, {}, kind="models")) as opened:
        monkeypatch.setenv("HF_ENDPOINT", opened.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", opened.url)
        yield opened


def large(server):
    """Downloads of large files."""
    return [path for method, path, _ in server.log if method == "GET" and path.partition("&")[0].endswith(LARGE)] + [
        path for method, path, _ in server.log if method == "GET" and f"{LARGE}" in path and "FilePath" in path
    ]


@BOTH
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model_is_refused_by_its_config(server, place, kind):
    server.files, message = NO_MODELS[kind]
    for weights in (True, False):
        with pytest.raises(UserError, match=rf"^{NAME}: .*{message}"):
            resolve(NAME, hub=place, weights=weights)
    assert not large(server)
    asked = {path.rpartition("/")[2].rpartition("FilePath=")[2] for method, path, _ in server.log if method == "GET"}
    assert asked & set(server.files) <= {"config.json", "adapter_config.json"}


@BOTH
def test_a_model_is_refused_for_an_adapter_by_its_config(server, place, monkeypatch):
    monkeypatch.setattr(hub._settings, "hub", place)
    server.files = KEPT
    with pytest.raises(UserError, match=rf"^{NAME}: is a model, not an adapter; .* --model\.pretrained \(fit"):
        resolve_adapter(NAME)
    assert not large(server)


@BOTH
def test_a_data_set_is_neither_model_nor_adapter(server, place, monkeypatch):
    monkeypatch.setattr(hub._settings, "hub", place)
    server.kind, server.files = "datasets", {"train.jsonl": b"{}", "model.safetensors": b"none"}
    for find in (resolve, resolve_adapter):
        with pytest.raises(UserError, match=rf"^{NAME}: is a data set, not a model; give it with --data\.train"):
            find(NAME)
    assert not large(server)


@pytest.mark.parametrize("name", [NAME, f"{NAME}:sub", "internvl2-2b", "OpenGVLab/InternVL2-2B"])
def test_a_model_is_no_data_set(server, name):
    server.files = KEPT
    with pytest.raises(UserError, match=r"is a model, not a data set; give it with --model \(chat\)"):
        row_files(name)
    assert not large(server) and (NAME in name or not server.log)


@BOTH
def test_an_adapter_in_the_cache_survives_the_mistake(server, place, monkeypatch):
    """It is refused as a model, also offline, and still there for what it is."""
    monkeypatch.setattr(hub._settings, "hub", place)
    server.files = ADAPTER
    folder = resolve_adapter(NAME)
    for offline in (False, True):
        with pytest.raises(UserError, match="is a PEFT adapter, not a model"):
            resolve(NAME, offline=offline)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot download"):
        resolve(NAME)
    assert resolve_adapter(NAME) == folder


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model__adapter": "me/other"}, "me/other: huggingface says that it does not exist"),
        ({"data__train": "none.jsonl"}, "none.jsonl"),
        ({"data__train": "internvl2-2b"}, "internvl2-2b: is a model, not a data set"),
    ],
    ids=["adapter", "file", "data set"],
)
def test_a_mistake_beside_a_model_s_name_downloads_no_weights(server, tmp_path, capsys, wrong, said):
    write_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "data", 4, "train.jsonl")
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    path = config(tmp_path, tmp_path / "one", model__pretrained=NAME, data__val=None, **wrong)
    assert main(["fit", "--config", str(path)]) == 2
    assert said in capsys.readouterr().err
    assert server.log and not large(server)
