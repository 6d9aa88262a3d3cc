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
    renamed: tuple[tuple[str, str], ...] = ()
    """Keys of `llm_config` that the class spells otherwise: (released, transformers)"""


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

LLMS: dict[str, LLMFamily] = {
    row.architecture: row
    for row in (
        LLMFamily("InternLM2ForCausalLM", "llama", "internlm2", _LLAMA, renamed=(("bias", "attention_bias"),)),
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


@dataclass(frozen=True)
class ReleasedModel:
    """A checkpoint people ask for by name."""

    name: str
    """As the document spells it, lower case"""
    huggingface: str
    """Its id on the Hugging Face hub"""
    modelscope: str
    """Its id on ModelScope"""

    def id_on(self, hub: str) -> str:
        return self.modelscope if hub == "modelscope" else self.huggingface


_SIZES = {
    "InternVL2": "1B 2B 4B 8B 26B 40B Llama3-76B",
    "InternVL2_5": "1B 2B 4B 8B 26B 38B 78B",
    "InternVL3": "1B 2B 8B 9B 14B 38B 78B",
    "InternVL3_5": "1B 2B 4B 8B 14B 38B",
}
_V1_5 = (
    "InternVL-Chat-V1-5",
    "InternVL-Chat-V1-5-int8",
    "Mini-InternVL-Chat-2B-V1-5",
    "Mini-InternVL-Chat-4B-V1-5",
)

MODELS: tuple[ReleasedModel, ...] = tuple(
    ReleasedModel(stem.lower().replace("v1-5", "v1_5"), f"OpenGVLab/{stem}", f"OpenGVLab/{stem}")
    for stem in (*_V1_5, *(f"{family}-{size}" for family, sizes in _SIZES.items() for size in sizes.split()))
)


def find_model(name: str) -> ReleasedModel | None:
    """The row of a name people use, whatever its case: `internvl2-2b`, `InternVL2-2B`, `OpenGVLab/InternVL2-2B`."""
    key = _key(name)
    return next((row for row in MODELS if key in (_key(row.name), _key(row.huggingface), _key(row.modelscope))), None)


def _key(name: str) -> str:
    owner, _, stem = name.rpartition("/")
    stem = stem.lower().replace("_", "-").replace(".", "-")
    return stem if owner.lower() in ("", "opengvlab", "ai-modelscope") else f"{owner.lower()}/{stem}"
