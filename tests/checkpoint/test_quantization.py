"""8 and 4 bits: which layers, the stored scales, and a LoRA on top. Without bitsandbytes, the words of the error."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ivl.architecture.config import Config
from ivl.checkpoint import fp8_linear
from ivl.checkpoint import quantization as quant
from ivl.checkpoint.folder import Checkpoint
from ivl.checkpoint.fp8_linear import FP8Linear, multiply
from ivl.checkpoint.quantized_experts import QuantizedExperts
from ivl.commands.export import export
from ivl.finetune import tune
from ivl.finetune.adapter import peft_adapter as adapter
from ivl.model.internvl import InternVL
from ivl.model.moe.experts import GroupedLinear
from ivl.options import LoRA, Tune
from ivl.types import UserError
from tests.model.rows import padded, rows
from tests.tiny import FAMILIES, stored_state, write_checkpoint

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='bitsandbytes is missing: pip install -e ".[quant]"'
)


def write_int8(folder: Path, weight_format: int = 0) -> tuple[Path, Path]:
    """A checkpoint whose linear layers are all stored in 8 bits, and one with the numbers those bits stand for."""
    small = write_checkpoint(folder / "int8", "InternLM2ForCausalLM", "6b", dtype=torch.bfloat16)
    plain = write_checkpoint(folder / "plain", "InternLM2ForCausalLM", "6b", dtype=torch.bfloat16)
    eight, whole = {}, {}
    for name, tensor in stored_state(Config.load(small)).items():
        eight[name] = whole[name] = tensor.bfloat16()
        if tensor.ndim == 2 and "embedding" not in name and name.endswith(".weight"):
            scales = tensor.abs().amax(1)
            bits = (tensor * 127 / scales[:, None]).round().to(torch.int8)
            stem = name.removesuffix("weight")
            eight |= {name: bits, stem + "SCB": scales, stem + "weight_format": torch.tensor(weight_format).byte()}
            whole[name] = (bits * scales[:, None] / 127).bfloat16()
    save_file({n: t.contiguous() for n, t in eight.items()}, small / "model.safetensors", metadata={"format": "pt"})
    save_file({n: t.contiguous() for n, t in whole.items()}, plain / "model.safetensors", metadata={"format": "pt"})
    return small, plain


def logits(model: InternVL) -> torch.Tensor:
    batch = padded(rows(model))
    with torch.no_grad():
        return model(**batch, return_logits=True).logits[batch.attention_mask].float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@needs_bitsandbytes
def test_a_release_in_8_bits_answers_as_the_numbers_it_stands_for(tmp_path):
    small, plain = write_int8(tmp_path)
    with pytest.warns(UserWarning, match="computes in bfloat16, not in float32"):
        model = InternVL.from_pretrained(small)
    eight = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.int8}
    assert {"language_model.lm_head", "mlp1.1", "vision_model.encoder.layers.0.attn.qkv"} <= eight
    assert eight == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert model.dtype == torch.bfloat16
    whole = InternVL.from_pretrained(plain, dtype="bfloat16")
    for name in eight:
        weight = model.get_submodule(name).weight
        assert torch.equal((weight.CB * weight.SCB[:, None] / 127).bfloat16(), whole.get_submodule(name).weight), name
    # The inputs of each layer are rounded to 8 bits as well.
    assert distance(logits(model), logits(whole)) < 0.05
    assert model.generate(padded(rows(model)), max_new_tokens=3)


@needs_bitsandbytes
def test_no_notice_where_bfloat16_is_asked_for(tmp_path):
    small, _ = write_int8(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        InternVL.from_pretrained(small, dtype="bfloat16", quantize="int8")
    for quantize, kind in (("nf4", "4"), ("fp8", "FP8")):
        with pytest.raises(UserError, match=f"stored in 8 bits, it cannot be loaded in {kind}"):
            InternVL.from_pretrained(small, quantize=quantize)


@needs_bitsandbytes
def test_another_order_of_numbers_is_refused(tmp_path):
    small, _ = write_int8(tmp_path, weight_format=1)
    with pytest.raises(UserError, match="weight_format is not 0"):
        InternVL.from_pretrained(small, dtype="bfloat16")


BY_BITSANDBYTES = [pytest.param("int8", marks=needs_bitsandbytes), pytest.param("nf4", marks=needs_bitsandbytes)]
BOUNDS = {"int8": 0.05, "nf4": 0.4, "fp8": 0.1}


@pytest.mark.parametrize("quantize", ["fp8", *BY_BITSANDBYTES])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_only_the_blocks_of_the_language_model_are_quantised(tmp_path, architecture, quantize):
    # bitsandbytes' 4-bit kernel of the CPU takes widths that are multiples of 64.
    folder = write_checkpoint(tmp_path, architecture, llm={"intermediate_size": 128})
    whole = InternVL.from_pretrained(folder, dtype="bfloat16")
    model = InternVL.from_pretrained(folder, dtype="bfloat16", quantize=quantize)
    changed = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear}
    assert changed == {n for n in dict(whole.named_modules()) if n.startswith("language_model.model.layers")} & {
        n for n, m in whole.named_modules() if isinstance(m, nn.Linear)
    }
    assert all(not model.get_submodule(n).weight.is_floating_point() for n in changed)
    found = distance(logits(model), logits(whole))
    # A token whose experts are nearly as probable as others may go to those.
    assert 1e-4 < found < BOUNDS[quantize] * (2 if architecture == "Qwen3MoeForCausalLM" else 1)


@pytest.mark.parametrize("quantize", ["fp8", *BY_BITSANDBYTES])
def test_experts_are_quantised_and_a_lora_trains_on_top(tmp_path, quantize):
    folder = write_checkpoint(tmp_path / "base", "Qwen3MoeForCausalLM", llm={"intermediate_size": 128})
    model = InternVL.from_pretrained(folder, dtype="bfloat16", quantize=quantize)
    layers = {n for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}
    kinds = ("gate_up_proj", "down_proj")
    assert layers == {f"language_model.model.layers.{n}.mlp.experts.{kind}" for n in (0, 1) for kind in kinds}
    how = Tune(language_model=LoRA(rank=2, targets=["q_proj", *kinds]))
    tune.apply(model, how)
    batch = padded(rows(model))
    model(**batch).loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("experts.down_proj.lora_B" in n for n in grads) and any("q_proj.lora_B" in n for n in grads)
    adapter.save_adapter(model, how, tmp_path / "adapter", str(folder))
    again = InternVL.from_pretrained(folder)
    adapter.load_adapter(again, tmp_path / "adapter")


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.2)])
def test_quantised_experts_compute_and_pass_gradients_as_the_weights_they_stand_for(kind, bound):
    plain = GroupedLinear(5, 16, 24)
    torch.nn.init.normal_(plain.weight)
    layer = QuantizedExperts.of(plain, plain.weight.detach(), kind)
    ends = torch.tensor([3, 3, 7, 8, 8], dtype=torch.int32)
    assert (layer.dequantized(torch.float32) - plain.weight).abs().max() < bound
    plain.weight.data = layer.dequantized(torch.float32)
    found = []
    for module in (plain, layer):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        y = module(x, ends)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_fp8_computes_and_passes_gradients_as_the_weight_it_stands_for(dtype, bias):
    plain = nn.Linear(48, 32, bias=bias)
    layer = FP8Linear(plain.weight.detach(), bias)
    layer.bias = plain.bias
    assert distance(layer.dequantized(torch.float32), plain.weight.detach()) < 0.04
    assert layer.weight.nbytes == 32 * 48 and not layer.weight.requires_grad
    plain.weight.data = layer.dequantized(torch.float32)
    plain, layer = plain.to(dtype), layer.to(dtype)
    layer.scales = layer.scales.float()
    found = []
    for module in (plain, layer):
        x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(True)
        y = module(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    tolerance = {"atol": 0.05, "rtol": 0.02} if dtype == torch.bfloat16 else {}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_a_product_of_fp8_numbers(monkeypatch):
    """torch's own product, which a CPU has as well: near that of the weight, as far as inputs are rounded too."""
    plain = nn.Linear(64, 32, bias=False)
    layer, x = FP8Linear(plain.weight.detach(), False), torch.randn(7, 64).bfloat16()
    x[3] *= 1000  # a scale for each row
    x[5] = 0
    try:
        found = multiply(x, layer)
    except RuntimeError as error:  # torch 2.11
        pytest.skip(f"torch's product of FP8 numbers on a CPU has no scales by row ({str(error)[:60]})")
    expected = x.float() @ layer.dequantized(torch.float32).t()
    assert found.dtype == torch.bfloat16 and not found[5].any()
    for row in (0, 1, 2, 3, 4, 6):
        assert distance(found[row].float(), expected[row]) < 0.06
    monkeypatch.setattr(fp8_linear, "multiplies_fp8", lambda x, layer: True)
    assert torch.equal(layer(x[None])[0], found)


def test_a_product_of_fp8_numbers_is_asked_for_as_a_gpu_takes_it(monkeypatch):
    """On fake tensors of a GPU, which need none: torch checks dtypes, strides and scales."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        layer = FP8Linear(torch.empty(32, 64, device="cuda", dtype=torch.bfloat16), False)
        x = torch.empty(2, 7, 64, device="cuda", dtype=torch.bfloat16)
        y = layer(x)
        assert fp8_linear.multiplies_fp8(x, layer) and not fp8_linear.multiplies_fp8(x.float(), layer)
        assert (y.shape, y.dtype) == ((2, 7, 32), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not fp8_linear.multiplies_fp8(x, layer)


@pytest.mark.parametrize("quantize", ["fp8", *BY_BITSANDBYTES])
def test_a_lora_trains_on_top_and_is_merged_into_the_whole_weights(tmp_path, quantize):
    folder = write_checkpoint(tmp_path / "base", llm={"intermediate_size": 128})
    how = Tune(language_model=LoRA(rank=4))
    model = InternVL.from_pretrained(folder, dtype="bfloat16", quantize=quantize)
    with pytest.raises(UserError, match=r"model\.tune\.language_model: full, but its weights are quantised"):
        tune.apply(InternVL.from_pretrained(folder, dtype="bfloat16", quantize=quantize), Tune(language_model="full"))
    tune.apply(model, how)
    batch = padded(rows(model))
    batch.labels = torch.where(batch.attention_mask, batch.input_ids, -100)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="cannot be merged into"):
        adapter.merge(model)
    adapter.save_adapter(model, how, tmp_path / "adapter", str(folder))
    merged = InternVL.from_pretrained(export(str(tmp_path / "out"), adapter=str(tmp_path / "adapter")))
    again = InternVL.from_pretrained(folder)
    adapter.load_adapter(again, tmp_path / "adapter")
    assert distance(logits(merged), logits(again.eval())) < 1e-5


def test_without_bitsandbytes_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    small, _ = write_int8(tmp_path)
    for folder, quantize in ((small, None), (small.with_name("plain"), "nf4")):
        with pytest.raises(UserError, match=r'bitsandbytes, which is not installed; pip install -e "\.\[quant\]"'):
            InternVL.from_pretrained(folder, dtype="bfloat16", quantize=quantize)


def test_an_unknown_kind(tmp_path):
    folder = write_checkpoint(tmp_path)
    with pytest.raises(UserError, match="quantize: expected one of int8, nf4, fp8, found 'int4'"):
        InternVL.from_pretrained(folder, quantize="int4")


def test_what_is_stored_in_8_bits_is_not_exported(tmp_path):
    small, _ = write_int8(tmp_path / "base")
    assert quant.is_int8(Checkpoint.open(small).files)
    with pytest.raises(UserError, match="a quantised checkpoint cannot be merged or converted"):
        export(str(tmp_path / "out"), base=str(small))
    assert json.loads((small / "config.json").read_text())["template"] == "internlm2-chat"
    assert not (tmp_path / "out").exists()
