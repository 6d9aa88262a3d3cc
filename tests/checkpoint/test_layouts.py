"""Key tables: read and write undo one another, and hand-made fused weights come apart as they should."""

import pytest
import torch

from ivl.architecture.config import Config
from ivl.architecture.families import LLMS
from ivl.checkpoint.layouts import groups, layout_of, to_stored
from ivl.checkpoint.weights import Files
from tests.tiny import FAMILIES, TOWERS, config, random_state


def parsed(architecture: str, vision: str = "300m", **llm) -> Config:
    _, template, extra = FAMILIES[architecture]
    return Config.from_dict(config(architecture, vision, template, {"<IMG_CONTEXT>": 50}, extra | llm, {}))


def read_back(stored: dict, names, layout: str, made: Config) -> dict:
    back = {}
    for group in groups(names, layout, made):
        back |= zip(group.module, group.read([stored.pop(n) for n in group.stored], made))
    return back


FUSED = {"Qwen3MoeForCausalLM": ("native-fused", "hf-fused")}

CASES = [
    (architecture, vision, layout)
    for architecture in FAMILIES
    for vision in TOWERS
    for layout in dict.fromkeys((LLMS[architecture].layout, "hf", "hf-4", *FUSED.get(architecture, ())))
]


@pytest.mark.parametrize(("architecture", "vision", "layout"), CASES)
def test_every_layout_is_recognised_and_undoes_itself(architecture, vision, layout):
    made = parsed(architecture, vision, bias=True)
    state = random_state(made, seed=0)
    stored = to_stored(state, layout, made)
    assert layout_of(stored, made) == layout
    back = read_back(stored, state, layout, made)
    assert not stored
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_internlm2_keeps_queries_of_a_key_together():
    """4 query heads and 2 key heads of width 4: q0 q1 k0 v0, q2 q3 k1 v1."""
    made = parsed("InternLM2ForCausalLM", hidden_size=16)
    group = next(g for g in groups(random_state(made, 0), "internlm2", made) if "wqkv" in g.stored[0])
    fused = torch.arange(8.0).repeat_interleave(4)[:, None] + torch.zeros(32, 16)
    q, k, v = (t[::4, 0].tolist() for t in group.read([fused], made))
    assert (q, k, v) == ([0, 1, 4, 5], [2, 6], [3, 7])


def test_experts_are_named_one_by_one_in_files_and_fused_as_transformers_has_them():
    made = parsed("Qwen3MoeForCausalLM", mlp_only_layers=[0])
    state = random_state(made, 0)
    stored = to_stored(state, "native", made)
    layer = "language_model.model.layers.1.mlp."
    gate_up = state[layer + "experts.gate_up_proj.weight"]
    assert torch.equal(stored[layer + "experts.4.gate_proj.weight"], gate_up[4, :24])
    assert torch.equal(stored[layer + "experts.4.up_proj.weight"], gate_up[4, 24:])
    assert torch.equal(stored[layer + "experts.4.down_proj.weight"], state[layer + "experts.down_proj.weight"][4])
    assert layer + "gate.weight" in stored
    assert not [name for name in stored if "layers.0.mlp.experts" in name]
    fused = to_stored(state, "hf-fused", made)
    assert torch.equal(fused["model.language_model.layers.1.mlp.experts.gate_up_proj"], gate_up)
    assert "model.language_model.layers.1.mlp.experts.3.up_proj.weight" in to_stored(state, "hf", made)
    assert "language_model.model.layers.1.mlp.experts.3.up_proj.weight" in to_stored(state, "hf-4", made)


def test_recorded_names_are_those_of_the_tables(recorded):
    """Whatever a recorded checkpoint stores, the tables make from the module, and nothing else."""
    model = recorded.model()
    layout = LLMS[model.config.llm_architecture].layout
    stored = to_stored(model.state_dict(), layout, model.config)
    files = Files.of(recorded.folder)
    assert {name: tuple(t.shape) for name, t in stored.items()} == files.shapes


def test_transformers_4_and_5_differ_in_prefixes_alone():
    made = parsed("Qwen2ForCausalLM")
    new, old = (list(to_stored(random_state(made, 0), layout, made)) for layout in ("hf", "hf-4"))
    assert "model.vision_tower.encoder.layer.0.attention.q_proj.weight" in new
    assert "vision_tower.encoder.layer.0.attention.q_proj.weight" in old
    assert {"lm_head.weight", "model.language_model.norm.weight"} <= set(new)
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} <= set(old)
    assert len(new) == len(old)
