"""InternViT, the vision tower, in both released variants.

Module names are those of the released checkpoints.
300M: LayerNorm, biased qkv. 6B: RMSNorm, unbiased qkv, queries and keys normalised over the full width.
Facts about the architecture: OpenGVLab/InternVL, internvl_chat/internvl/model/internvl_chat/modeling_intern_vit.py.

Shapes: N tiles, S pixels a side, C channels of a tile, L tokens of a tile (patches and one class token),
D width, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ivl.architecture.config import VisionConfig
from ivl.model.layers import ACTIVATIONS, RMSNorm
from ivl.types import IMAGENET_MEAN, IMAGENET_STD

NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


def normalize(tiles_N3SS: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 tiles → pixels for the tower, equal to torchvision's ToTensor and Normalize. Floats pass as they are."""
    if tiles_N3SS.is_floating_point():
        return tiles_N3SS.to(dtype)
    # Not made on the device, which would wait for it.
    colours = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    mean_311, std_311 = (c.to(tiles_N3SS.device, non_blocking=True) for c in colours)
    return ((tiles_N3SS.float() / 255 - mean_311) / std_311).to(dtype)


def eager_attention(q_NHLK: Tensor, k_NHLK: Tensor, v_NHLK: Tensor, dropout: float) -> Tensor:
    """Attention written out. Returns (N, H, L, K)."""
    scores_NHLL = (q_NHLK * q_NHLK.shape[-1] ** -0.5) @ k_NHLK.transpose(-2, -1)
    return F.dropout(scores_NHLL.softmax(-1), dropout) @ v_NHLK


def sdpa_attention(q_NHLK: Tensor, k_NHLK: Tensor, v_NHLK: Tensor, dropout: float) -> Tensor:
    """torch's fused attention. Returns (N, H, L, K)."""
    return F.scaled_dot_product_attention(q_NHLK, k_NHLK, v_NHLK, dropout_p=dropout)


def flash_attention(q_NHLK: Tensor, k_NHLK: Tensor, v_NHLK: Tensor, dropout: float) -> Tensor:
    """The flash-attn package. Returns (N, H, L, K)."""
    from flash_attn import flash_attn_func

    q_NLHK, k_NLHK, v_NLHK = (x.transpose(1, 2) for x in (q_NHLK, k_NHLK, v_NHLK))
    return flash_attn_func(q_NLHK, k_NLHK, v_NLHK, dropout_p=dropout).transpose(1, 2)


KERNELS = {"eager": eager_attention, "sdpa": sdpa_attention, "flash_attention_2": flash_attention}


class Attention(nn.Module):
    """Self-attention over the tokens of a tile."""

    def __init__(self, config: VisionConfig, kernel: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.kernel = KERNELS[kernel]
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(config.dropout)
        normalise = config.qk_normalization
        self.q_norm = RMSNorm(width, config.layer_norm_eps) if normalise else nn.Identity()
        self.k_norm = RMSNorm(width, config.layer_norm_eps) if normalise else nn.Identity()

    def forward(self, x_NLD: Tensor) -> Tensor:
        return self.proj_drop(self.proj(self.mixed(x_NLD)))

    def mixed(self, x_NLD: Tensor) -> Tensor:
        """Concatenated outputs of the heads, before the projection: (N, L, D)."""
        q_NLD, k_NLD, v_NLD = self.qkv(x_NLD).chunk(3, dim=-1)
        q_NLD, k_NLD = self.q_norm(q_NLD), self.k_norm(k_NLD)
        q_NHLK, k_NHLK, v_NHLK = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q_NLD, k_NLD, v_NLD))
        dropout = self.attention_dropout if self.training else 0.0
        out_NHLK = self.kernel(q_NHLK, k_NHLK, v_NHLK, dropout)
        return out_NHLK.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NLD: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x_NLD)))


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for some tiles, in training only; a frozen tower drops none."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch_NLD: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training or not torch.is_grad_enabled():
            return branch_NLD
        keep_N11 = branch_NLD.new_empty(len(branch_NLD), 1, 1).bernoulli_(1 - self.rate)
        return branch_NLD * keep_N11 / (1 - self.rate)


class Layer(nn.Module):
    """A transformer block with layer scale (`ls1`, `ls2`)."""

    def __init__(self, config: VisionConfig, kernel: str, drop_path: float) -> None:
        super().__init__()
        norm = NORMS[config.norm_type]
        self.attn = Attention(config, kernel)
        self.mlp = MLP(config)
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x_NLD: Tensor) -> Tensor:
        x_NLD = x_NLD + self.drop_path1(self.attn(self.norm1(x_NLD)) * self.ls1)
        return x_NLD + self.drop_path2(self.mlp(self.norm2(x_NLD)) * self.ls2)


class Embeddings(nn.Module):
    """Patches and a class token, with the position embedding resized to the tile at hand."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.grid = config.image_size // patch
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(1, self.grid**2 + 1, width))

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding for a grid of `rows` x `columns` patches: (1, 1 + rows * columns, D)."""
        if (rows, columns) == (self.grid, self.grid):
            return self.position_embedding
        of_class, of_patches = self.position_embedding.split([1, self.grid**2], dim=1)
        square_1Dgg = of_patches.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized_1Drc = F.interpolate(square_1Dgg, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([of_class, resized_1Drc.flatten(2).transpose(1, 2).to(of_class.dtype)], dim=1)

    def forward(self, pixels_NCSS: Tensor) -> Tensor:
        patches_NDrc = self.patch_embedding(pixels_NCSS)
        rows, columns = patches_NDrc.shape[-2:]
        class_N1D = self.class_embedding.expand(len(pixels_NCSS), 1, -1)
        tokens_NLD = torch.cat([class_N1D, patches_NDrc.flatten(2).transpose(1, 2)], dim=1)
        return tokens_NLD + self.positions(rows, columns)


class Encoder(nn.Module):
    """The stack of layers; drop path grows linearly with depth."""

    def __init__(self, config: VisionConfig, kernel: str) -> None:
        super().__init__()
        count = config.num_hidden_layers
        rates = [config.drop_path_rate * n / max(count - 1, 1) for n in range(count)]
        self.layers = nn.ModuleList(Layer(config, kernel, rate) for rate in rates)
        self.checkpointing = False
        """Activation checkpointing: save only the input of each layer in training, recompute the rest in backward"""
        self.around_layer: Callable[[], AbstractContextManager[None]] = nullcontext
        """Context of each layer's forward in training (`ivl.model.efficient.recompute`)"""

    def forward(self, x_NLD: Tensor, count: int) -> Tensor:
        for layer in self.layers[:count]:
            if self.checkpointing and torch.is_grad_enabled():
                x_NLD = checkpoint(layer, x_NLD, use_reentrant=False)
            else:
                with self.around_layer() if torch.is_grad_enabled() else nullcontext():
                    x_NLD = layer(x_NLD)
        return x_NLD


class InternViT(nn.Module):
    """The vision tower. `kernel` is a key of `KERNELS`."""

    def __init__(self, config: VisionConfig, kernel: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, kernel)

    def forward(self, pixels_NCSS: Tensor, select_layer: int = -1) -> Tensor:
        """Hidden state number `select_layer` (0: the embeddings, -1: of the last layer), class token first: (N, L, D).

        Later layers are not computed, and so get no gradient.
        """
        count = select_layer % (len(self.encoder.layers) + 1)
        return self.encoder(self.embeddings(pixels_NCSS), count)
