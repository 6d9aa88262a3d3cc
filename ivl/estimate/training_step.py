"""Simulation of a training step's allocations, before any weight is read.

A shallow copy of the model (its real code, three blocks of each stack, no data: torch's fake tensors) runs a forward
and a backward while every allocation is counted; what one block adds is multiplied out to the full depth. So whatever
the code does to memory (a LoRA's dropout, recomputed layers, chunks of logits, autocast's copies) is in the figure.

Not in it: what a kernel allocates inside itself, and how an allocator rounds. The step is simulated with the kernels
of a CPU; on a GPU fused kernels keep the same tensors, apart from dropout's masks (smaller there).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ivl.architecture.config import Config
from ivl.finetune import tune as tuning
from ivl.model.internvl import InternVL
from ivl.model.loss import CHUNK
from ivl.options import AttentionKernel, Quantize, Tune
from ivl.types import SequenceLayout, UserError

DEPTH = 3
"""Blocks of each stack in the simulation: the first may differ, the other two give the cost of one more"""
FP32 = 4
QUANTIZED = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a quantised weight, with its scales"""
Strategy = Literal["single", "ddp", "zero2", "fsdp2", "zero3", "layer_split"]


@dataclass(frozen=True)
class BatchShape:
    """Shape of the batch of one forward on one device."""

    rows: int
    length: int
    """Tokens of a row, or of a pack"""
    tiles: int
    supervised: int
    packed: bool = False


@dataclass(frozen=True)
class TrainSetup:
    """Settings of a run that decide its memory, beside the shapes."""

    tune: Tune
    precision: str = "32-true"
    """Lightning's name"""
    quantize: Quantize | None = None
    vision_checkpointing: bool = False
    language_checkpointing: bool = False
    attention: AttentionKernel = "sdpa"
    efficient: bool = True
    """Training in less memory, by `ivl.model.efficient`"""
    optimizer: str = "AdamW"
    accumulate: int = 1
    strategy: Strategy = "single"
    devices: int = 1
    on_gpu: bool = True
    keeps_start: bool = False
    """True if what trains is also kept as it began, for the reference of preference tuning"""


@dataclass(frozen=True)
class Parameters:
    """Parameters of a part: number, number that train, and bytes of their weights."""

    total: int
    trainable: int
    weights: float


@dataclass(frozen=True)
class Activations:
    """Bytes of activations, beside weights, gradients and optimizer states."""

    forward: float
    """Peak, up to the loss"""
    backward: float
    saved: float
    """Saved by forward for backward"""
    recomputed: float
    """Peak of backward without what forward saved: a block that is recomputed, its gradients on the way"""
    logits: float
    """Logits of a chunk, in the three forms that exist at once; part of the peaks"""
    block: float
    """Saved for backward by one block of the language model; part of `saved`"""


class MemTracker(TorchDispatchMode):
    """Counter of the bytes of all live tensors created under it, except views of a model's weights.

    torch's own (`torch.distributed._tools.mem_tracker`) does not serve: it refuses a model with frozen weights, which
    it hooks, puts a method of its own in the place of torch's `resize_`, takes five times as long, and its peak
    cannot begin anew in the middle of a step.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {p.untyped_storage()._cdata: 0 for p in model.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def ignore(self, tensor: Tensor) -> None:
        """Count a tensor no longer: it is a gradient now."""
        self._gone(tensor.untyped_storage()._cdata)

    def mark(self) -> int:
        """Return the peak so far, and begin a new one."""
        peak, self.peak = self.peak, self.live
        return peak


def used_depth(config: Config) -> int:
    """Blocks of the vision encoder that are computed: those after `select_layer` are not."""
    return config.select_layer % (config.vision.num_hidden_layers + 1)


def shallow_copy(config: Config, setup: TrainSetup, depths: tuple[int, int]) -> InternVL:
    """A model of these numbers of computed blocks on the meta device, tuned as `setup` says.

    Where the vision encoder stops early, the same number of blocks is left out.
    """
    shallow = replace(
        config,
        vision=replace(config.vision, num_hidden_layers=depths[0]),
        llm=copy.deepcopy(config.llm) | {"num_hidden_layers": depths[1]},
        select_layer=-1,
    )
    shallow.llm.pop("layer_types", None)
    dtype = _dtype(setup.precision)
    model = InternVL.from_config(shallow, dtype, "meta", setup.attention, efficient=setup.efficient)
    with torch.device("meta"):
        tuning.apply(model, _without_pissa(setup.tune))
    model.set_checkpointing(setup.vision_checkpointing, setup.language_checkpointing)
    return model


class ShallowModel:
    """Shallow copy of a model, whose figures are multiplied out to the full depth."""

    def __init__(self, config: Config, setup: TrainSetup) -> None:
        self.config, self.setup = config, setup
        self.depths = (config.vision.num_hidden_layers, config.llm["num_hidden_layers"])
        self.used = used_depth(config)
        shallow = min(DEPTH, self.used), min(DEPTH, self.depths[1])
        tune = setup.tune
        if isinstance(last := tune.vision_model, tuning.Blocks):
            if not 0 < last.last <= self.used:
                raise UserError(f"model.tune.vision_model.last: expected 1 to {self.used} blocks, found {last.last}")
            tune = replace(tune, vision_model=tuning.Blocks(min(last.last, shallow[0])))
        self.model = shallow_copy(config, replace(setup, tune=tune), shallow)
        self.blocks = (self.model.vision_model.encoder.layers, self.model.language_model.model.layers)

    @property
    def omitted(self) -> tuple[int, int]:
        """Number of computed blocks of tower and language model that the full model has beyond the copy."""
        return self.used - len(self.blocks[0]), self.depths[1] - len(self.blocks[1])

    def parameters(self) -> dict[str, Parameters]:
        """Count the parameters of each part of the full model."""
        by_part = {part: self._count(part) for part in tuning.PARTS}
        extra = (self.depths[0] - len(self.blocks[0]), self.omitted[1])
        for part, blocks, times in zip(("vision_model", "language_model"), self.blocks, extra):
            first, last = (self._count(part, block) for block in (blocks[0], blocks[-1]))
            frozen = 0  # blocks that do not train, where only the last do
            if part == "vision_model" and isinstance(mode := self.setup.tune.vision_model, tuning.Blocks):
                frozen = self.depths[0] - mode.last - (len(blocks) - min(mode.last, len(blocks)))
                first = Parameters(last.total, 0, last.total * _dtype(self.setup.precision).itemsize)
            for sizes, count in ((last, times - frozen), (first, frozen)):
                sums = [getattr(by_part[part], k) + count * v for k, v in asdict(sizes).items()]
                by_part[part] = Parameters(*sums)
        return by_part

    def _count(self, part: str, block: nn.Module | None = None) -> Parameters:
        """Count the parameters of a part of the copy, or of one block."""
        named = (
            block.named_parameters()
            if block
            else [(n, p) for n, p in self.model.named_parameters() if tuning.part_of(n) == part]
        )
        language = part == "language_model"
        total, trainable, weights = 0, 0, 0.0
        for name, p in named:
            total += p.numel()
            trainable += p.numel() * p.requires_grad
            inside = block is not None or ".layers." in name
            linear = (p.ndim == 2 or ".experts." in name) and not p.requires_grad
            quantized = QUANTIZED.get(self.setup.quantize or "") if linear and language and inside else None
            if linear and self.config.stored_in_8_bits and part != "embeddings":
                quantized = QUANTIZED["int8"]
            weights += p.numel() * (quantized or p.element_size())
        return Parameters(total, trainable, weights)

    def block(self) -> Parameters:
        """A block of the language model."""
        return self._count("language_model", self.blocks[1][-1])

    def block_bytes(self) -> float:
        """The largest block, in the type it is computed in."""
        size = 4 if self.setup.precision.startswith("32") else 2
        return max(sum(p.numel() for p in blocks[-1].parameters()) for blocks in self.blocks) * size

    def activations(self, micro: BatchShape) -> Activations:
        """Simulate a forward and a backward."""
        model = self.model
        block_marks: tuple[list[int], list[int]] = ([], [])
        tower: list[int] = []  # the peak up to the language model, in which its blocks keep nothing yet
        with FakeTensorMode(), faked(model):
            tally = MemTracker(model)
            hooks = [
                block.register_forward_hook(lambda *_, marks=marks: marks.append(tally.live))
                for blocks, marks in zip(self.blocks, block_marks)
                for block in blocks
            ]
            hooks.append(model.language_model.model.register_forward_pre_hook(lambda *_: tower.append(tally.mark())))
            trained = [p for p in model.parameters() if p.requires_grad]
            hooks += [p.register_post_accumulate_grad_hook(lambda p: tally.ignore(p.grad)) for p in trained]
            batch = batch_of(model, micro)
            with tally, _autocast(self.setup.precision):
                loss = model(**batch).loss_sum
                forward, saved = tally.mark(), tally.live
                counted = [list(marks) for marks in block_marks]  # recomputed blocks run their hooks again
                assert loss is not None
                loss.backward()
                backward = tally.mark()
            for hook in hooks:
                hook.remove()
        # The language model's last block computes less than the others.
        saved_by_block = [
            marks[-end] - marks[-end - 1] if len(marks) > end else 0 for marks, end in zip(counted, (1, 2))
        ]
        vision, extra = (sum(b * times for b, times in zip(saved_by_block[:n], self.omitted_saving())) for n in (1, 2))
        chunk = min(CHUNK, micro.supervised)
        logits = chunk * self.config.llm["vocab_size"] * (3 * FP32 if self.setup.precision.startswith("32") else 14)
        forward = max(tower[0] + vision, forward + extra)
        recomputed = max(0, backward - saved)
        return Activations(forward, backward + extra, saved + extra, recomputed, logits, saved_by_block[1])

    def omitted_saving(self) -> tuple[int, int]:
        """Number of blocks beyond the copy that save as much for backward as its last one."""
        vision, language = self.omitted
        if isinstance(mode := self.setup.tune.vision_model, tuning.Blocks):
            vision = mode.last - min(mode.last, len(self.blocks[0]))
        return vision, language


def batch_of(model: InternVL, micro: BatchShape) -> dict[str, Any]:
    """Build a batch of zeros for the model's forward."""
    size, shape = model.config.image_size, (micro.rows, micro.length)
    total = micro.rows * micro.length
    tokens = micro.tiles * model.config.tokens_per_tile
    positions, ends = torch.zeros(1, total, dtype=torch.long), torch.zeros(micro.rows + 1, dtype=torch.int32)
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.zeros(shape, dtype=torch.long),
        "layout": SequenceLayout((micro.length,) * micro.rows, positions, ends),
        "image_positions": torch.zeros(tokens, dtype=torch.long),
        "supervised_positions": torch.zeros(min(micro.supervised, total), dtype=torch.long),
        "tiles": torch.zeros(micro.tiles, 3, size, size, dtype=torch.uint8),
    }
    if micro.packed:
        batch["row_ids"] = torch.zeros(shape, dtype=torch.long)
    return batch


@contextmanager
def faked(model: InternVL) -> Iterator[None]:
    """Context in which the parameters of a model on the meta device are fake tensors of a CPU."""
    replaced = []
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                replaced.append((module._parameters, name, p))
                fake = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
    rotary = model.language_model.model.rotary_emb
    rotary_tensors = {k: v for k, v in vars(rotary).items() if isinstance(v, Tensor)}
    for name, tensor in rotary_tensors.items():
        setattr(rotary, name, torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
    try:
        yield
    finally:
        for place, name, p in replaced:
            place[name] = p
        for name, tensor in rotary_tensors.items():
            setattr(rotary, name, tensor)


def _autocast(precision: str) -> AbstractContextManager[Any]:
    if precision.startswith("32"):
        return nullcontext()
    return torch.autocast("cpu", torch.float16 if precision.startswith("16") else torch.bfloat16)


def _dtype(precision: str) -> torch.dtype:
    """Dtype of frozen weights (`ivl.lit.module`)."""
    if precision.startswith("32"):
        return torch.float32
    return torch.float16 if precision.startswith("16") else torch.bfloat16


def _without_pissa(tune: Tune) -> Tune:
    """Return modes of the same shapes without pissa, which needs weights."""
    modes = {part: tune.mode(part) for part in tuning.PARTS}
    other: dict[str, Any] = {k: replace(m, init="default") for k, m in modes.items() if isinstance(m, tuning.LoRA)}
    return replace(tune, **other)
