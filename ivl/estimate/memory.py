"""Memory of a device in a training step, under each strategy.

`ivl.estimate.training_step` simulates the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ivl.estimate.hardware import CONTEXT
from ivl.estimate.training_step import FP32, Activations, BatchShape, ShallowModel, TrainSetup
from ivl.parallel.device_map import Sizes, balance

STATES = {"AdamW": 8, "Adam": 8, "SGD": 4, "Adagrad": 4, "RMSprop": 4, "Adafactor": 0.01, "Lion": 4, "8bit": 2}
"""Bytes an optimizer keeps per trained parameter, by the class's name; 8bit: those with it in their names"""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Logits included, at the moment that needs most of all"""
    logits: float
    buffers: float
    """Buffers of the strategy (buckets, gathered blocks), of the optimizer's step, of CUDA"""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def memory_needed(sketch: ShallowModel, micro: BatchShape) -> MemoryEstimate:
    """Estimate a step's memory on the fullest device, from the second step on."""
    setup, parts = sketch.setup, sketch.parameters()
    activations = sketch.activations(micro)
    if setup.strategy == "layer_split":
        return _fullest(sketch, activations)
    weights = sum(p.weights for p in parts.values())
    trained = sum(p.trainable for p in parts.values())
    gradients, states = float(trained * FP32), trained * state_bytes(setup.optimizer)
    n, buffers = setup.devices, CONTEXT if setup.on_gpu else 0.0
    buffers += 2 * trained * FP32 * setup.keeps_start  # as it began, and as it is now while the reference computes
    if setup.strategy == "zero2":
        # DeepSpeed keeps half-precision weights whole, and a float32 copy of what trains shared out.
        states = (states + trained * FP32) / n
        gradients = gradients / n + min(gradients, 1e9)  # a bucket of 5e8 half-precision numbers
    elif setup.strategy in ("fsdp2", "zero3"):
        root = sum(parts[p].total for p in ("embeddings", "head")) * 2
        weights, gradients, states = weights / n, gradients / n, states / n
        buffers += 2 * sketch.block_bytes() + root if n > 1 else 0.0
    elif setup.strategy == "ddp" and n > 1:
        buffers += gradients  # buckets
    return _peak(setup, activations, weights, gradients, states, buffers)


def _peak(
    setup: TrainSetup, peaks: Activations, weights: float, gradients: float, states: float, buffers: float
) -> MemoryEstimate:
    """Peak memory of one device: that of the moment that needs most."""
    # Lightning frees the gradients of the last step after forward, where they are not being added up.
    accumulating = setup.accumulate > 1
    moments = {
        "forward": (gradients, peaks.forward),
        "backward": (gradients * accumulating, peaks.backward),
        "end of backward": (gradients, peaks.recomputed),
        # torch's multi-tensor AdamW, the default on a GPU, makes one more copy of all that trains.
        "optimizer": (gradients, gradients if setup.on_gpu and "8bit" not in setup.optimizer else 0.0),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations = moments[moment]
    return MemoryEstimate(weights, gradients, states, activations, min(peaks.logits, activations), buffers)


def state_bytes(optimizer: str) -> float:
    """Bytes per trained parameter that an optimizer keeps; of an unknown class, Adam's."""
    name = optimizer.rpartition(".")[2]
    if "8bit" in name.lower():
        return STATES["8bit"]
    return STATES.get(name, STATES["AdamW"])


# -- layers over several devices -----------------------------------------------------------------------------------


def split_sizes(sketch: ShallowModel, activations: Activations) -> Sizes:
    """Bytes of each part in training, for `ivl.parallel.device_map.plan` to spread the layers."""
    layers, block = sketch.depths[1], sketch.block()
    state = FP32 + state_bytes(sketch.setup.optimizer)
    first = _share(sketch, activations, 0, first=True)
    main = first.weights + first.trained * state + max(first.activations.forward, first.activations.backward)
    return Sizes(main, [block.weights + block.trainable * state] * layers, activations.block, activations.recomputed)


@dataclass(frozen=True)
class _Share:
    """Memory of one device under a pipeline split."""

    weights: float
    trained: float
    activations: Activations


def _share(sketch: ShallowModel, activations: Activations, count: int, first: bool) -> _Share:
    """Sum of `count` layers of the language model and, on the first device, of all other parts."""
    layers, block, parts = sketch.depths[1], sketch.block(), sketch.parameters().values()
    weights, trained = count * block.weights, count * block.trainable
    saved = count * activations.block
    if not first:
        peak = saved + activations.recomputed
        passing = replace(activations, forward=peak, backward=peak, logits=0.0)
        return _Share(weights, trained, passing)
    weights += sum(p.weights for p in parts) - layers * block.weights
    trained += sum(p.trainable for p in parts) - layers * block.trainable
    saved -= layers * activations.block
    forward, backward = activations.forward + saved, activations.backward + saved
    return _Share(weights, trained, replace(activations, forward=forward, backward=backward))


def _fullest(sketch: ShallowModel, activations: Activations) -> MemoryEstimate:
    """Peak memory of the fullest device under a pipeline split over equal devices."""
    setup = sketch.setup
    counts = balance(split_sizes(sketch, activations), [float("inf")] * setup.devices, offload=False)
    assert counts is not None, "no limit was set"
    needs = []
    for number, count in enumerate(counts[: setup.devices]):
        share = _share(sketch, activations, count, first=number == 0)
        states = share.trained * state_bytes(setup.optimizer)
        buffers = CONTEXT if setup.on_gpu else 0.0
        needs.append(_peak(setup, share.activations, share.weights, share.trained * FP32, states, buffers))
    return max(needs, key=lambda need: need.total)
