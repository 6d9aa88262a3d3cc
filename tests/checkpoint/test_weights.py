"""Weights in and out: bit for bit, sharded or not; and every way a folder can be wrong is one readable error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivl.architecture.families import llm_family
from ivl.checkpoint.weights import Files, load_weights, save_weights
from ivl.model.internvl import InternVL
from ivl.types import UserError
from tests.tiny import FAMILIES, TOWERS, write_checkpoint


def tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "qwen2")


@pytest.mark.parametrize("shard", [5 * 10**9, 60_000])
@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_released_to_ivl_to_released_is_bit_identical(tmp_path, architecture, vision, shard):
    source = write_checkpoint(tmp_path / "source", architecture, vision, dtype=torch.bfloat16, max_shard_bytes=shard)
    model = InternVL.from_pretrained(source, dtype="bfloat16")
    layout = llm_family(architecture).layout
    save_weights(model.state_dict(), tmp_path / "out", layout, model.config, max_shard_bytes=shard)
    assert_equal(tensors(tmp_path / "out"), tensors(source))
    assert (tmp_path / "out/model.safetensors.index.json").is_file() == (shard < 10**6)


def test_recorded_round_trip(recorded, tmp_path):
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    original = tensors(recorded.folder)
    dtype = next(iter(original.values())).dtype
    model = recorded.model(dtype=next(name for name, d in stored.items() if d == dtype))
    layout = llm_family(model.config.llm_architecture).layout
    save_weights(model.state_dict(), tmp_path, layout, model.config)
    assert_equal(tensors(tmp_path), original)


def test_shards_are_bounded_and_indexed(tmp_path):
    folder = write_checkpoint(tmp_path, max_shard_bytes=60_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    sizes = {f.name: {k: v.nbytes for k, v in load_file(f).items()} for f in files}
    assert index["weight_map"] == {key: name for name, held in sizes.items() for key in held}
    assert index["metadata"]["total_size"] == sum(sum(held.values()) for held in sizes.values())
    assert all(sum(held.values()) <= 60_000 or len(held) == 1 for held in sizes.values())


def test_a_rule_may_span_files(tmp_path):
    """q, k and v of one fused weight in three files."""
    folder = write_checkpoint(tmp_path / "qwen2")
    model = InternVL.from_pretrained(folder)
    save_weights(model.state_dict(), tmp_path / "hf", "hf", model.config)
    whole = tensors(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    where = {}
    for number, letter in enumerate("qkv"):
        held = {
            k: v
            for k, v in whole.items()
            if (f".{letter}_proj" in k if "vision_tower" in k and "_proj" in k else number == 0)
        }
        held = {k: v for k, v in held.items() if k not in where}
        name = f"model-{number}.safetensors"
        save_file(held, tmp_path / "hf" / name)
        where |= dict.fromkeys(held, name)
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    other = InternVL.from_config(model.config, device="meta")
    load_weights(other, Files.of(tmp_path / "hf"), "cpu")
    assert_equal(other.state_dict(), model.state_dict())


def test_loading_converts_and_keeps_no_window_into_the_file(folder):
    model = InternVL.from_pretrained(folder, dtype="float32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert_equal(dict(model.state_dict()), before)


def test_loading_keeps_what_trains(folder):
    model = InternVL.from_pretrained(folder)
    model.vision_model.requires_grad_(False)
    load_weights(model, Files.of(folder), "cpu")
    assert not any(p.requires_grad for p in model.vision_model.parameters())
    assert all(p.requires_grad for p in model.mlp1.parameters())


# -- one tensor for both ends of the vocabulary ------------------------------------------------------------------------


def test_tied_embeddings(tmp_path):
    """Qwen3 releases of small size store no output layer; it is the input embedding."""
    folder = write_checkpoint(tmp_path / "tied", "Qwen3ForCausalLM", llm={"tie_word_embeddings": True})
    stored = tensors(folder)
    assert "language_model.lm_head.weight" not in stored
    model = InternVL.from_pretrained(folder)
    language_model = model.language_model
    assert language_model.lm_head.weight is language_model.get_input_embeddings().weight
    assert torch.equal(language_model.lm_head.weight, stored["language_model.model.embed_tokens.weight"])
    save_weights(model.state_dict(), tmp_path / "out", "native", model.config)
    assert_equal(tensors(tmp_path / "out"), stored)


def test_an_output_layer_of_its_own_is_kept_whatever_the_config_says(tmp_path):
    folder = write_checkpoint(tmp_path, "Qwen3ForCausalLM")
    raw = json.loads((folder / "config.json").read_text())
    raw["llm_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(raw))
    language_model = InternVL.from_pretrained(folder).language_model
    assert not torch.equal(language_model.lm_head.weight, language_model.get_input_embeddings().weight)


def test_a_missing_output_layer_is_missing_where_it_is_not_tied(folder):
    stored = tensors(folder)
    del stored["language_model.lm_head.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing: language_model\.lm_head\.weight"):
        InternVL.from_pretrained(folder)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed_at_once(folder):
    stored = tensors(folder)
    del stored["mlp1.1.bias"]
    stored["mlp1.1.lora_A.weight"] = torch.zeros(2)
    stored["mlp1.3.weight"] = torch.zeros(3, 3)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        InternVL.from_pretrained(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: the weights are not those of its config.json")
    assert "1 missing: mlp1.1.bias" in message
    assert "1 unexpected: mlp1.1.lora_A.weight" in message
    assert "1 of another shape: mlp1.3.weight (expected [64, 64], found [3, 3])" in message


def test_long_lists_are_cut(folder):
    stored = {k: v for k, v in tensors(folder).items() if not k.startswith("language_model.")}
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"\d\d missing: .* and \d+ more\."):
        InternVL.from_pretrained(folder)


def test_another_config_lists_other_shapes(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["llm_config"]["num_hidden_layers"] = 3
    raw["vision_config"]["intermediate_size"] = 100
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        UserError, match=r"12 missing: .*; 6 of another shape: .*fc1\.bias \(expected \[100\], found \[96\]\)"
    ):
        InternVL.from_pretrained(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        InternVL.from_pretrained(folder)


def test_a_missing_shard(tmp_path):
    folder = write_checkpoint(tmp_path, max_shard_bytes=60_000)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"1 of them are missing \({gone.name}\); is the download complete\?"):
        InternVL.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_a_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(
        UserError, match=r"model\.safetensors: not a readable safetensors file .*is the download complete\?"
    ):
        InternVL.from_pretrained(folder)


def test_a_file_that_is_something_else(folder):
    (folder / "model.safetensors").write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        InternVL.from_pretrained(folder)
