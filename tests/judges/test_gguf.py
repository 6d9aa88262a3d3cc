"""Tensor names and config keys of a released export against llama.cpp's converter of InternVL.

The converter reads the vision part and the language part apart; `mmproj_names` and `language_names` are its steps
before it looks a name up in the gguf package, in our words.
"""

from __future__ import annotations

import json
import re

import pytest

from ivl.commands.export import export
from tests.commands.test_export import stored
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer, interpreter
from tests.tiny import FAMILIES, write_checkpoint

GGUF = {
    "InternLM2ForCausalLM": "INTERNLM2",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "Qwen3MoeForCausalLM": "QWEN3MOE",
    "LlamaForCausalLM": "LLAMA",
    "Phi3ForCausalLM": "PHI3",
}
KEYS = {"downsample_ratio", "min_dynamic_patch", "max_dynamic_patch", "vision_config", "llm_config"}
VISION_KEYS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps",
}  # fmt: skip


def mmproj_names(names: list[str]) -> list[str]:
    found = []
    for name in names:
        if name.startswith("vision_model"):
            name = "vision_tower." + name
        if re.search(r"\.ls|position_embedding", name) and not name.endswith(".weight"):
            name += ".weight"
        parts = ("q", "k", "v") if ".qkv." in name else ("",)
        found += [name.replace("attn.qkv", f"self_attn.{part}_proj") for part in parts]
    return found


def language_names(names: list[str]) -> list[str]:
    """Experts are stacked, one name for all; InternLM2's `wqkv` is cut in three."""
    plain = [name.removeprefix("language_model.") for name in names]
    plain = [name.replace("wqkv", part) for name in plain for part in (("wq", "wk", "wv") if "wqkv" in name else ("",))]
    return sorted({re.sub(r"experts\.\d+\.", "experts.", name) for name in plain})


@pytest.mark.judge
@pytest.mark.parametrize("vision", ["300m", "6b"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_converter_knows_every_name(architecture, vision, tmp_path):
    interpreter("gguf")
    base = write_checkpoint(tmp_path / "base", architecture, vision)
    out = export(str(tmp_path / "out"), base=str(base))
    config = json.loads((out / "config.json").read_text())
    assert set(config) >= KEYS and set(config["vision_config"]) >= VISION_KEYS
    language = [name for name in stored(out) if name.startswith("language_model.")]
    seeing = mmproj_names([name for name in stored(out) if not name.startswith("language_model.")])
    unknown, cases = [], 0
    for part, names in ((GGUF[architecture], language_names(language)), ("MMPROJ", seeing)):
        task = {"architecture": part, "blocks": 24, "names": names}
        found = answer("gguf", task, tmp_path, PYTHONPATH="")
        cases += len(names)
        unknown += [name for name, other in zip(names, found, strict=True) if other is None]
    what = f"names of tensors for llama.cpp's converter, {architecture}, InternViT {vision}"
    result = Result("gguf", what, cases, len(unknown), {}, versions_in("gguf", "gguf"))
    record(f"gguf_{architecture}_{vision}", [result])
    assert not unknown, unknown
