"""What differs between models, as data: one row per language-model family.

A new family is a row here and a parameter of the parity test. The columns are read by `model/llm.py` (class),
`model/weights.py` (layout), `model/tune.py` (LoRA targets) and `data/template.py` through the checkpoint's config.
"""

from __future__ import annotations

from dataclasses import dataclass

from ivl.types import UserError


@dataclass(frozen=True)
class LLMFamily:
    """How a language model named in `llm_config.architectures` is built from transformers' own classes."""

    architecture: str
    """The name in the released config"""
    model_type: str
    """transformers' model type whose classes compute it: InternLM2 is Llama with its weights in another order"""
    layout: str
    """The row of `ivl.model.weights` that maps released tensor names to the module's; "native": the same names"""
    lora_targets: tuple[str, ...]
    """Names of the linear layers inside a decoder layer that a LoRA covers by default"""


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

LLMS: dict[str, LLMFamily] = {
    row.architecture: row
    for row in (
        LLMFamily("InternLM2ForCausalLM", "llama", "internlm2", _LLAMA),
        LLMFamily("LlamaForCausalLM", "llama", "native", _LLAMA),
        LLMFamily("Qwen2ForCausalLM", "qwen2", "native", _LLAMA),
        LLMFamily("Qwen3ForCausalLM", "qwen3", "native", _LLAMA),
        LLMFamily("Phi3ForCausalLM", "phi3", "native", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    )
}


def llm_family(architecture: str) -> LLMFamily:
    """The row of an architecture. Raises UserError listing the known ones."""
    try:
        return LLMS[architecture]
    except KeyError:
        raise UserError(
            f"llm_config.architectures: {architecture!r} is not a language model this program knows; "
            f"expected one of {', '.join(sorted(LLMS))}"
        ) from None
