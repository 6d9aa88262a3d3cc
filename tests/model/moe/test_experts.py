"""Mixture of experts: grouped products, routing and the auxiliary loss as recorded, and as transformers has them."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ivl.architecture.config import Config
from ivl.model.internvl import InternVL
from ivl.model.moe import grouped
from ivl.model.moe.experts import ExpertMLP, ExpertsConfig, GroupedLinear, Order, balancing_loss, sparse_layers
from ivl.model.moe.grouped import grouped_linear
from ivl.types import UserError
from tests.model.conftest import Recorded
from tests.model.rows import packed, padded, rows
from tests.model.test_llm import tiny
from tests.tiny import FAMILIES, config, transformers_names

MOE = "Qwen3MoeForCausalLM"

# -- grouped products ----------------------------------------------------------------------------------------------

ENDS = torch.tensor([3, 3, 7, 8, 8], dtype=torch.int32)
"""Five groups, the second and the last without rows"""


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    groups = torch.tensor([0, 0, 0, 2, 2, 2, 2, 3])
    return torch.einsum("si,soi->so", x, weight[groups])


def test_a_grouped_product_and_its_gradients_are_those_of_each_row_s_own_weight():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(5, 24, 16, requires_grad=True)
    y = grouped_linear(x, weight, ENDS)
    torch.testing.assert_close(y, plain(x, weight))
    given = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight), given)
    expected = torch.autograd.grad(plain(x, weight), (x, weight), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not found[1][[1, 4]].any()  # no row: no gradient, and that is zero


def test_what_no_gradient_needs_is_not_kept():
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    for trained in ("input", "weight"):
        x = torch.randn(8, 16, requires_grad=trained == "input")
        weight = torch.randn(5, 24, 16, requires_grad=trained == "weight")
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            grouped_linear(x, weight, ENDS).sum().backward()
        assert kept == [(5, 24, 16) if trained == "input" else (8, 16), (5,)]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_the_kernel_of_a_gpu_is_asked_for_the_same(monkeypatch):
    """torch's kernel computes on a CPU as well: here in the place of the loop."""
    x, weight = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(5, 24, 16, dtype=torch.bfloat16)
    x.requires_grad_(True), weight.requires_grad_(True)
    results = []
    for has_kernel in (False, True):
        monkeypatch.setattr(grouped, "has_kernel", lambda *_, answer=has_kernel: answer)
        y = grouped_linear(x, weight, ENDS)
        results.append((y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)


def test_the_kernel_is_for_rows_of_16_bytes_in_bfloat16_on_a_gpu():
    x = torch.empty(8, 16, dtype=torch.bfloat16)
    assert not grouped.has_kernel(x, 16, 24)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        assert grouped.has_kernel(x.cuda(), 16, 24)
        assert not grouped.has_kernel(x.cuda(), 16, 20) and not grouped.has_kernel(x.cuda().float(), 16, 24)


def test_rows_of_an_expert_stay_in_their_order():
    order = Order.of(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert order.order_S.tolist() == [1, 2, 3, 5, 0, 4]
    assert order.ends_E.tolist() == [2, 4, 6, 6] and order.ends_E.dtype == torch.int32
    assert order.order_S[order.inverse_S].tolist() == list(range(6))


# -- a mixture -----------------------------------------------------------------------------------------------------


def mixture(**changes) -> ExpertMLP:
    settings = {"count": 6, "per_token": 2, "intermediate_size": 24, "normalised": True, "layers": (0,)} | changes
    mlp = ExpertMLP(32, ExpertsConfig(**settings), torch.nn.SiLU)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mlp


@pytest.mark.parametrize("normalised", [True, False])
def test_a_token_is_the_weighted_sum_of_its_experts(normalised):
    mlp, x = mixture(normalised=normalised), torch.randn(2, 5, 32)
    probabilities = F.linear(x, mlp.gate.weight).softmax(-1)
    expected = torch.zeros_like(x)
    for row, token in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        weights, experts = probabilities[row, token].topk(2)
        weights = weights / weights.sum() if normalised else weights
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            gate, up = (mlp.experts.gate_up_proj.weight[expert] @ x[row, token]).chunk(2)
            expected[row, token] += weight * (mlp.experts.down_proj.weight[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)


def test_no_token_at_all():
    """The last layer of a batch in which nothing is supervised."""
    mlp, x = mixture(), torch.randn(1, 0, 32, requires_grad=True)
    mlp(x).sum().backward()
    assert x.grad.shape == (1, 0, 32) and not mlp.experts.down_proj.weight.grad.any()


def test_layers_without_experts():
    assert sparse_layers({"num_hidden_layers": 6}) == (0, 1, 2, 3, 4, 5)
    assert sparse_layers({"num_hidden_layers": 6, "decoder_sparse_step": 2}) == (1, 3, 5)
    assert sparse_layers({"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}) == (1, 5)
    layers = tiny(MOE, num_hidden_layers=3, mlp_only_layers=[1]).language_model.model.layers
    assert [isinstance(layer.mlp, ExpertMLP) for layer in layers] == [True, False, True]
    assert layers[1].mlp.gate_proj.out_features == 96


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is above num_experts 6"),
        ({"num_experts": 0}, "num_experts: expected a whole number from 1"),
        ({"mlp_only_layers": 1}, "mlp_only_layers: expected a list of layers"),
        ({"num_experts": None}, "num_experts"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes, words):
    _, template, extra = FAMILIES[MOE]
    raw = config(MOE, "300m", template, {"<IMG_CONTEXT>": 199}, extra | changes, {})
    with pytest.raises(UserError, match=words):
        Config.from_dict(raw)
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        raw = config(MOE, "300m", template, {"<IMG_CONTEXT>": 199}, {k: v for k, v in extra.items() if k != key}, {})
        with pytest.raises(UserError, match=f"no '{key}'"):
            Config.from_dict(raw)


def test_fake_tensors_and_the_counter_of_operations_pass_through():
    """A forward and a backward of the experts cost 3 times 2 · rows · (3 · D · F) operations."""
    for mode in (FlopCounterMode(display=False), FakeTensorMode()):
        with mode:
            mlp, x = mixture(), torch.randn(1, 10, 32, requires_grad=True)
            if isinstance(mode, FlopCounterMode):
                mode.reset_counts() if hasattr(mode, "reset_counts") else None
            mlp(x).sum().backward()
            assert mlp.experts.gate_up_proj.weight.grad.shape == (6, 48, 32)
        if isinstance(mode, FlopCounterMode):
            router = 3 * 2 * 10 * 32 * 6
            assert mode.get_total_flops() == 3 * 2 * 20 * 3 * 32 * 24 + router


# -- as recorded ---------------------------------------------------------------------------------------------------


@pytest.fixture
def moe(golden) -> Recorded:
    return Recorded("internvl3_5_30b_a3b", golden)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_routing_and_auxiliary_loss_equal_the_reference(moe, attention):
    model, batch, arrays = moe.model(attention=attention), moe.batch(), moe.arrays("forward.npz")
    facts, shown = moe.json("forward.json"), batch["attention_mask"]
    routed: list[tuple[torch.Tensor, ...]] = []

    def record(gate, inputs, outputs):
        routed.append((F.linear(inputs[0], gate.weight), *outputs))

    layers = [layer for layer in model.language_model.model.layers if isinstance(layer.mlp, ExpertMLP)]
    assert [n for n, layer in enumerate(model.language_model.model.layers) if layer in layers] == facts["sparse_layers"]
    for layer in layers:
        layer.mlp.gate.register_forward_hook(record)
    load = model(**batch, return_logits=True, return_router_load=True).router_load
    for n, (logits, experts, weights, _) in enumerate(routed):
        places = shown if len(logits) == int(shown.sum()) else slice(None)
        seen = slice(None) if places is shown else shown.flatten()
        torch.testing.assert_close(logits[seen], arrays["router_logits"][n][shown], atol=1e-4, rtol=0)
        assert torch.equal(experts[seen], arrays["router_topk_ids"][n][shown].long())
        torch.testing.assert_close(weights[seen], arrays["router_topk_weights"][n][shown], atol=1e-4, rtol=0)
    assert load[:, 0].tolist() == facts["tokens_per_expert"]
    assert float(balancing_loss(load, 2)) == pytest.approx(facts["router_aux_loss"], abs=1e-4)
    assert "router_aux_loss_without_mask" in facts
    read = model(**batch, return_router_load=True).router_load  # the last layer's experts see some tokens alone
    torch.testing.assert_close(read, load)


# -- as transformers has it ------------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"norm_topk_prob": False, "num_hidden_layers": 4, "mlp_only_layers": [1]},
    {"decoder_sparse_step": 2, "head_dim": 8, "num_experts_per_tok": 3},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_and_auxiliary_loss_equal_those_of_transformers(settings):
    from transformers import Qwen3MoeForCausalLM

    from ivl.checkpoint.hf_layout import llm_config

    model = tiny(MOE, **settings)
    theirs = Qwen3MoeForCausalLM._from_config(llm_config(model.config), attn_implementation="eager").eval()
    theirs.load_state_dict(transformers_names(model.language_model.state_dict()))
    ids = torch.randint(0, 190, (2, 12))
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    expected = theirs(ids, attention_mask=mask.long(), output_router_logits=True)
    positions = torch.arange(12).expand(2, -1) * mask
    out = model(ids, attention_mask=mask, position_ids=positions, return_router_load=True)
    torch.testing.assert_close(out.logits[mask], expected.logits[mask], atol=1e-5, rtol=0)
    aux = balancing_loss(out.router_load, model.language_model.config.experts.per_token)
    torch.testing.assert_close(aux, expected.aux_loss, atol=1e-6, rtol=1e-6)
    name = f"layers.{model.language_model.config.experts.layers[0]}.mlp.gate.weight"
    aux.backward()
    expected.aux_loss.backward()
    ours = model.language_model.model.get_parameter(name).grad
    torch.testing.assert_close(ours, theirs.model.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


# -- one batch, many ways ----------------------------------------------------------------------------------------------


def gradients(model: InternVL, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**batch, return_router_load=True)
    (out.loss + 0.1 * balancing_loss(out.router_load, 2)).backward()
    return out.router_load.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_auxiliary_loss_of_a_pack_is_that_of_a_padded_batch(attention):
    model = tiny(MOE, attention)
    made = rows(model)
    (load, expected), (other, found) = (gradients(model, b) for b in (padded(made, extra=3), packed(made, extra=5)))
    torch.testing.assert_close(other, load)
    assert load[:, 0].sum(1).tolist() == [2 * 38] * 2  # two experts of each of the 38 tokens, no padding
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("trained", ["experts", "self_attn"])
def test_recomputed_layers_and_saved_memory_change_no_bit(trained):
    efficient, plainly = tiny(MOE), tiny(MOE)
    plainly = InternVL.from_config(plainly.config, image_token_id=199, efficient=False)
    plainly.load_state_dict(efficient.state_dict())
    batch, results = padded(rows(efficient)), []
    for model in (plainly, efficient, efficient):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("language_model") and f".{trained}" in name)
        model.language_model.model.last_layer_selects = False  # products of other shapes round otherwise
        model.set_checkpointing(False, len(results) == 2)
        results.append(gradients(model.train(), batch))
    for load, found in results[1:]:
        assert torch.equal(load, results[0][0])
        assert found.keys() == results[0][1].keys()
        assert all(torch.equal(gradient, results[0][1][name]) for name, gradient in found.items())


def test_experts_without_tokens_have_a_gradient_of_zero():
    """All processes of a run have gradients of the same tensors, whichever experts their tokens go to."""
    model = tiny(MOE)
    for layer in model.language_model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # all alike: the same two win everywhere
    load, found = gradients(model.train(), padded(rows(model)))
    for layer, used in enumerate(load[:, 0] > 0):
        assert int(used.sum()) == 2
        for name in ("gate_up_proj", "down_proj"):
            gradient = found[f"language_model.model.layers.{layer}.mlp.experts.{name}.weight"]
            assert gradient[used].abs().sum() > 0 and not gradient[~used].any()


def test_a_layer_of_experts_is_one_tensor_of_each_kind():
    names = [n for n, m in tiny(MOE).language_model.named_modules() if isinstance(m, GroupedLinear)]
    assert names == [f"model.layers.{n}.mlp.experts.{kind}_proj" for n in (0, 1) for kind in ("gate_up", "down")]
