"""Releases that this program does not load, by name before anything is fetched and by config.json; with the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ivl.architecture.families import find_model
from ivl.errors import UserError

OWNERS = ("opengvlab", "ai-modelscope", "internlm", "shanghai-ai-laboratory", "shanghai_ai_laboratory", "")
"""Owners of the releases, in lower case; copies of quantised weights have any owner."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Unsupported:
    """Kind of release that is refused."""

    kind: str
    names: str
    """Pattern of the names after the owner, in lower case with `-` for `_` and `.`"""
    why: str
    way_out: str
    """Remedy; `{base}` stands for the release without the ending of this kind."""
    config: Callable[[Settings], bool] = lambda raw: False
    """True for a config.json of this kind."""
    any_owner: bool = False


def _language_model(*names: str) -> Callable[[Settings], bool]:
    """Test of a config.json for an architecture or model type of the language model."""

    def test(raw: Settings) -> bool:
        for part in (raw.get("llm_config"), raw.get("text_config")):
            if isinstance(part, dict):
                declared = [part.get("model_type"), *(part.get("architectures") or ())]
                return any(name in declared for name in names)
        return False

    return test


def _model_type(*names: str) -> Callable[[Settings], bool]:
    return lambda raw: raw.get("model_type") in names or any(n in (raw.get("architectures") or ()) for n in names)


def _is_flash(raw: Settings) -> bool:
    return bool(raw.get("flash_mode")) or "flash_relative_threshold" in raw


_QUANTISED = "its weights are quantised, a form that is not read here"
_UNQUANTISED = "take {base}, and --quantize int8 or nf4 (model.quantize) for the same memory"
UNSUPPORTED = (
    Unsupported(
        "Flash",
        r"^internvl3-5-.*-flash$",
        "its visual router gives each tile 64 or 256 tokens by what is in the other tiles; nobody published how it is "
        "trained",
        "take {base}, the same model with 256 tokens a tile; lmdeploy serves Flash",
        _is_flash,
    ),
    Unsupported(
        "GPT-OSS",
        r"gpt-oss",
        "its language model (attention sinks, MXFP4 experts) has no decoder here",
        "take internvl3_5-14b; ms-swift trains this one",
        _language_model("GptOssForCausalLM", "gpt_oss"),
    ),
    Unsupported(
        "InternVL-U",
        r"^internvl-u(-|$)",
        "it generates images as well, by a diffusion head of its own",
        "use the code of its release; for answers about images take internvl3_5-4b",
        _model_type("internvlu_chat", "internvlu", "InternVLUChatModel"),
    ),
    Unsupported(
        "Intern-S1",
        r"^intern-s[12]",
        "another layout and a tokenizer of its own",
        "take internvl3_5-8b, the nearest model here; lmdeploy and ms-swift load Intern-S1",
        _model_type("interns1", "InternS1ForConditionalGeneration"),
    ),
    Unsupported(
        "Mono-InternVL",
        r"^mono-internvl",
        "another architecture, without a vision tower",
        "take internvl2-2b; lmdeploy loads Mono-InternVL",
        _language_model("InternLM2VEForCausalLM", "internlm2ve"),
    ),
    Unsupported(
        "vision encoders and contrastive models",
        r"^(internvit-|internvl-14b-|internvl-[cg]$)",
        "not a chat model",
        "take a model that `python -m ivl models` lists; its vision tower trains by model.tune.vision_model",
        _model_type("intern_vit_6b", "InternVisionModel"),
    ),
    Unsupported(
        "InternVideo2.5, InternOmni, HoVLE, SDLM",
        r"^(internvideo|internomni|hovle|sdlm)",
        "another architecture",
        "take internvl3_5-8b, which takes videos too",
    ),
    Unsupported("AWQ", r"-awq$", _QUANTISED, _UNQUANTISED, any_owner=True),
    Unsupported("GPTQ", r"-gptq(-[a-z0-9-]+)?$", _QUANTISED, _UNQUANTISED, any_owner=True),
    Unsupported("GGUF", r"-gguf$", "its weights are for llama.cpp", _UNQUANTISED, any_owner=True),
    Unsupported("FP8", r"-fp8(-[a-z0-9-]+)?$", _QUANTISED, _UNQUANTISED, any_owner=True),
)


def refuse_name(name: str) -> None:
    """Raise UserError for the name of a release that is not loaded here."""
    owner, _, stem = name.partition("@")[0].rpartition("/")
    if find_model(name) is not None:
        return
    key = re.sub(r"[_.]", "-", stem.lower())
    for row in UNSUPPORTED:
        if re.search(row.names, key) and (row.any_owner or owner.lower() in OWNERS):
            raise UserError(f"{name}: is not loaded here ({row.kind}): {row.why}; {_way_out(row, name)}")


def refuse_config(raw: Settings, where: object) -> None:
    """Raise UserError for the config.json of a release that is not loaded here."""
    for row in UNSUPPORTED:
        if row.config(raw):
            way_out = row.way_out.format(base="the release without -Flash in its name")
            raise UserError(f"{where}: is not loaded here ({row.kind}): {row.why}; {way_out}")


def _way_out(row: Unsupported, name: str) -> str:
    base = re.sub(rf"-{row.kind}.*$", "", name, flags=re.IGNORECASE)
    known = find_model(base)
    return row.way_out.format(base=known.name if known else f"the release that it was made from ({base})")
