"""Mixture of experts: an MLP of many small MLPs, of which each token takes a few (Qwen3-MoE).

    x (T, D) → `gate`: a probability for each expert; the A largest, and their weights, in float32
             → a row for each token and each of its experts, sorted by expert (S = T x A rows)
             → `experts.gate_up_proj` → act(gate) · up · weight → `experts.down_proj`
             → the rows of a token added up (T, D)

The weights of all experts of a layer are one tensor, and one operation computes with it (`ivl.model.moe.grouped`). So
every process of a sharded run gathers the same tensors in the same order, whichever experts its own tokens go to; with
a module for each expert, which a process calls or does not, the processes wait for one another for ever.

Sources: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Switch Transformer (https://arxiv.org/abs/2101.03961)
for the auxiliary loss, Qwen3 (https://arxiv.org/abs/2505.09388).

Shapes: B rows of a batch, T tokens, M those that are read, D width, E experts, A experts of a token, S = T x A,
F width inside an expert, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ivl.model.layers import autocast_dtype
from ivl.model.moe.grouped import grouped_linear


@dataclass(frozen=True)
class ExpertsConfig:
    """Shapes of a mixture of experts."""

    count: int
    """E"""
    per_token: int
    """A"""
    intermediate_size: int
    """F"""
    normalised: bool
    """True: a token's weights add up to 1; False: they are the probabilities themselves"""
    layers: tuple[int, ...]
    """Numbers of the layers that have experts; the others have one MLP"""

    @classmethod
    def from_llm(cls, raw: Mapping[str, Any]) -> ExpertsConfig:
        """Read the fields of an `llm_config` that `ivl.architecture.config_fields` has checked."""
        return cls(
            count=raw["num_experts"],
            per_token=raw["num_experts_per_tok"],
            intermediate_size=raw["moe_intermediate_size"],
            normalised=bool(raw.get("norm_topk_prob")),
            layers=sparse_layers(raw),
        )


def idle_parameters(raw: Mapping[str, Any]) -> int:
    """Number of weights of experts that a token is not sent to, by an `llm_config` with experts."""
    experts = ExpertsConfig.from_llm(raw)
    of_one = 3 * raw["hidden_size"] * experts.intermediate_size
    return len(experts.layers) * (experts.count - experts.per_token) * of_one


def sparse_layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the layers with experts, by an `llm_config`."""
    dense, step = raw.get("mlp_only_layers") or (), raw.get("decoder_sparse_step") or 1
    return tuple(n for n in range(raw["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0)


class Router(nn.Module):
    """Choice of experts: `per_token` of the largest probabilities."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.count, width))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Experts of each token, (T, A), the largest first; their weights, (T, A); all probabilities, (T, E)."""
        probabilities_TE = F.linear(x_TD, self.weight).softmax(-1, dtype=torch.float32)
        experts_TA = probabilities_TE.topk(self.config.per_token, dim=-1).indices
        return experts_TA, self.weights(probabilities_TE, experts_TA), probabilities_TE

    def weights(self, probabilities_TE: Tensor, experts_TA: Tensor) -> Tensor:
        """Weights of a token's experts, (T, A)."""
        weights_TA = probabilities_TE.gather(-1, experts_TA)
        return weights_TA / weights_TA.sum(-1, keepdim=True) if self.config.normalised else weights_TA


class GroupedLinear(nn.Module):
    """A linear layer for each expert: (S, I) rows sorted by expert → (S, O)."""

    bias = None

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = count, inputs, outputs
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))

    def forward(self, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        """`ends_E`: where each expert's rows end."""
        return grouped_linear(x_SI.to(autocast_dtype(x_SI.device.type) or x_SI.dtype), self.weight, ends_E)


@dataclass(frozen=True)
class Order:
    """Rows sorted by expert: row n belongs to token `order_S[n] // A`. There may be none."""

    order_S: Tensor
    inverse_S: Tensor
    """Row of each pair of a token and one of its experts"""
    ends_E: Tensor
    """int32, where each expert's rows end"""

    @classmethod
    def of(cls, experts_TA: Tensor, count: int) -> Order:
        """Sort; tokens of one expert stay in their order."""
        sorted_S, order_S = experts_TA.flatten().sort(stable=True)
        numbers_E = torch.arange(count, device=sorted_S.device)
        ends_E = torch.searchsorted(sorted_S, numbers_E, right=True, out_int32=True)
        return cls(order_S, order_S.argsort(), ends_E)


def _spread(x_TD: Tensor, order_S: Tensor, per_token: int) -> Tensor:
    return x_TD.index_select(0, order_S // per_token)


def _gather(x_SD: Tensor, inverse_S: Tensor, per_token: int) -> Tensor:
    return x_SD.index_select(0, inverse_S).unflatten(0, (len(inverse_S) // per_token, per_token)).sum(1)


class Spread(torch.autograd.Function):
    """A copy of each token for each of its experts. Its gradient is `Gather`: no sum in an order left to chance."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_S: Tensor, inverse_S: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(inverse_S)
        ctx.per_token = per_token
        return _spread(x_TD, order_S, per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_SD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_S,) = ctx.saved_tensors
        return _gather(d_SD, inverse_S, ctx.per_token), None, None, None


class Gather(torch.autograd.Function):
    """The sum of each token's rows. Its gradient is `Spread`."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, order_S: Tensor, inverse_S: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(order_S)
        ctx.per_token = per_token
        return _gather(x_SD, inverse_S, per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (order_S,) = ctx.saved_tensors
        return _spread(d_TD, order_S, ctx.per_token), None, None, None


class Rows(nn.Module):
    """Rows of the experts, copied from the tokens."""

    def __init__(self, per_token: int) -> None:
        super().__init__()
        self.per_token = per_token

    def forward(self, x_TD: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
        return Spread.apply(x_TD, order_S, inverse_S, self.per_token)


class WeightedGate(nn.Module):
    """The activation of an expert: act(gate) · up · weight.

    The weight comes in front of `down_proj`, a linear layer: behind it, backward would need that layer's wide result.
    """

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, gate_SF: Tensor, up_SF: Tensor, weights_S1: Tensor) -> Tensor:
        return (self.act(gate_SF) * up_SF * weights_S1).to(gate_SF.dtype)


class Experts(nn.Module):
    """The experts of a layer."""

    def __init__(self, width: int, config: ExpertsConfig, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.count = config.count
        self.gate_up_proj = GroupedLinear(config.count, width, 2 * config.intermediate_size)
        self.down_proj = GroupedLinear(config.count, config.intermediate_size, width)
        self.rows, self.act = Rows(config.per_token), WeightedGate(act())

    def forward(self, x_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> Tensor:
        order = Order.of(experts_TA, self.count)
        rows_SD = self.rows(x_TD, order.order_S, order.inverse_S)
        gate_SF, up_SF = self.gate_up_proj(rows_SD, order.ends_E).chunk(2, -1)
        weights_S1 = weights_TA.flatten().index_select(0, order.order_S)[:, None]
        rows_SD = self.down_proj(self.act(gate_SF, up_SF, weights_S1), order.ends_E)
        return Gather.apply(rows_SD, order.order_S, order.inverse_S, self.rows.per_token)


class ExpertMLP(nn.Module):
    """A mixture of experts in the place of a layer's MLP."""

    def __init__(self, width: int, config: ExpertsConfig, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.gate = Router(width, config)
        self.experts = Experts(width, config, act)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, -2)
        experts_TA, weights_TA, _ = self.gate(x_TD)
        return self.experts(x_TD, experts_TA, weights_TA).view_as(x_BTD)

    def with_load(self, x_BTD: Tensor, counted_BT: Tensor, outputs_M: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The result, and the `router_load` of all tokens that are counted.

        `outputs_M`: positions in the one sequence; the experts compute theirs alone, the router all: (1, M, D).
        """
        x_TD = x_BTD.flatten(0, -2)
        experts_TA, weights_TA, probabilities_TE = self.gate(x_TD)
        load_2E = router_load(experts_TA, probabilities_TE, counted_BT.flatten())
        if outputs_M is not None:
            x_TD, experts_TA, weights_TA = (x.index_select(0, outputs_M) for x in (x_TD, experts_TA, weights_TA))
            x_BTD = x_TD[None]
        return self.experts(x_TD, experts_TA, weights_TA).view_as(x_BTD), load_2E


def router_load(experts_TA: Tensor, probabilities_TE: Tensor, counted_T: Tensor) -> Tensor:
    """Tokens of each expert, and the sums of its probabilities, over the tokens that are counted: (2, E) float32."""
    counted_T = counted_T.float()
    per_token, zeros_E = experts_TA.shape[1], probabilities_TE.new_zeros(probabilities_TE.shape[1])
    tokens_E = zeros_E.index_add(0, experts_TA.flatten(), counted_T.repeat_interleave(per_token))
    return torch.stack([tokens_E, (probabilities_TE * counted_T[:, None]).sum(0)])


class RouterLoads:
    """The `router_load` of each layer with experts, collected in a forward."""

    def __init__(self) -> None:
        self.shown_BT: Tensor | None = None
        """Tokens that count; None: all, there is no padding"""
        self.layers: list[Tensor] = []

    def mask(self, x_BTD: Tensor) -> Tensor:
        """Return the tokens that count, as a layer takes them: (B, T)."""
        return x_BTD.new_ones(x_BTD.shape[:2], dtype=torch.bool) if self.shown_BT is None else self.shown_BT

    def take(self, hidden_BTD: Tensor, load_2E: Tensor) -> Tensor:
        """Keep the load that a layer returns beside its hidden states. Returns these."""
        self.layers.append(load_2E if not self.layers else load_2E.to(self.layers[0].device))
        return hidden_BTD

    def stacked(self) -> Tensor:
        """(L, 2, E)"""
        return torch.stack(self.layers)


def balancing_loss(load_L2E: Tensor, per_token: int) -> Tensor:
    """The auxiliary loss of Switch Transformer over all layers together, as transformers computes it.

    E x the sum over experts of (share of tokens) x (mean probability): `per_token` where all experts are used alike,
    more where they are not. 0 where no token is counted.
    """
    tokens_E, sums_E = load_L2E.sum(0)
    total = (tokens_E.sum() / per_token).clamp(min=1)
    return len(tokens_E) * (tokens_E / total * (sums_E / total)).sum()
