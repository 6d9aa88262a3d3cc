"""Checkpoint folder: config, image token, end tokens. Files are read, never run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ivl.architecture.config import Config, read_json
from ivl.architecture.config_fields import LLM as LLM_FIELDS
from ivl.architecture.config_fields import shown
from ivl.architecture.hf_config import is_hf, read_config
from ivl.checkpoint.layouts import OUTPUT_LAYER
from ivl.checkpoint.weights import Files
from ivl.types import UserError

IMAGE_TOKEN = "<IMG_CONTEXT>"


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the released layout, or in that of transformers' InternVLForConditionalGeneration."""

    config: Config
    files: Files
    image_token_id: int
    eos_ids: list[int]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read a folder's JSON files and the headers of its weights.

        Raises UserError where one is missing or damaged, or the vocabulary is too small for the image token.
        """
        raw = read_json(folder / "config.json")
        config = read_config(folder)
        files = Files.of(folder)
        # Some releases with one tensor for both ends of the vocabulary store it twice: then they are two.
        tied = bool(config.llm.get("tie_word_embeddings")) and not OUTPUT_LAYER & files.where.keys()
        config = replace(config, llm=config.llm | {"tie_word_embeddings": tied})
        image_token_id = raw.get("image_token_id") if is_hf(raw) else _image_token_id(folder)
        if not isinstance(image_token_id, int) or image_token_id < 0:
            where = f"{folder}/config.json: image_token_id" if is_hf(raw) else f"{folder}: the id of {IMAGE_TOKEN}"
            raise UserError(f"{where}: expected a whole number from 0, found {shown(image_token_id)}")
        if image_token_id >= config.llm["vocab_size"]:
            raise UserError(
                f"{folder}: the token {IMAGE_TOKEN} has id {image_token_id}, but llm_config.vocab_size is "
                f"{config.llm['vocab_size']}; use config.json and tokenizer of one release"
            )
        return cls(config, files, image_token_id, _eos_ids(folder))


def _image_token_id(folder: Path) -> Any:
    """Id of `<IMG_CONTEXT>` in the tokenizer files."""
    path = folder / "added_tokens.json"
    if path.is_file() and IMAGE_TOKEN in (added := read_json(path)):
        return added[IMAGE_TOKEN]
    for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("tokenizer.json", "added_tokens")):
        path = folder / name
        tokens = read_json(path).get(key) or {} if path.is_file() else {}
        items = tokens.items() if isinstance(tokens, dict) else ((None, token) for token in tokens)
        for number, token in items:
            if not isinstance(token, dict):
                raise UserError(f"{path}: {key}: expected objects with the content of a token, found {shown(token)}")
            if token.get("content") == IMAGE_TOKEN:
                return int(number) if number is not None and number.isdecimal() else token.get("id")
    raise UserError(
        f"{folder}: no tokenizer file has the token {IMAGE_TOKEN}; expected it in added_tokens.json, "
        "tokenizer_config.json or tokenizer.json, as in every release"
    )


def _eos_ids(folder: Path) -> list[int]:
    """Ids that end an answer, by generation_config.json; none where there is no such file."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    if not LLM_FIELDS["eos_token_id"].holds(ids):
        expected = LLM_FIELDS["eos_token_id"].expected()
        raise UserError(f"{path}: eos_token_id: expected {expected}, found {shown(ids)}")
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
