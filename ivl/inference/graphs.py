"""Runners of the decoding step: eager, compiled, or as CUDA graphs.

A CUDA graph replays the kernels of a step without Python: at batch 1 a small model waits for the host, not for the GPU.
A graph is captured for each number of rows, rounded up to a power of two, and each number of columns, rounded up to a
power of two times `COLUMNS`; it holds until the cache grows.

Off a GPU, or with layers on several devices, or with `graphs="off"`, the step runs as it is or compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ivl.inference.decoding import DecodingState, decode_step
from ivl.inference.kv_cache import COLUMNS, KVCache
from ivl.model.decoder import LanguageModel

Graphs = Literal["auto", "off"]
VARIANTS = 64
"""Limit of compiled versions of the step: by kind of sampling, one row or several, full or part-filled cache"""


class StepRunner:
    """Runs `decode_step`. One runner serves one engine."""

    def __init__(
        self, model: LanguageModel, device: torch.device, graphs: Graphs = "auto", compiled: bool = False
    ) -> None:
        """`graphs`: auto captures CUDA graphs where the model is on one GPU. `compiled`: torch.compile the step."""
        self.device = device
        self.overlaps = device.type == "cuda"
        """True if the next step is started before the result of the last is read"""
        is_split = any(hasattr(module, "_hf_hook") for module in model.modules())
        self._captures = graphs == "auto" and device.type == "cuda" and not is_split
        self._step: Callable[..., Tensor] = decode_step
        if compiled:
            torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
            self._step = torch.compile(decode_step, fullgraph=True, dynamic=True)
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run_plainly(self) -> None:
        """Read each step before the next and capture none, for a model whose weights other processes hold a part of."""
        self.overlaps = self._captures = False

    def forget(self) -> None:
        """Drop the graphs, after the tensors they use were replaced."""
        self._graphs.clear()

    def run(
        self, model: LanguageModel, cache: KVCache, state: DecodingState, rows: int, columns: int, *kinds: bool
    ) -> Callable[[], Tensor]:
        """Start a step of the first rows. Returns the function that waits for its result, (rows, 3) on the CPU."""
        if self._captures:
            result = self._replay(model, cache, state, rows, columns, *kinds)
        else:
            result = self._step(model, cache, state, rows, columns, *kinds)
        if self.device.type != "cuda":
            return lambda: result[:rows]
        host = torch.empty(rows, 3, pin_memory=True)
        host.copy_(result[:rows], non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait

    def _replay(
        self, model: LanguageModel, cache: KVCache, state: DecodingState, rows: int, columns: int, *kinds: bool
    ) -> Tensor:
        rows = min(_power_of_two(rows), cache.rows)
        columns = min(_power_of_two(columns // COLUMNS) * COLUMNS, cache.columns)
        key = (rows, columns, *kinds)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(model, cache, state, rows, columns, *kinds)
            except RuntimeError as error:  # a layer that waits for the host, such as 8-bit ones
                self._captures = False
                warnings.warn(f"inference: no CUDA graphs here ({str(error).splitlines()[0]})", stacklevel=2)
                return self._step(model, cache, state, rows, columns, *kinds)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def _capture(
        self, model: LanguageModel, cache: KVCache, state: DecodingState, rows: int, columns: int, *kinds: bool
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step. It runs once before, on copies of the state, so that lazily made workspaces exist."""
        saved_state = state.copy()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(model, cache, state, rows, columns, *kinds)
        torch.cuda.current_stream().wait_stream(stream)
        state.restore(saved_state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._step(model, cache, state, rows, columns, *kinds)
        return graph, result


def _power_of_two(number: int) -> int:
    """Return the least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
