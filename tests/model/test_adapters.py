"""Adapters that other programs made answer as the weights they stand for."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ivl.export import export
from ivl.hf_config import read_config
from ivl.model import peft_adapter
from ivl.model.hf import hf_config
from ivl.model.internvl import InternVL
from ivl.model.layouts import to_stored
from ivl.model.weights import Files, save_weights
from ivl.types import UserError
from tests.model.rows import padded, rows
from tests.tiny import FAMILIES, write_checkpoint

NAMES = {
    "InternLM2ForCausalLM": ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "Phi3ForCausalLM": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
}
LLAMA = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
VISION = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def stored(folder) -> dict[str, Tensor]:
    """A checkpoint's tensors under its own names."""
    from safetensors.torch import load_file

    state = {}
    for path in set(Files.of(folder).where.values()):
        state |= load_file(path)
    return state


def write_adapter(folder, weights: dict[str, Tensor], layers, strip=lambda name: name, ranks=(3,), **settings):
    """A LoRA on `layers` of stored weights, as peft writes it, and the weights with it merged in."""
    generator = torch.Generator().manual_seed(1)
    state, merged = {}, dict(weights)
    patterns = settings.get("alpha_pattern", {})
    for n, layer in enumerate(layers):
        weight, rank = weights[layer + ".weight"].float(), ranks[n % len(ranks)]
        A = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        B = 0.1 * torch.randn(weight.shape[0], rank, generator=generator)
        name = "base_model.model." + strip(layer)
        state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        alpha = next((a for key, a in patterns.items() if layer.endswith(key)), settings.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        new = weight + scale * (B @ A)
        if settings.get("use_dora"):
            size = weight.norm(dim=1) * (1 + 0.1 * torch.rand(len(weight), generator=generator))
            state[f"{name}.lora_magnitude_vector"] = size
            new = size[:, None] * new / new.norm(dim=1, keepdim=True)
        merged[layer + ".weight"] = new
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": 8, "target_modules": "^made.elsewhere$"}
    (folder / "adapter_config.json").write_text(json.dumps(known | settings))
    return merged


@torch.no_grad()
def logits(model: InternVL) -> Tensor:
    batch = padded(rows(model))
    return model.eval()(**batch, return_logits=True).logits[batch.attention_mask]


def both(base, adapter, merged, tmp_path) -> None:
    """The adapter on the base answers as a checkpoint of the merged weights does, and so does its export."""
    whole = tmp_path / "whole"
    whole.mkdir()
    for path in base.iterdir():
        if not path.name.endswith((".safetensors", ".index.json")):
            (whole / path.name).write_bytes(path.read_bytes())
    save_file({n: t.contiguous() for n, t in merged.items()}, whole / "model.safetensors")
    expected = logits(InternVL.from_pretrained(whole))
    model = InternVL.from_pretrained(base)
    before = logits(model)
    peft_adapter.load_adapter(model, adapter)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    assert (before - expected).abs().max() > 0.1
    peft_adapter.merge(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_names_of_the_releases_own_code(tmp_path, architecture, settings):
    """InternLM2's wqkv among them: one A for q, k and v, each with its rows of B."""
    base = write_checkpoint(tmp_path / "base", architecture)
    inside = NAMES.get(architecture, LLAMA)
    layers = [f"language_model.model.layers.{n}.{name}" for n in range(2) for name in inside]
    layers += [f"vision_model.encoder.layers.{n}.{name}" for n in range(2) for name in VISION]
    targets = {"target_modules": r"^(language_model|vision_model)\..*\.(" + "|".join((*inside, *VISION)) + ")$"}
    merged = write_adapter(tmp_path / "adapter", stored(base), layers, **targets, **settings)
    both(base, tmp_path / "adapter", merged, tmp_path)
    assert peft_adapter.adapted_parts(tmp_path / "adapter") == ["vision_model", "language_model"]


@pytest.mark.parametrize("prefix", ["", "language_model.base_model.model."], ids=["alone", "wrapped"])
def test_the_language_model_adapted_by_itself(tmp_path, prefix):
    """As saved from the language model, and as the released trainer wraps it."""
    base = write_checkpoint(tmp_path / "base", "InternLM2ForCausalLM")
    layers = [f"language_model.model.layers.{n}.{name}" for n in range(2) for name in NAMES["InternLM2ForCausalLM"]]
    patterns = {"alpha_pattern": {"attention.wqkv": 3.0, "w2": 5.0}}
    merged = write_adapter(
        tmp_path / "adapter",
        stored(base),
        layers,
        lambda name: prefix + name.removeprefix("language_model."),
        ranks=(2, 3, 5),
        **patterns,
    )
    both(base, tmp_path / "adapter", merged, tmp_path)
    assert peft_adapter.adapted_parts(tmp_path / "adapter") == ["language_model"]


@pytest.mark.parametrize("layout", ["hf", "hf-4"])
@pytest.mark.parametrize("dora", [False, True])
def test_names_of_transformers(tmp_path, layout, dora):
    """The tower's q, k and v are one layer here: their ranks add up, also where only some have a LoRA."""
    base = write_checkpoint(tmp_path / "base", "InternLM2ForCausalLM")
    model = InternVL.from_pretrained(base)
    weights = to_stored(model.state_dict(), layout, model.config)
    tower = next(n for n in weights if "lambda_1" in n).partition("encoder")[0]
    llm = next(n for n in weights if n.endswith("layers.0.self_attn.q_proj.weight")).partition("layers")[0]
    chosen = ("attention.q_proj", "attention.v_proj", "mlp.fc1")
    if dora:
        chosen = (*chosen, "attention.k_proj")
    layers = [f"{tower}encoder.layer.{n}.{name}" for n in range(2) for name in chosen]
    layers += [f"{llm}layers.1.{name}" for name in LLAMA]
    patterns = {"alpha_pattern": {"attention.v_proj": 5.0}, "use_dora": dora}
    merged = write_adapter(tmp_path / "adapter", weights, layers, ranks=(2, 3), **patterns)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model.config, model.image_token_id)))
    save_file({n: t.contiguous() for n, t in merged.items()}, folder / "model.safetensors")
    expected = logits(InternVL.from_pretrained(folder))
    peft_adapter.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    assert read_config(folder).vision == model.config.vision


def test_fully_tuned_parts_come_along(tmp_path):
    base = write_checkpoint(tmp_path / "base", "InternLM2ForCausalLM")
    weights = stored(base)
    layers = ["language_model.model.layers.0.attention.wqkv"]
    merged = write_adapter(tmp_path / "adapter", weights, layers, modules_to_save=["mlp1"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file

    state = load_file(path)
    for name in [n for n in weights if n.startswith("mlp1.")]:
        merged[name] = weights[name] + 0.1
        state[f"base_model.model.{name}"] = merged[name]
    save_file(state, path)
    both(base, tmp_path / "adapter", merged, tmp_path)
    assert peft_adapter.adapted_parts(tmp_path / "adapter") == ["mlp1", "language_model"]


def test_it_is_exported(tmp_path):
    base = write_checkpoint(tmp_path / "base", "InternLM2ForCausalLM")
    merged = write_adapter(tmp_path / "adapter", stored(base), ["language_model.model.layers.1.attention.wqkv"])
    out = export(str(tmp_path / "out"), adapter=str(tmp_path / "adapter"), base=str(base))
    written = stored(out)
    assert written.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(written[name], tensor, atol=2e-5, rtol=0)


def test_what_does_not_fit_is_refused(tmp_path):
    base = write_checkpoint(tmp_path / "base", "InternLM2ForCausalLM")
    weights = stored(base)
    layer = "language_model.model.layers.0.attention.wqkv"
    write_adapter(tmp_path / "other", weights, [layer], lambda name: name.replace("layers.0", "layers.7"))
    write_adapter(tmp_path / "half", weights, [layer])
    from safetensors.torch import load_file

    path = tmp_path / "half" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "lora_A" in n}, path)
    model = InternVL.from_pretrained(base)
    with pytest.raises(UserError, match=r"1 of its 1 layers are not in it in any layout, .*layers\.7\.attention\.wqkv"):
        peft_adapter.load_adapter(model, tmp_path / "other")
    with pytest.raises(UserError, match=r"wqkv without its lora_B; the file is damaged"):
        peft_adapter.load_adapter(model, tmp_path / "half")
    save_weights(model.state_dict(), tmp_path / "again", "internlm2", model.config)  # nothing was changed
    assert all(torch.equal(t, weights[n]) for n, t in stored(tmp_path / "again").items())
