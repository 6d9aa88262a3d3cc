"""Choices of a model's options: dtype, attention kernel, quantization, weights of rows in the loss."""

from __future__ import annotations

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Type of weights and computation"""
AttentionKernel = Literal["auto", "sdpa", "eager", "flash_attention_2"]
"""Attention kernel; `auto` is the fastest that is installed and runs here"""
Quantize = Literal["int8", "nf4", "fp8"]
"""Bits of a language model's linear layers: 8 or 4"""
Reduction = Literal["token", "sample", "square"]
"""Weight of a row in an optimizer step: its supervised tokens, 1, or the root of their number"""
