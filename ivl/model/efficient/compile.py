"""Regional compilation: torch.compile of each layer of the tower and of the language model.

Layers of one kind have the same code, so what is compiled for one serves all, whatever their number. Names of
parameters do not change. Attention over rows stays as it is (`ivl.model.attention`): for each list of lengths it would
be compiled anew.

Saves: time alone, most of all on a GPU (`benchmarks/gpu.py`).
Proof: the same losses and gradients up to rounding (`tests/model/test_compiled.py`, `tests/lit/test_compiled_runs.py`).
Off: `model.compile: false`, the default. Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ivl.model.parts import ModelParts

VARIANTS = 32
"""Limit of compiled versions of a layer: by kind, with and without gradients, static or dynamic, by trained parts"""


def compile_layers(model: ModelParts, backend: str = "inductor") -> None:
    """Compile the layers in place, at their first call. `backend`: as in torch.compile."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in (*model.vision_model.encoder.layers, *model.language_model.model.layers):
        layer.compile(backend=backend)


def uncompiled() -> AbstractContextManager[None]:
    """Context without compiled layers: an answer grows by a token at a time, and the cache with it."""
    return torch.compiler.set_stance("force_eager")
