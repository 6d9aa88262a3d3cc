"""The LoRA layer of one operation is peft's: the same numbers and gradients, with less kept for backward."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from torch import nn

from ivl.model.efficient import lora_linear as lora
from ivl.model.efficient.lora_linear import LoRALinear, LoRAProduct, dropout_mask


def pair(bias: bool = True, dropout: float = 0.0, **more) -> tuple[nn.Module, nn.Module]:
    """The same layer by peft, and as ours."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40, bias=bias))
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["0"], init_lora_weights=False)
        for key, value in more.items():
            setattr(config, key, value)
        inject_adapter_in_model(config, model)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        made.append(model)
    lora.install(made[1])
    made = [model[0] for model in made]
    assert type(made[0]) is peft_lora.Linear and type(made[1]) is LoRALinear
    return made[0], made[1]


def run(layer: nn.Module, x: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of both matrices."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y.float() * weight).sum().backward()
    return [y, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
def test_equals_peft(bias, shape):
    theirs, ours = pair(bias)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    for expected, found in zip(run(theirs, x), run(ours, x)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_equals_peft_in_autocast():
    theirs, ours = pair()
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    for expected, found in zip(run(theirs, x, autocast=True), run(ours, x, autocast=True)):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=6e-2)


def test_dropout_drops_the_same_in_forward_and_backward(monkeypatch):
    theirs, ours = pair(dropout=0.5)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(2)) < 0.5

    class Given(nn.Module):
        def forward(self, x):
            return x * mask / 0.5

    theirs.lora_dropout["default"] = Given()
    monkeypatch.setattr(lora, "dropout_mask", lambda shape, dropout, device: (mask, 1 - dropout))
    for expected, found in zip(run(theirs, x), run(ours, x)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_function():
    draw = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((5, 6), (7, 6), (7,), (2, 6), (7, 2))
    )
    given = (x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), 0.7, 0.0)
    assert torch.autograd.gradcheck(LoRAProduct.apply, given)


def test_dropout_keeps_its_share_and_is_off_in_use():
    mask, share = dropout_mask(torch.Size((1000, 1001)), 0.05, torch.device("cpu"))
    assert share == pytest.approx(0.95, abs=1e-5)
    assert mask.float().mean() == pytest.approx(0.95, abs=1e-3)
    assert mask.float().mean(0).std() == pytest.approx((0.95 * 0.05 / 1000) ** 0.5, rel=0.1)  # each value on its own
    _, ours = pair(dropout=0.5)
    x = torch.randn(6, 24)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


def test_less_is_kept_for_backward():
    sizes = []
    for layer in pair(dropout=0.1):
        found: dict[int, int] = {}

        def pack(t, found=found):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(512, 24, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        own = {x.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in layer.parameters())}
        sizes.append(sum(size for place, size in found.items() if place not in own))
        del y
    assert sizes[1] < sizes[0] / 3


def test_what_is_not_plain_goes_peft_s_way(monkeypatch):
    _, ours = pair()
    x = torch.randn(3, 24)
    called = []
    monkeypatch.setattr(LoRAProduct, "apply", lambda *_: called.append(1))
    ours.base_layer.weight.requires_grad_(True)
    assert torch.isfinite(ours(x)).all()
    ours.base_layer.weight.requires_grad_(False)
    ours.enable_adapters(False)
    torch.testing.assert_close(ours(x), ours.base_layer(x))
    ours.enable_adapters(True)
    ours.merge()
    assert torch.isfinite(ours(x)).all()
    _, dora = pair(use_dora=True)
    assert torch.isfinite(dora(x)).all()
    assert not called
