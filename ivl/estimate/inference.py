"""Memory of answering a row of `TOKENS` and `TILES`: its key-value cache, and the tiles in the vision encoder."""

from __future__ import annotations

from ivl.architecture.config import VisionConfig
from ivl.estimate.hardware import TILES, TOKENS


def cache_bytes(kv_heads: int, head_dim: int, element: int) -> int:
    """Keys and values of one decoder layer; `element`: bytes of a number."""
    return 2 * TOKENS * kv_heads * head_dim * element


def tower_bytes(vision: VisionConfig, side: int, element: int) -> int:
    """Activations of a block of the vision encoder: six of its width, two inside its MLP. `side`: pixels of a tile."""
    patches = (side // vision.patch_size) ** 2 + 1
    return TILES * patches * (6 * vision.hidden_size + 2 * vision.intermediate_size) * element
