"""Decoder families of docs/design.md: its diffs, applied, compute what transformers' classes compute."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, MistralConfig, PreTrainedConfig

from tests.diffs import REPO, applied
from tests.test_docs import blocks

DIFFS = blocks(REPO / "docs/design.md", "diff")
COMMON: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "MistralForCausalLM": (MistralConfig, {"sliding_window": 6, "hidden_act": "silu"}),
    "GemmaForCausalLM": (GemmaConfig, {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
}


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch) -> tuple[str, ModuleType, ModuleType]:
    """Name of a family, and the modules `ivl.architecture.families` and `ivl.model.decoder` with its diff applied."""
    sources = applied(next(text for text in DIFFS if request.param in text))
    modules = []
    for name in ("ivl.architecture.families", "ivl.model.layers", "ivl.model.decoder"):
        path = name.replace(".", "/") + ".py"
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(sources.get(path) or (REPO / path).read_text(encoding="utf-8"), path, "exec"), module.__dict__)
        modules.append(module)
    return request.param, modules[0], modules[2]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_a_family_by_a_small_diff_equals_transformers_class(family, kernel):
    name, families, decoder = family
    kind, settings = FAMILIES[name]
    raw = COMMON | settings | {"architectures": [name]}
    torch.manual_seed(0)
    ours = decoder.LanguageModel(decoder.DecoderConfig.from_llm(raw, families.llm_family(name), kernel))
    theirs = AutoModelForCausalLM.from_config(kind(**COMMON | settings), attn_implementation="sdpa").eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 190, (2, 40))
    found = ours.lm_head(ours.model(ours.get_input_embeddings()(ids), torch.arange(40).expand(2, -1)))
    torch.testing.assert_close(found, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert found.std() > 0.1
