"""The model computes the same with what makes it efficient as without, bit for bit where a file claims so."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ivl.architecture.families import LLMS
from ivl.estimate.training_step import MemTracker
from ivl.finetune.tune import apply
from ivl.model import attention
from ivl.model.efficient import layer_scale
from ivl.model.efficient import recompute as module
from ivl.model.efficient.recompute import InputLayerNorm, recompute, recompute_region
from ivl.model.internvl import InternVL
from ivl.model.layers import adopted
from ivl.options import LoRA, Tune
from tests.model.rows import packed, padded, rows
from tests.model.test_llm import tiny

TUNES = {
    "full": Tune("full", "full", "full"),
    "lora": Tune(LoRA(2), "full", LoRA(4, dropout=0.1)),
    "frozen language model": Tune("full", "frozen", "frozen"),
}


def model_of(architecture: str, tune: Tune) -> InternVL:
    torch.manual_seed(0)
    model = tiny(architecture)
    apply(model, tune)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model: InternVL, batch, autocast: bool = False) -> tuple[list[Tensor], int]:
    """Loss and gradients, and the bytes that forward left for backward."""
    torch.manual_seed(1)
    model.zero_grad()
    tally = MemTracker(model)
    with tally, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    kept = tally.live
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], kept


def plain(architecture: str, tune: Tune) -> InternVL:
    """The same model without any of it."""
    like = model_of(architecture, tune)
    model = InternVL.from_config(like.config, attention="sdpa", image_token_id=199, efficient=False)
    apply(model, tune)
    model.load_state_dict(like.state_dict())
    return model


WITHOUT_DROPOUT = TUNES | {"lora": Tune(LoRA(2), "full", LoRA(4))}


@pytest.mark.parametrize("how", WITHOUT_DROPOUT)
@pytest.mark.parametrize("architecture", LLMS)
def test_the_plain_model_computes_the_same(architecture, how):
    tune = WITHOUT_DROPOUT[how]
    efficient, model = model_of(architecture, tune), plain(architecture, tune)
    assert list(model.state_dict()) == list(efficient.state_dict())
    batch = packed(rows(model))
    (found, less), (expected, more) = step(efficient, batch), step(model, batch)
    assert len(found) == len(expected) > 10 and less < 0.9 * more
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", LLMS)
def test_recomputed_alone_the_plain_model_is_the_same_bit_for_bit(architecture):
    model = plain(architecture, TUNES["full"])
    batch = packed(rows(model))
    expected, more = step(model, batch)
    module.install(model)
    found, less = step(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and less < 0.95 * more


def test_in_autocast_the_loss_is_the_same_bit_for_bit():
    """Gradients are not: a norm's result is cast once for the layers behind it, whose gradients add up in that type."""
    model = plain("Qwen2ForCausalLM", TUNES["full"])
    batch = packed(rows(model))
    expected, _ = step(model, batch, autocast=True)
    module.install(model)
    found, _ = step(model, batch, autocast=True)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-3)


def keep_everything(model: InternVL) -> None:
    model.vision_model.encoder.around_layer = model.language_model.model.around_layer = nullcontext


@pytest.mark.parametrize("form", [packed, padded])
@pytest.mark.parametrize("how", TUNES)
@pytest.mark.parametrize("architecture", LLMS)
def test_bit_for_bit_the_same(architecture, how, form):
    model = model_of(architecture, TUNES[how])
    batch = form(rows(model))
    found, less = step(model, batch)
    keep_everything(model)
    expected, more = step(model, batch)
    assert len(found) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert less < 0.9 * more


def test_rows_of_a_pack_are_joined_once_more_in_backward():
    """Each row's result is kept by its own attention; the sequence that they make is not kept beside them."""
    model = plain("Qwen2ForCausalLM", TUNES["full"])
    batch = packed(rows(model))
    assert len(batch["row_ids"].unique()) > 2
    module.install(model)
    joined, less = step(model, batch)
    for layer in model.language_model.model.layers:
        layer.self_attn.join = attention.joined
    kept, more = step(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(joined, kept, strict=True))
    config = model.language_model.config
    one = batch["attention_mask"].sum() * config.num_attention_heads * config.head_dim * 4
    assert more - less == one * config.num_hidden_layers


@pytest.mark.parametrize("how", TUNES)
def test_bit_for_bit_the_same_in_autocast(how):
    model = model_of("Qwen2ForCausalLM", TUNES[how])
    batch = packed(rows(model))
    found, less = step(model, batch, autocast=True)
    keep_everything(model)
    expected, more = step(model, batch, autocast=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert less < 0.95 * more


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Phi3ForCausalLM"])
def test_a_block_that_is_computed_again_whole_keeps_nothing_more(architecture):
    model = model_of(architecture, TUNES["full"])
    batch = packed(rows(model))
    model.set_checkpointing(vision=True, language=True)
    found, less = step(model, batch)
    keep_everything(model)
    expected, more = step(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert less == more


def test_backward_twice():
    model = model_of("Qwen2ForCausalLM", TUNES["full"])
    loss = model(**packed(rows(model))).loss
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, (p for p in model.parameters() if p.grad is not None)))


def test_what_a_block_was_given_goes_when_it_has_been_read():
    """Not at the end of the block's backward."""
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    alive = []
    with recompute_region():
        inner = x * x  # keeps something as well, until later
        inner.register_hook(lambda _: alive.append(held()))
        middle = inner.exp()
        held = weakref.ref(middle.untyped_storage())
        total = (recompute(torch.sin, middle) @ weight).sum()
        del middle
    total.backward()
    assert alive == [None]


def test_computed_once_for_all_that_read_it():
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    x, weights = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    with recompute_region():
        made = recompute(function, x)
        total = sum((made @ weight).sum() for weight in weights)
    assert len(calls) == 1
    total.backward()
    assert len(calls) == 2
    (expected,) = torch.autograd.grad((x.sin() @ weights.detach()).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_a_view_of_what_was_made_is_the_same_view():
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    with recompute_region():
        ((recompute(torch.sin, x)[1:4].t() @ weight[:, :3].t()) ** 2).sum().backward()
    found = x.grad, weight.grad
    x.grad = weight.grad = None
    ((x.sin()[1:4].t() @ weight[:, :3].t()) ** 2).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(found, (x.grad, weight.grad)))


def test_what_takes_the_place_of_something_made_in_memory_is_not_taken_for_it():
    x, weight = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    with recompute_region():
        made = recompute(torch.sin, x)  # not exp, whose own backward keeps it
        place = made.untyped_storage()._cdata
        del made
        kept = []  # so that no place is tried twice
        while not kept or kept[-1].untyped_storage()._cdata != place:
            kept.append(torch.randn(5))
            assert len(kept) < 1000, "the place in memory was not used again: this test shows nothing"
        (kept[-1] * weight).sum().backward()
    assert torch.equal(weight.grad, kept[-1])


def test_kept_as_it_is_outside_of_a_region():
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    made = recompute(torch.sin, x)
    (made @ weight).sum().backward()
    assert module._REGION.get() is None
    with pytest.raises(ZeroDivisionError), recompute_region():
        raise ZeroDivisionError
    assert module._REGION.get() is None


def test_weights_that_are_elsewhere_in_backward_are_not_asked_for_again(monkeypatch):
    norm, x = adopted(torch.nn.LayerNorm(4), InputLayerNorm), torch.randn(5, 4, requires_grad=True)
    norm.weight.ds_id = 1  # as DeepSpeed marks them
    calls = []
    monkeypatch.setattr(F, "layer_norm", lambda *a, real=F.layer_norm: calls.append(1) or real(*a))
    linear = torch.nn.Linear(4, 4)
    with recompute_region():
        linear(norm(x)).sum().backward()
    assert len(calls) == 1


def scaled_pair(autocast: bool, dtype=torch.float32) -> list[list[Tensor]]:
    """Output and gradients of a linear layer and a scale, by torch and as one operation."""
    made = []
    for way in (lambda linear, x, s: linear(x) * s, layer_scale.scaled):
        torch.manual_seed(0)
        linear, scale = torch.nn.Linear(6, 8, dtype=dtype), torch.randn(8, dtype=dtype, requires_grad=True)
        x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = way(linear, x, scale)
        F.mse_loss(y, torch.ones_like(y)).backward()
        made.append([y, x.grad, linear.weight.grad, linear.bias.grad, scale.grad])
    return made


def test_a_scaled_layer_equals_the_two():
    expected, found = scaled_pair(False, torch.float64)
    assert torch.equal(expected[0], found[0])
    for one, other in zip(expected, found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    expected, found = scaled_pair(True)
    assert torch.equal(expected[0], found[0])
    for one, other in zip(expected, found):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


def test_a_scaled_layer_keeps_no_output():
    sizes = []
    for way in (lambda linear, x, s: linear(x) * s, layer_scale.scaled):
        linear, scale = torch.nn.Linear(6, 600), torch.randn(600, requires_grad=True)
        x = torch.randn(50, 6, requires_grad=True)
        with MemTracker(linear) as tally:
            total = way(linear, x, scale).sum()
            sizes.append(tally.live)
        del total
    assert sizes[0] >= 50 * 600 * 4 > 100 * sizes[1]


def test_a_scaled_layer_that_trains_in_part_goes_torch_s_way(monkeypatch):
    monkeypatch.setattr(layer_scale.ScaledProduct, "apply", lambda *_: pytest.fail("not plain"))
    linear, scale = torch.nn.Linear(6, 8), torch.ones(8, requires_grad=True)
    linear.weight.requires_grad_(False)
    layer_scale.scaled(linear, torch.randn(5, 6), scale)
    linear.weight.requires_grad_(True)
    with torch.no_grad():
        layer_scale.scaled(linear, torch.randn(5, 6), scale)
    layer_scale.scaled(torch.nn.Sequential(linear), torch.randn(5, 6), scale)
    linear.weight.ds_id = 1
    layer_scale.scaled(linear, torch.randn(5, 6), scale)
