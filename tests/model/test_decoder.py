"""The decoder equals transformers' own class of every family, with its rotary scalings, sliding window and a cache."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from ivl.architecture.config_fields import ACTIVATIONS
from ivl.checkpoint.hf_layout import llm_config
from ivl.inference.kv_cache import Append, KVCache, Prefill
from ivl.model.attention import visible
from ivl.model.decoder import MLPS, DecoderConfig, LanguageModel
from tests.model.test_llm import LONG, tiny
from tests.tiny import FAMILIES, transformers_names

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FAMILIES}
VARIANTS |= LONG
VARIANTS |= {
    "window": ("Phi3ForCausalLM", {"sliding_window": 6}),
    "yarn": (
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 1024,
            "rope_scaling": FAMILIES["Phi3ForCausalLM"][2]["rope_scaling"] | {"type": "yarn"},
        },
    ),
    "linear": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "biases of InternLM2": ("InternLM2ForCausalLM", {"bias": True}),
    "tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    **{name: ("Qwen2ForCausalLM", {"hidden_act": name}) for name in ACTIVATIONS if name not in ("silu", "swish")},
}


def pair(variant: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, Any]:
    """The same random weights in our class and in transformers'."""
    architecture, settings = VARIANTS[variant]
    model = tiny(architecture, attention, **settings)
    ours = model.language_model
    if ours.config.tie_word_embeddings:
        ours.lm_head.weight = ours.model.embed_tokens.weight
    theirs = AutoModelForCausalLM.from_config(llm_config(model.config), attn_implementation="sdpa", dtype=dtype)
    theirs.load_state_dict(transformers_names(ours.state_dict()))
    return ours.to(dtype), theirs.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(variant, attention):
    """40 tokens: beyond the limit of the long variants, and of the window."""
    ours, theirs = pair(variant, attention)
    ids = torch.randint(0, 190, (2, 40))
    positions = torch.arange(40).expand(2, -1)
    found = ours.lm_head(ours.model(ours.get_input_embeddings()(ids), positions))
    torch.testing.assert_close(found, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_gradients_equal_those_of_transformers(architecture):
    ours, theirs = pair(architecture)
    ids = torch.randint(0, 190, (1, 20))
    ours.lm_head(ours.model(ours.get_input_embeddings()(ids), torch.arange(20)[None])).square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in transformers_names(dict(ours.named_parameters())).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_bfloat16_rounds_as_transformers_does(architecture):
    ours, theirs = pair(architecture, dtype=torch.bfloat16)
    ids = torch.randint(0, 190, (1, 40))
    found = ours.lm_head(ours.model(ours.get_input_embeddings()(ids), torch.arange(40)[None]))
    assert found.dtype == torch.bfloat16
    # transformers rounds the weights of experts, and multiplies behind the last layer.
    atol = 5e-2 if architecture == "Qwen3MoeForCausalLM" else 2e-2
    torch.testing.assert_close(found, theirs(ids).logits, atol=atol, rtol=2e-2)


class Slots:
    """A cache of fixed capacity, written at each row's own position: what a compiled decode step is given."""

    def __init__(self, config: DecoderConfig, rows: int, capacity: int) -> None:
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape) for _ in range(config.num_hidden_layers)]
        self.positions_BT = torch.zeros(rows, 1, dtype=torch.long)

    def update(self, layer: int, keys_BGTK: Tensor, values_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        at = self.positions_BT[:, None, :, None].expand_as(keys_BGTK)
        self.keys[layer].scatter_(2, at, keys_BGTK)
        self.values[layer].scatter_(2, at, values_BGTK)
        return self.keys[layer], self.values[layer]


@pytest.mark.parametrize(
    "variant", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "window", "dynamic", "longrope"]
)
@torch.no_grad()
def test_a_decode_step_of_static_shapes_compiles_whole(variant):
    """Rows of different lengths in slots of one capacity: no graph break, no second compilation, the same numbers."""
    ours, _ = pair(variant)
    ids, lengths, capacity = torch.randint(0, 190, (2, 12)), torch.tensor([7, 3]), 16
    cache, window = Slots(ours.config, 2, capacity), ours.config.sliding_window
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def step(ids_B1: Tensor, positions_B1: Tensor) -> Tensor:
        columns = torch.arange(capacity)
        seen = columns <= positions_B1
        if window is not None:
            seen &= columns > positions_B1 - window
        cache.positions_BT.copy_(positions_B1)
        hidden = ours.model(ours.model.embed_tokens(ids_B1), positions_B1, seen[:, None, None], cache)
        return ours.lm_head(hidden)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(12):
            found = step(ids[:, n : n + 1], torch.full((2, 1), n))
    for row, length in enumerate(lengths.tolist()):  # go back, each row to a length of its own
        memory = KVCache()
        memory.reserve(1, length + 1)
        positions = torch.arange(length)[None]
        ours.model(
            ours.model.embed_tokens(ids[row : row + 1, :length]), positions, None, Prefill(memory, [0], [length])
        )
        expected = ours.model(
            ours.model.embed_tokens(ids[row : row + 1, length : length + 1]),
            torch.tensor([[length]]),
            visible(torch.tensor([[length]]), torch.arange(length + 1)[None], None, window),
            Append(memory, 0, length),
        )
        found = step(torch.stack([ids[0, lengths[0]], ids[1, lengths[1]]])[:, None], lengths[:, None])
        torch.testing.assert_close(found[row], ours.lm_head(expected)[0], atol=1e-5, rtol=1e-5)


def test_peft_puts_its_layers_in():
    ours, _ = pair("Qwen2ForCausalLM")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "down_proj"]), ours)
    assert "model.layers.1.mlp.down_proj.lora_A.default.weight" in dict(ours.named_parameters())


def test_the_mlp_is_a_slot(monkeypatch):
    class Nothing(torch.nn.Module):
        def __init__(self, config: DecoderConfig) -> None:
            super().__init__()

        def forward(self, x_BTD: Tensor) -> Tensor:
            return torch.zeros_like(x_BTD)

    monkeypatch.setitem(MLPS, "nothing", Nothing)
    model = LanguageModel(DecoderConfig(20, 8, 16, 1, 2, 1, 4, 32, mlp="nothing"))
    assert model.model(torch.randn(1, 3, 8), torch.arange(3)[None]).shape == (1, 3, 8)
