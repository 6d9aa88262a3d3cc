"""What trains, what a LoRA covers, and the adapter folder read by peft itself."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ivl.families import llm_family
from ivl.model import tune
from ivl.model.internvl import InternVL
from ivl.model.tune import LoRA, Tune
from ivl.types import UserError
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2")


def inputs(model: InternVL) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 200, (2, 24), generator=generator)
    ids[:, 5:9] = model.image_token_id
    tiles = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8, generator=generator)
    return {"input_ids": ids, "tiles": tiles}


def stirred(model: InternVL) -> InternVL:
    """Everything that trains moved, so that an adapter that is not applied shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_table_and_groups_add_up(folder):
    model = InternVL.from_pretrained(folder)
    tune.apply(model, Tune(vision_model="frozen", mlp1="full", language_model=LoRA(rank=4)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"mlp1", "language_model"}
    assert all("lora_" in n for n in trained if n.startswith("language_model"))
    groups = tune.param_groups(model)
    assert sum(len(g["params"]) for g in groups) == len(trained)
    assert [g["name"] for g in groups] == ["mlp1", "mlp1_no_decay", "language_model"]
    assert all(p.ndim == 1 for g in groups if g.get("weight_decay") == 0.0 for p in g["params"])
    assert "LoRA on 14 layers" in tune.table(model)


@pytest.mark.parametrize(
    ("architecture", "linears"),
    [
        ("InternLM2ForCausalLM", 7),
        ("LlamaForCausalLM", 7),
        ("Qwen2ForCausalLM", 7),
        ("Qwen3ForCausalLM", 7),
        ("Phi3ForCausalLM", 4),
    ],
)
def test_targets_are_the_linear_layers_of_the_blocks(tmp_path, architecture, linears):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path, architecture))
    names = tune.target_names(model, "language_model", LoRA())
    assert len(names) == 2 * linears
    assert all(n.startswith("language_model.model.layers.") for n in names)
    vision = tune.target_names(model, "vision_model", LoRA())
    assert [n.removeprefix("vision_model.encoder.layers.0.") for n in vision[:4]] == [
        "attn.qkv",
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    ]


def test_an_unknown_target_is_named(folder):
    with pytest.raises(UserError, match=r"language_model\.targets: no linear layer is named wqkv; there are down_proj"):
        tune.apply(InternVL.from_pretrained(folder), Tune(language_model=LoRA(targets=["wqkv"])))


def test_nothing_to_train_is_an_error(folder):
    with pytest.raises(UserError, match="nothing trains"):
        tune.apply(InternVL.from_pretrained(folder), Tune(language_model="frozen"))


def test_frozen_weights_keep_their_type_and_what_trains_is_float32(folder):
    model = InternVL.from_pretrained(folder, dtype="bfloat16")
    tune.apply(model, Tune(mlp1="full", language_model=LoRA(rank=2)))
    kinds = (
        {p.dtype for p in model.parameters() if p.requires_grad},
        {p.dtype for p in model.parameters() if not p.requires_grad},
    )
    assert kinds == ({torch.float32}, {torch.bfloat16})


SETTINGS = [
    Tune(language_model=LoRA(rank=4)),
    Tune(vision_model=LoRA(rank=2, alpha=3), mlp1="full", language_model=LoRA(rank=4, rslora=True)),
    Tune(vision_model=LoRA(rank=2, dora=True), mlp1=LoRA(rank=3, dora=True), language_model=LoRA(rank=4, dora=True)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["language", "three parts", "dora"])
def test_peft_reads_the_adapter_with_equal_logits(folder, tmp_path, settings):
    from peft import PeftModel

    model = InternVL.from_pretrained(folder)
    tune.apply(model, settings)
    batch = inputs(model)
    plain = InternVL.from_pretrained(folder)(**batch).logits
    expected = stirred(model)(**batch).logits
    assert (expected - plain).abs().max() > 0.1
    tune.save_adapter(model, settings, tmp_path / "adapter", base=str(folder))
    read = PeftModel.from_pretrained(InternVL.from_pretrained(folder), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(read(**batch).logits, expected, atol=1e-5, rtol=0)
    own = InternVL.from_pretrained(folder)
    tune.load_adapter(own, tmp_path / "adapter")
    torch.testing.assert_close(own.eval()(**batch).logits, expected, atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
    other = InternVL.from_pretrained(write_checkpoint(tmp_path / "other", llm={"hidden_size": 32}))
    settings = Tune(language_model=LoRA(rank=4))
    tune.apply(other, settings)
    tune.save_adapter(other, settings, tmp_path / "adapter", base="other")
    with pytest.raises(UserError, match=r"does not fit this model .*expected \(4, 64\), found \(4, 32\)"):
        tune.load_adapter(InternVL.from_pretrained(folder), tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: cannot be read"):
        tune.load_adapter(InternVL.from_pretrained(folder), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["internvl2_1b", "internvl2_2b", "internvl2_4b"])
def test_recorded_adapter_gives_the_recorded_loss(golden, name):
    """The reference's LoRA, on InternLM2's fused wqkv split like the weight it belongs to."""
    import numpy as np

    from ivl.model.weights import groups

    record = json.loads((golden / f"refs/{name}/lora.json").read_text())
    model = InternVL.from_pretrained(golden / f"checkpoints/{name}")
    tensors = load_file(golden / f"refs/{name}/lora.safetensors")
    deltas = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            base = key.replace(".lora_A.default", "").replace(".base_model.model.", ".")
            deltas[base] = record["scaling"] * b @ a
    with torch.no_grad():
        for group in groups(model.state_dict(), llm_family(model.config.llm_architecture).layout):
            if set(group.stored) <= set(deltas):
                tensors = group.read([deltas.pop(n) for n in group.stored], model.config)
                for key, delta in zip(group.module, tensors):
                    model.get_parameter(key).add_(delta)
    assert not deltas
    arrays = np.load(golden / f"refs/{name}/forward.npz")
    batch = {k: torch.from_numpy(arrays[k]) for k in ("input_ids", "labels", "attention_mask", "position_ids")}
    flags = torch.from_numpy(arrays["image_flags"]).flatten().bool()
    tiles = torch.from_numpy(arrays["pixel_values"])[flags]
    batch["attention_mask"] = batch["attention_mask"].bool()
    out = model(**batch, tiles=tiles)
    assert float(out.loss) == pytest.approx(record["loss"], abs=1e-4)
