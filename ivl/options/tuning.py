"""Options of tuning: mode and learning rate of each part of the model, activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PARTS = ("vision_model", "mlp1", "language_model", "embeddings", "head")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the linear layers of a part."""

    rank: int = 16
    """Width of the low-rank matrices."""
    alpha: float | None = None
    """Scale: the update is multiplied by alpha / rank. Default: twice the rank."""
    dropout: float = 0.0
    """Dropout in front of the low-rank matrices, in training."""
    targets: list[str] | None = None
    """Names (last component) of the linear layers to adapt. Default: every linear layer of a block, and in a mixture
    of experts attention alone; its experts are `gate_up_proj` and `down_proj`, each expert with a pair of its own."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (https://arxiv.org/abs/2402.09353)."""
    init: Literal["default", "gaussian", "pissa"] = "default"
    """Initial values of the two matrices: the first random and the second zero, or, for pissa, from the largest
    singular values of the weight, which keeps the rest (https://arxiv.org/abs/2404.02948; one SVD per layer)."""

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return scale_alpha(self) / (self.rank**0.5 if self.rslora else self.rank)


def scale_alpha(lora: LoRA) -> float:
    """alpha, its default filled in."""
    return 2 * lora.rank if lora.alpha is None else lora.alpha


@dataclass(frozen=True)
class Blocks:
    """The last blocks of the vision encoder in full, the others frozen."""

    last: int
    """Number of blocks that train."""


How = Literal["frozen", "full"] | Blocks | LoRA
"""Mode of a part in training"""


@dataclass(frozen=True)
class Tune:
    """Mode of each part: `frozen`, `full`, or the settings of a LoRA such as `{rank: 16}`."""

    vision_model: Literal["frozen", "full"] | Blocks | LoRA = "frozen"
    """The vision encoder (InternViT); `{last: 4}` trains its last four blocks."""
    mlp1: Literal["frozen", "full"] | LoRA = "frozen"
    """The projector between the two."""
    language_model: Literal["frozen", "full"] | LoRA = field(default_factory=LoRA)
    """The blocks of the language model."""
    embeddings: Literal["frozen", "full"] | None = None
    """Its input embeddings. Unset: full where the blocks are, else frozen."""
    head: Literal["frozen", "full"] | LoRA | None = None
    """Its output layer. Unset: full where the blocks are, else frozen."""

    def mode(self, part: str) -> How:
        """Return a part's mode, for a model that does not share one tensor between embeddings and head."""
        value = getattr(self, part)
        return value if value is not None else "full" if self.language_model == "full" else "frozen"

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Tune:
        """Read the section of a run's config.yaml."""
        kinds = {True: Blocks, False: LoRA}
        return cls(**{part: kinds["last" in v](**v) if isinstance(v, dict) else v for part, v in raw.items()})


@dataclass(frozen=True)
class Rate:
    """Learning rate and weight decay of a part's optimizer groups."""

    lr: float | None = None
    """Peak learning rate. Unset: the optimizer's."""
    weight_decay: float | None = None
    """Weight decay of its matrices; vectors (biases, norms, scales) have none. Unset: the optimizer's."""


@dataclass(frozen=True)
class VisionRate(Rate):
    """Rate of the vision encoder, with layer-wise decay towards the pixels."""

    layer_decay: float = 1.0
    """Each block's rate is this times that of the block after it, and the patch embedding's this times the first
    block's (Bao et al. 2021, https://arxiv.org/abs/2106.08254). 1: all alike."""


@dataclass(frozen=True)
class Rates:
    """Learning rate and weight decay per part; what is unset follows the optimizer."""

    vision_model: VisionRate = field(default_factory=VisionRate)
    """The vision encoder."""
    mlp1: Rate = field(default_factory=Rate)
    """The projector."""
    language_model: Rate = field(default_factory=Rate)
    """The blocks of the language model."""
    embeddings: Rate = field(default_factory=Rate)
    """Its input embeddings."""
    head: Rate = field(default_factory=Rate)
    """Its output layer."""


@dataclass(frozen=True)
class Checkpointing:
    """Activation checkpointing: less memory, about a third more time in the part it is on for."""

    vision_model: bool = False
    """In the vision encoder."""
    language_model: bool = False
    """In the language model."""
