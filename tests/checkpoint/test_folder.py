"""What is read from a checkpoint folder besides its weights, and what is said where it is not there."""

import json

import pytest

from ivl.checkpoint.folder import Checkpoint
from ivl.model.internvl import InternVL
from ivl.types import UserError
from tests.tiny import TOKENIZERS, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "qwen2")


@pytest.mark.parametrize("style", TOKENIZERS)
def test_the_image_token_is_found_in_every_shape_of_tokenizer_files(tmp_path, style):
    folder = write_checkpoint(tmp_path, tokenizer=style)
    expected = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    found = InternVL.from_pretrained(folder).image_token_id
    assert expected[str(found)]["content"] == "<IMG_CONTEXT>"
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (name == "added_tokens.json" or style == "llama3"):
            (folder / name).unlink()
    assert Checkpoint.open(folder).image_token_id == found


def test_end_tokens_are_those_of_generation_config(folder):
    assert Checkpoint.open(folder).eos_ids == [302, 300]
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert InternVL.from_pretrained(folder).eos_ids == [7]
    (folder / "generation_config.json").unlink()
    assert Checkpoint.open(folder).eos_ids == []


def test_no_image_token(folder):
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="no tokenizer file has the token <IMG_CONTEXT>"):
        Checkpoint.open(folder)


def test_a_vocabulary_too_small_for_the_image_token(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["llm_config"]["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"<IMG_CONTEXT> has id 305, but llm_config\.vocab_size is 300"):
        InternVL.from_pretrained(folder)


def test_an_unknown_language_model(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["llm_config"]["architectures"] = ["MambaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="'MambaForCausalLM' is not a language model this program knows"):
        InternVL.from_pretrained(folder)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_config(folder, content):
    if content is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: (no such file|not valid JSON|expected a JSON object)"):
        InternVL.from_pretrained(folder)
