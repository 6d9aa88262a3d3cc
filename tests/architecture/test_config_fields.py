"""A config.json of anyone's: each field wrong in each way gives one line that names it, or a model that works."""

import copy
import json
import time
from typing import Any

import pytest
import torch

from ivl.architecture.config import Config
from ivl.architecture.config_fields import LLM, ROPE, TOP, VISION
from ivl.architecture.hf_config import read_config
from ivl.checkpoint.hf_layout import hf_config
from ivl.data.processor import Processor
from ivl.model.internvl import InternVL
from ivl.types import UserError
from tests.tiny import FAMILIES, write_checkpoint

WRONG: list[Any] = [
    *(None, True, "x", "64", "", [], {}, [1], ["x"], {"a": 1}, 0, -1, -7, 1, 3, 1.5, -0.5, 1e30, float("nan")),
    *(float("inf"), 10**9, 10**400, [None], [[]], [{}], "nan", 2**31, 63, 64.0),
]
PARTS = {"": TOP, "vision_config": VISION, "llm_config": LLM, "llm_config.rope_scaling": ROPE}
NAMES = [(part, key) for part, table in PARTS.items() for key in table]


@pytest.fixture(scope="module")
def raws(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("configs")
    return {name: json.loads((write_checkpoint(folder / name, name) / "config.json").read_text()) for name in FAMILIES}


def changed(raw: dict, part: str, key: str, value: Any) -> dict:
    raw = copy.deepcopy(raw)
    place = raw
    for word in filter(None, part.split(".")):
        if place.get(word) is None:
            place[word] = {}
        place = place[word]
    if value is ...:
        place.pop(key, None)
    else:
        place[key] = value
    return raw


def refused(make) -> str | None:
    """The line of a refusal; None where a model was made. Anything else is raised."""
    start = time.monotonic()
    try:
        make()
        line = None
    except UserError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 500
    assert time.monotonic() - start < 5
    return line


def built(raw: dict) -> InternVL:
    return InternVL.from_config(Config.from_dict(raw), device="meta")


@pytest.mark.parametrize(("part", "key"), NAMES, ids=[f"{part}.{key}".lstrip(".") for part, key in NAMES])
def test_each_field_wrong_in_each_way(raws, part, key):
    lines = []
    for architecture in ("InternLM2ForCausalLM", "Phi3ForCausalLM"):
        for value in (*WRONG, ...):
            raw = changed(raws[architecture], part, key, value)
            if line := refused(lambda raw=raw: built(raw)):
                lines.append(line)
                assert line.startswith(("config.json: ", "llm_config"))
    assert any(key in line for line in lines)


def test_what_is_right_is_taken(raws):
    for raw in raws.values():
        assert refused(lambda raw=raw: Config.from_dict(raw)) is None


@pytest.mark.parametrize("key", [key for key in TOP if key.endswith("_config")])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [1]], ids=repr)
def test_each_part_replaced(raws, key, value):
    raw = changed(raws["Qwen2ForCausalLM"], "", key, value)
    line = refused(lambda: built(raw))
    assert key == "quantization_config" or (line and key in line)


def test_sizes_that_do_not_go_together(raws):
    raw = raws["Qwen2ForCausalLM"]
    for part, key, value, message in (
        ("llm_config", "num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("llm_config", "num_attention_heads", 6, "hidden_size 64 is not a multiple of num_attention_heads 6"),
        ("vision_config", "num_attention_heads", 5, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ("", "select_layer", 5, "select_layer: expected one of the 2 layers"),
        ("", "force_image_size", 70, "force_image_size: expected a multiple of 28"),
        ("", "downsample_ratio", 0.3, "downsample_ratio: expected 1 divided by a whole number"),
        ("", "min_dynamic_patch", 13, "min_dynamic_patch 13 is above max_dynamic_patch 12"),
    ):
        with pytest.raises(UserError, match=f"config.json: .*{message}"):
            Config.from_dict(changed(raw, part, key, value))


HF = ["vision_config", "text_config"]


@pytest.mark.parametrize("part", HF)
def test_the_same_in_transformers_layout(raws, tmp_path, part):
    config = Config.from_dict(raws["Qwen2ForCausalLM"])
    whole = json.loads(json.dumps(hf_config(config, 5)))
    for key in whole[part]:
        for value in (None, "x", -1, [], 10**9, float("nan")):
            raw = changed(whole, part, key, value)
            (tmp_path / "config.json").write_text(json.dumps(raw))
            refused(lambda: InternVL.from_config(read_config(tmp_path), device="meta"))
    for key in whole:
        for value in (None, "x", -1, [], 1.5):
            (tmp_path / "config.json").write_text(json.dumps(whole | {key: value}))
            refused(lambda: InternVL.from_config(read_config(tmp_path), device="meta"))


def index(folder, value) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def deep(folder) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def rename(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


FOLDERS = {
    "deep": (deep, "config.json: nested too deeply"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object, found list"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "no map": (lambda f: index(f, {}), "weight_map: expected an object from tensors to files, found None"),
    "map a list": (lambda f: index(f, {"weight_map": ["a"]}), "weight_map: expected an object .* found a list of 1"),
    "map of numbers": (lambda f: index(f, {"weight_map": {"a": 1}}), "weight_map: expected an object"),
    "outside": (lambda f: index(f, {"weight_map": {"a": "../x.safetensors"}}), r"in this folder, found '../x.safe"),
    "absolute": (lambda f: index(f, {"weight_map": {"a": "/x.safetensors"}}), r"in this folder, found '/x.safe"),
    "a pickle": (lambda f: index(f, {"weight_map": {"a": "x.bin"}}), "expected names of .safetensors files"),
    "missing": (lambda f: index(f, {"weight_map": {"a": "x.safetensors"}}), "1 of them are missing"),
    "no index": (rename("model.safetensors", "model-00001-of-00002.safetensors"), "without the index"),
    "only bin": (rename("model.safetensors", "pytorch_model.bin"), r"only pickles \(pytorch_model.bin\)"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 7), "not a readable safetensors file"),
    "eos": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'), "eos_token_id: expected"),
    "token": (lambda f: (f / "added_tokens.json").write_text('{"<IMG_CONTEXT>": "x"}'), "<IMG_CONTEXT>: expected a"),
    "no token": (lambda f: (f / "added_tokens.json").write_text('{"<IMG_CONTEXT>": -4}'), "<IMG_CONTEXT>: expected a"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_cannot_be_read(tmp_path, kind):
    spoil, message = FOLDERS[kind]
    folder = write_checkpoint(tmp_path / "tiny")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        InternVL.from_pretrained(folder)


def test_processor_refuses_the_same(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny")
    raw = json.loads((folder / "config.json").read_text())
    for key, value in (("template", "nothing-like-it"), ("max_dynamic_patch", "12")):
        (folder / "config.json").write_text(json.dumps(raw | {key: value}))
        with pytest.raises(UserError, match=key):
            Processor.from_pretrained(folder)


def test_more_layers_than_weights_end_soon(raws, tmp_path):
    folder = write_checkpoint(tmp_path / "tiny")
    raw = changed(json.loads((folder / "config.json").read_text()), "llm_config", "num_hidden_layers", 200)
    (folder / "config.json").write_text(json.dumps(raw))
    start = time.monotonic()
    with pytest.raises(UserError, match="the weights are not those of its"):
        InternVL.from_pretrained(folder)
    assert time.monotonic() - start < 20 and torch.get_default_device().type == "cpu"
