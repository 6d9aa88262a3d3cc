"""Whole conversions by llama.cpp of released exports: every tensor and the main keys of the two files, against ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl.commands.export import export
from ivl.data.text.tokenizer import Tokenizer
from tests.commands.test_export import stored
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer, checkout, commit_of
from tests.judges.test_gguf import GGUF, language_names, mmproj_names
from tests.tiny import config, write_checkpoint

FAMILIES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Phi3ForCausalLM", "LlamaForCausalLM")
CASES = [(name, vision) for name in FAMILIES for vision in ("300m", "6b")]
HEADS = {"q": "num_attention_heads", "k": "num_key_value_heads"}


def parts(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """A stored tensor under the names that the converter looks up: a fused one is cut in three."""
    if ".qkv." in name:
        return dict(zip(mmproj_names([name]), np.split(tensor, 3), strict=True))
    return {mmproj_names([name])[0]: tensor}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of Llama's first files: the two of a rotated pair side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def expected(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors of the language model and of the rest by the converter's names, experts stacked."""
    llm = json.loads((folder / "config.json").read_text())["llm_config"]
    llama = llm["architectures"] == ["LlamaForCausalLM"]
    language: dict[str, np.ndarray] = {}
    seeing: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in sorted(stored(folder).items(), key=lambda item: expert(item[0])):
        value = tensor.float().numpy()
        (short,) = language_names([name]) if name.startswith("language_model.") else ("",)
        if ".experts." in name:
            experts.setdefault(short, []).append(value)
        elif moved := re.search(r"self_attn\.([qk])_proj", short) if llama else None:
            language[short] = interleaved(value, llm[HEADS[moved[1]]])
        elif short:
            language[short] = value
        else:
            seeing |= parts(name, value)
    return language | {name: np.stack(values) for name, values in experts.items()}, seeing


def expert(name: str) -> int:
    return int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else -1


def differing(ours: dict[str, np.ndarray], made: dict[str, Any], file: Path) -> list[str]:
    """Tensors that are missing, too many or other than ours."""
    with np.load(file) as theirs:
        wrong = [
            name
            for name, value in ours.items()
            if made["tensors"][name] not in theirs
            or not np.array_equal(theirs[made["tensors"][name]].reshape(value.shape), value)
        ]
        return wrong + sorted(set(theirs) - {made["tensors"][name] for name in ours})


def wanted_fields(raw: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Keys of the two files and their values by config.json; `name`: of the language model's kind there."""
    llm, vision = raw["llm_config"], raw["vision_config"]
    return {
        "language": {
            f"{name}.block_count": llm["num_hidden_layers"],
            f"{name}.embedding_length": llm["hidden_size"],
            f"{name}.attention.head_count": llm["num_attention_heads"],
            f"{name}.attention.head_count_kv": llm["num_key_value_heads"],
            f"{name}.context_length": llm["max_position_embeddings"],
        },
        "mmproj": {
            "clip.projector_type": "internvl",
            "clip.vision.image_size": vision["image_size"],
            "clip.vision.patch_size": vision["patch_size"],
            "clip.vision.embedding_length": vision["hidden_size"],
            "clip.vision.feed_forward_length": vision["intermediate_size"],
            "clip.vision.block_count": vision["num_hidden_layers"],
            "clip.vision.attention.head_count": vision["num_attention_heads"],
            "clip.vision.projection_dim": llm["hidden_size"],
            "clip.vision.projector.scale_factor": 2,
            "clip.use_gelu": True,
            "clip.vision.preproc_min_tiles": raw["min_dynamic_patch"],
            "clip.vision.preproc_max_tiles": raw["max_dynamic_patch"],
        },
    }


def long_factors(llm: dict[str, Any], names: dict[str, str | None]) -> dict[str, np.ndarray]:
    """Factors of Phi-3's positions, which are tensors there; their names are added to `names`."""
    scaling = llm.get("rope_scaling") or {}
    made = {f"rope_factors_{kind}.weight": scaling.get(f"{kind}_factor") for kind in ("long", "short")}
    factors = {name: np.array(values, np.float32) for name, values in made.items() if values}
    names |= {name: name for name in factors}
    return factors


def tower(vision: str) -> dict[str, Any]:
    """Vision tower of four layers: the converter numbers the projector's layers, up to 3, as it does the tower's."""
    raw = config("Qwen2ForCausalLM", vision, "internvl2_5", {"": 0}, {}, {})
    return raw["vision_config"] | {"num_hidden_layers": 4}


@pytest.mark.judge
@pytest.mark.parametrize(("architecture", "vision"), CASES)
def test_a_conversion(architecture, vision, tmp_path):
    llama = checkout("IVL_LLAMA_CPP", "ggml-org/llama.cpp", "convert_hf_to_gguf.py")
    base = write_checkpoint(tmp_path / "base", architecture, vision, overrides={"vision_config": tower(vision)})
    out = export(str(tmp_path / "out"), base=str(base), dtype="float32")
    tokenizer = Tokenizer.load(out)
    language, seeing = expected(out)
    task = {
        "checkout": str(llama), "folder": str(out), "out": str(tmp_path), "pre": "qwen2",
        "names": {"language": [GGUF[architecture], [*language]], "mmproj": ["MMPROJ", [*seeing]]},
    }  # fmt: skip
    made = answer("gguf", task, tmp_path, "llama_cpp_side.py", PYTHONPATH="")
    raw = json.loads((out / "config.json").read_text())
    language |= long_factors(raw["llm_config"], made["language"]["tensors"])
    fields = wanted_fields(raw, made["language"]["fields"]["general.architecture"])
    wrong = differing(language, made["language"], tmp_path / "language.npz")
    wrong += differing(seeing, made["mmproj"], tmp_path / "mmproj.npz")
    for part, values in fields.items():
        found = made[part]["fields"]
        wrong += [f"{key}: {found.get(key)}, ours {value}" for key, value in values.items() if found.get(key) != value]
    tokens = made["language"]["fields"]["tokenizer.ggml.tokens"]
    names = {token.text: token.id for token in tokenizer.added.values()}
    wrong += [f"token {text}: {tokens[n]}" for text, n in names.items() if tokens[n] != text]
    cases = len(language) + len(seeing) + sum(map(len, fields.values())) + len(names)
    what = f"a whole conversion: tensors, sizes and added tokens, {architecture}, InternViT {vision}"
    versions = {"llama.cpp": commit_of(llama)} | versions_in("gguf", "transformers")
    record(f"llama_cpp_{architecture}_{vision}", [Result("llama.cpp", what, cases, len(wrong), {}, versions)])
    assert not wrong, wrong
