"""LoRA in and out: the folder read by peft itself, merging, and what a recorded adapter gives."""

import json

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file

from ivl.architecture.families import llm_family
from ivl.finetune import tune
from ivl.finetune.adapter import peft_adapter as adapter
from ivl.model.internvl import InternVL
from ivl.options import Blocks, LoRA, Tune
from ivl.types import UserError
from tests.model.trained import inputs, stirred
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2")


SETTINGS = [
    Tune(language_model=LoRA(rank=4)),
    Tune(vision_model=LoRA(rank=2, alpha=3), mlp1="full", language_model=LoRA(rank=4, rslora=True)),
    Tune(vision_model=LoRA(rank=2, dora=True), mlp1=LoRA(rank=3, dora=True), language_model=LoRA(rank=4, dora=True)),
    Tune(language_model=LoRA(rank=4), head="full", embeddings="full"),
    Tune(language_model=LoRA(rank=4), head=LoRA(rank=3, alpha=5, rslora=True)),
    Tune(vision_model=Blocks(1), language_model=LoRA(rank=4, init="gaussian")),
    Tune(vision_model=LoRA(rank=2), language_model="full", head="frozen"),
    Tune(mlp1=LoRA(rank=3), language_model=LoRA(rank=4, alpha=5, init="pissa")),
    Tune(language_model=LoRA(rank=4, init="pissa", rslora=True)),
    Tune(language_model=LoRA(rank=4, init="pissa", dora=True)),
]
NAMES = [
    "language",
    "three parts",
    "dora",
    "ends",
    "head",
    "blocks",
    "all but the head",
    "pissa",
    "pissa+rs",
    "pissa+dora",
]


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_peft_reads_the_adapter_with_equal_logits(folder, tmp_path, settings):
    from peft import PeftModel

    model = InternVL.from_pretrained(folder)
    tune.apply(model, settings)
    batch = inputs(model)
    plain = InternVL.from_pretrained(folder)(**batch).logits
    expected = stirred(model)(**batch).logits
    assert (expected - plain).abs().max() > 0.1
    adapter.save_adapter(model, settings, tmp_path / "adapter", base=str(folder))
    read = PeftModel.from_pretrained(InternVL.from_pretrained(folder), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(read(**batch).logits, expected, atol=1e-5, rtol=0)
    own = InternVL.from_pretrained(folder)
    adapter.load_adapter(own, tmp_path / "adapter")
    torch.testing.assert_close(own.eval()(**batch).logits, expected, atol=1e-5, rtol=0)
    adapter.merge(own)
    torch.testing.assert_close(own(**batch).logits, expected, atol=1e-4, rtol=0)
    parts = {part for part in tune.PARTS if settings.mode(part) != "frozen"}
    assert set(adapter.adapted_parts(tmp_path / "adapter")) == parts
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
    other = InternVL.from_pretrained(write_checkpoint(tmp_path / "other", llm={"hidden_size": 32}))
    settings = Tune(language_model=LoRA(rank=4))
    tune.apply(other, settings)
    adapter.save_adapter(other, settings, tmp_path / "adapter", base="other")
    with pytest.raises(
        UserError, match=r"does not fit this model: .*expected \(64, 96\), found an update of \(32, 96\)"
    ):
        adapter.load_adapter(InternVL.from_pretrained(folder), tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"adapter_model.safetensors cannot be read"):
        adapter.load_adapter(InternVL.from_pretrained(folder), tmp_path / "adapter")


def test_a_flipped_bit_of_an_adapter_is_noticed(folder, tmp_path):
    """safetensors has no checksum of its own."""
    model = InternVL.from_pretrained(folder)
    chosen = Tune(language_model=LoRA(rank=4))
    tune.apply(model, chosen)
    adapter.save_adapter(model, chosen, tmp_path, str(folder))
    path = tmp_path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged"):
        adapter.load_adapter(InternVL.from_pretrained(folder), tmp_path)


def test_layers_in_the_host_s_memory_take_no_adapter(folder, tmp_path):
    chosen = Tune(language_model=LoRA(rank=4))
    model = InternVL.from_pretrained(folder)
    tune.apply(model, chosen)
    adapter.save_adapter(model, chosen, tmp_path, str(folder))
    model = InternVL.from_pretrained(folder)
    cpu_offload(model.language_model.model.layers[1], execution_device="cpu")
    with pytest.raises(UserError, match=r"stays in the host's memory, and no LoRA"):
        adapter.load_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["internvl2_1b", "internvl2_2b", "internvl2_4b", "internvl3_8b"])
def test_recorded_adapter_gives_the_recorded_loss(golden, name):
    """The reference's LoRA, on InternLM2's fused wqkv split like the weight it belongs to."""
    import numpy as np

    from ivl.checkpoint.weights import groups

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
        for group in groups(model.state_dict(), llm_family(model.config.llm_architecture).layout, model.config):
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
