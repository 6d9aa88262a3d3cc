"""Adapters that other programs made answer as the weights they stand for."""

import json
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ivl.architecture.hf_config import read_config
from ivl.checkpoint.hf_layout import hf_config
from ivl.checkpoint.layouts import to_stored
from ivl.checkpoint.weights import Files, save_weights
from ivl.commands.export import export
from ivl.finetune.adapter import peft_adapter
from ivl.finetune.adapter.adapter_config import NO_EFFECT, READ, REFUSED
from ivl.model.internvl import InternVL
from ivl.types import UserError
from tests.model.rows import padded, rows
from tests.tiny import FAMILIES, write_checkpoint

NAMES = {
    "InternLM2ForCausalLM": ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "Phi3ForCausalLM": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
}
ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
EXPERTS = tuple(f"mlp.experts.{e}.{x}_proj" for e in range(6) for x in ("gate", "up", "down"))
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
    if architecture == "Qwen3MoeForCausalLM":  # as the class of transformers 4 has them, a module each
        inside = ATTENTION if settings.get("use_dora") else (*ATTENTION, *EXPERTS)
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


# -- what adapter_config.json and the folder say besides names ------------------------------------------------------


class Tree(nn.Module):
    """Linear layers of stored weights under their names, for peft to put an adapter on."""

    def __init__(self, weights: dict[str, Tensor], layers: list[str]) -> None:
        super().__init__()
        for layer in layers:
            owner: nn.Module = self
            *path, leaf = layer.split(".")
            for word in path:
                if not hasattr(owner, word):
                    owner.add_module(word, nn.Module())
                owner = getattr(owner, word)
            weight, bias = weights[layer + ".weight"].float(), weights.get(layer + ".bias")
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
            linear.weight.data = weight.clone()
            if bias is not None:
                linear.bias.data = bias.float().clone()
            owner.add_module(leaf, linear)

    def forward(self, x: Tensor) -> Tensor:
        return x


def of_peft(weights: dict[str, Tensor], layers: list[str], folder, **settings) -> dict[str, Tensor]:
    """Train an adapter a little by peft, save it, and return the weights that peft merges from the folder."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, **settings)
    adapted = get_peft_model(Tree(weights, layers), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return dict(PeftModel.from_pretrained(Tree(weights, layers), folder).merge_and_unload().state_dict())


def merged_here(base, adapter, layout: str) -> dict[str, Tensor]:
    model = InternVL.from_pretrained(base)
    peft_adapter.load_adapter(model, adapter)
    peft_adapter.merge(model)
    return to_stored(model.state_dict(), layout, model.config)


LAYOUT = {
    "internlm2": ("attention.wqkv", "attention.wo", "feed_forward.w2"),
    "native": ("self_attn.q_proj", "mlp.down_proj", "attn.qkv"),
    "hf": ("self_attn.v_proj", "attention.q_proj", "attention.v_proj", "mlp.fc1"),
}
LIKE_PEFT = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "biases of its layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "patterns": {"rank_pattern": {"layers.1.*": 5}, "alpha_pattern": {".*0.*": 11}},
    "some layers": {"layers_to_transform": [1]},
    "saved": {"modules_to_save": ["lm_head", "linear_1", "mlp1.1", "output"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", LIKE_PEFT.values(), ids=LIKE_PEFT)
@pytest.mark.parametrize("layout", LAYOUT)
def test_every_setting_gives_the_weights_of_peft(tmp_path, layout, settings):
    architecture = "InternLM2ForCausalLM" if layout == "internlm2" else "Qwen2ForCausalLM"
    base = write_checkpoint(tmp_path / "base", architecture)
    model = InternVL.from_pretrained(base)
    weights = to_stored(model.state_dict(), layout, model.config)
    linear = [n.removesuffix(".weight") for n, t in weights.items() if t.ndim == 2 and "embed" not in n]
    expected = of_peft(weights, linear, tmp_path / "adapter", target_modules=list(LAYOUT[layout]), **settings)
    got = merged_here(base, tmp_path / "adapter", layout)
    assert any((expected[n] - weights[n]).abs().max() > 0.005 for n in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=2e-5, rtol=0, msg=name)
    for name in got.keys() - expected.keys():
        torch.testing.assert_close(got[name], weights[name], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_a_lora_on_the_output_layer_is_that_of_peft(tmp_path, layout):
    base = write_checkpoint(tmp_path / "base")
    model = InternVL.from_pretrained(base)
    weights = to_stored(model.state_dict(), layout, model.config)
    head = "lm_head" if layout == "hf" else "language_model.lm_head"
    expected = of_peft(weights, [head], tmp_path / "adapter", target_modules=["lm_head"])
    torch.testing.assert_close(
        merged_here(base, tmp_path / "adapter", layout)[head + ".weight"], expected[head + ".weight"]
    )
    tied = write_checkpoint(tmp_path / "tied", llm={"tie_word_embeddings": True})
    with pytest.raises(UserError, match=r"weights of the output layer .* is the embeddings themselves in this model"):
        peft_adapter.load_adapter(InternVL.from_pretrained(tied), tmp_path / "adapter")


def written(tmp_path, **settings):
    """A base, and an adapter on one of its layers with these settings."""
    base = write_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "adapter", stored(base), ["language_model.model.layers.0.self_attn.q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return base, tmp_path / "adapter"


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": init} for init in ("corda", "loftq", "lora_ga", "pissa_niter_4", "new", 3, ["pissa"])),
        {"alora_invocation_tokens": [1, 2]},
        {"trainable_token_indices": [5]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"lora_bias": True},
        {"megatron_config": {"a": 1}},
        {"use_qalora": True},
        {"use_bdlora": {"a": 1}},
        {"ensure_weight_tying": True},
        {"a_key_of_tomorrow": 1},
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"bias": "some"},
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 2},
        {"use_rslora": "yes"},
        {"use_dora": 1},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 1}},
        {"target_modules": [1]},
        {"modules_to_save": 5},
        {"base_model_name_or_path": 5},
    ],
    ids=lambda settings: f"{settings}",
)
def test_what_is_not_computed_is_refused_by_its_key(tmp_path, settings):
    base, adapter = written(tmp_path, **settings)
    (key,) = settings
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key}"):
        peft_adapter.load_adapter(InternVL.from_pretrained(base), adapter)


def test_every_key_of_peft_is_known():
    """A new version of peft may bring a key that changes the meaning: it is to be listed, or refused."""
    names = {f.name for f in fields(LoraConfig)}
    assert names <= {*NO_EFFECT, *REFUSED, *READ}


def test_keys_that_are_off_are_passed_over(tmp_path):
    base, adapter = written(tmp_path, a_key_of_tomorrow=None, another=False, third={}, lora_dropout=0.05)
    assert peft_adapter.load_adapter(InternVL.from_pretrained(base), adapter).config.dropout == 0.05


def test_a_tower_beside_the_adapter_is_loaded(tmp_path):
    """ms-swift's vit.safetensors: the vision encoder and the projector, trained in full."""
    base, adapter = written(tmp_path)
    weights = stored(base)
    tower = {n: t + 0.1 for n, t in weights.items() if n.startswith(("vision_model.", "mlp1."))}
    save_file(tower, adapter / "vit.safetensors")
    model = InternVL.from_pretrained(base)
    assert set(peft_adapter.load_adapter(model, adapter).replaced) == set(tower)
    for name, tensor in tower.items():
        assert torch.equal(model.get_parameter(name), tensor)
    assert peft_adapter.adapted_parts(adapter) == ["vision_model", "mlp1", "language_model"]


def test_other_weights_beside_the_adapter_are_refused(tmp_path):
    base, adapter = written(tmp_path)
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "adapter_model.bin"):
        (adapter / name).write_bytes(b"")
    peft_adapter.load_adapter(InternVL.from_pretrained(base), adapter)
    (adapter / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"beside it lie non_lora_trainables\.bin"):
        peft_adapter.load_adapter(InternVL.from_pretrained(base), adapter)


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["language_model.model.layers.1.self_attn.q_proj"]}, {"modules_to_save": ["mlp1"]}]
)
def test_what_the_config_names_and_the_file_lacks_is_refused(tmp_path, settings):
    base, adapter = written(tmp_path, **settings)
    with pytest.raises(UserError, match=rf"its config has {next(iter(settings))} .* no tensor of it"):
        peft_adapter.load_adapter(InternVL.from_pretrained(base), adapter)


def test_a_file_without_tensors_is_refused(tmp_path):
    """Some programs leave one where each process held a share of the weights."""
    base, adapter = written(tmp_path)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors holds no tensors; save the adapter again"):
        peft_adapter.load_adapter(InternVL.from_pretrained(base), adapter)


def test_only_a_pickle_is_named(tmp_path):
    base, adapter = written(tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"there is only adapter_model\.bin, a pickle"):
        peft_adapter.load_adapter(InternVL.from_pretrained(base), adapter)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("07_bias_adapter/adapter_embedding", "a LoRA on the embeddings"),
        ("01_pissa/adapter_hf_qwen2", None),
        ("05_swift_vit/adapter", None),
        ("06_lm_head_lora/adapter", None),
        ("07_bias_adapter/adapter", None),
    ],
)
def test_adapters_people_have(shared, golden, name, message):
    """Small ones of the kinds that public reports are about, on the checkpoint they were made for."""
    folder = shared / "cases/inference" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    model = InternVL.from_pretrained(golden / "checkpoints/internvl2_1b")
    if message:
        with pytest.raises(UserError, match=message):
            peft_adapter.load_adapter(model, folder)
        return
    before = {n: t.clone() for n, t in model.state_dict().items()}
    peft_adapter.load_adapter(model, folder)
    peft_adapter.merge(model)
    assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_an_adapter_that_names_another_base_is_told(tmp_path):
    base, adapter = written(tmp_path, base_model_name_or_path="/somewhere/else/InternVL2-1B")
    with pytest.raises(UserError, match=r"made for '/somewhere/else/InternVL2-1B', which is not .* with --base"):
        export(str(tmp_path / "out"), adapter=str(adapter))
    out = export(str(tmp_path / "out"), adapter=str(adapter), base=str(base))
    notes = json.loads((out / "export_report.json").read_text())["notes"]
    assert [note for note in notes if "made for /somewhere/else/InternVL2-1B, and is put on" in note]
    for same in (
        "internvl2-1b",
        "OpenGVLab/InternVL2-1B",
        "/data/InternVL2_1B",
        "/x/models--OpenGVLab--InternVL2-1B/snapshots/0",
    ):
        assert peft_adapter.other_base(adapter, same) is None
