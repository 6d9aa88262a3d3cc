"""Tables of language-model families and released models.

The differences between models, as data. A new family is an entry here and a parameter of the parity test. The columns
are read by `model/decoder.py` (variant), `checkpoint/layouts.py` (layout), `finetune/tune.py` (LoRA targets) and
`data/text/template.py` through `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ivl.architecture.backbones import BACKBONES, Backbone
from ivl.architecture.config import Config, VisionConfig
from ivl.errors import UserError


@dataclass(frozen=True)
class LLMFamily:
    """Family of a language model, by `llm_config.architectures`; `ivl.model.decoder` builds it."""

    architecture: str
    """Name in the released config."""
    model_type: str
    """Name of transformers, in -hf folders: InternLM2 is Llama with its weights in another order"""
    layout: str
    """Key of `ivl.checkpoint.weights` that maps released tensor names to the module's; "native": the same names."""
    lora_targets: tuple[str, ...]
    """Names of the linear layers inside a decoder layer that a LoRA covers by default"""
    renamed: tuple[tuple[str, str], ...] = ()
    """Keys of `llm_config` that transformers spells otherwise: (released, transformers)"""
    bias: Literal["config", "qkv", "none"] = "config"
    """Biases of attention: as `llm_config.attention_bias` says, or of queries, keys and values alone, or none"""
    qk_norm: bool = False
    """Norms of queries and keys, head by head."""
    fused: bool = False
    """Fused layers: one for queries, keys and values, and one for the MLP's gate and up."""
    windowed: bool = False
    """Sliding window of `llm_config.sliding_window` in every layer."""
    mlp: str = "gated"
    """Key of `ivl.model.decoder.MLPS`."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Values of keys that an `llm_config` may lack."""


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

LLMS: dict[str, LLMFamily] = {
    row.architecture: row
    for row in (
        LLMFamily("InternLM2ForCausalLM", "llama", "internlm2", _LLAMA, renamed=(("bias", "attention_bias"),)),
        LLMFamily("LlamaForCausalLM", "llama", "native", _LLAMA),
        LLMFamily("Qwen2ForCausalLM", "qwen2", "native", _LLAMA, bias="qkv"),
        LLMFamily("Qwen3ForCausalLM", "qwen3", "native", _LLAMA, qk_norm=True, defaults=(("head_dim", 128),)),
        # LoRA on attention alone; the experts' `gate_up_proj` and `down_proj` are targets by name.
        LLMFamily(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            "native",
            _LLAMA[:4],
            qk_norm=True,
            mlp="experts",
        ),
        LLMFamily(
            "Phi3ForCausalLM",
            "phi3",
            "native",
            ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
            bias="none",
            fused=True,
            windowed=True,
            defaults=(("rms_norm_eps", 1e-5),),
        ),
    )
}


def llm_family(architecture: str) -> LLMFamily:
    """Return the family of an architecture. Raises UserError listing the known ones."""
    try:
        return LLMS[architecture]
    except KeyError:
        raise UserError(
            f"llm_config.architectures: {architecture!r} is not a language model this program knows; "
            f"expected one of {', '.join(sorted(LLMS))}"
        ) from None


TOWERS: dict[str, VisionConfig] = {
    "InternViT-300M": VisionConfig(1024, 24, 16, 4096),
    "InternViT-6B": VisionConfig(
        3200, 45, 25, 12800, qkv_bias=False, qk_normalization=True, norm_type="rms_norm", initializer_range=1e-10
    ),
}

# internvl_chat/internvl/conversation.py before 2024-07-19, when one text for all templates replaced them
INTERNLM_SYSTEM = "You are an AI assistant whose name is InternLM (书生·浦语)."
PHI3_SYSTEM = "You are an AI assistant whose name is Phi-3."


@dataclass(frozen=True)
class ReleasedModel:
    """Released checkpoint, known by name."""

    name: str
    """Name as the document spells it."""
    huggingface: str
    """Id on the Hugging Face hub."""
    tower: str
    """Key of TOWERS."""
    llm: str
    """Key of BACKBONES."""
    template: str
    system_message: str | None = None
    """System message of its training; None: its template's. A user's wins over either."""
    multi_turn_images: bool = True
    """Images allowed in several turns of a conversation."""
    video: bool = True
    int8: bool = False
    """Linear layers stored in 8 bits, with their scales; computed in bfloat16 whatever the dtype option."""
    in_document: bool = True
    """Member of the eleven of the reference document: it has a config of its own."""
    modelscope: str = ""
    """Id on ModelScope; empty: the same as on Hugging Face."""
    max_length: int = 2048
    max_tiles: int = 12
    variant_of: str = ""
    """Name of the model with the same dimensions, of a variant: another stage of training, or another layout."""

    def id_on(self, hub: str) -> str:
        """Return the id on `huggingface` or `modelscope`."""
        return self.modelscope if hub == "modelscope" and self.modelscope else self.huggingface

    @property
    def vision(self) -> VisionConfig:
        return TOWERS[self.tower]

    @property
    def backbone(self) -> Backbone:
        return BACKBONES[self.llm]

    @property
    def parameters(self) -> int:
        """Weights of all three parts, from the dimensions."""
        return self._outside_llm + self.backbone.parameters

    @property
    def active_parameters(self) -> int:
        """Weights that a token is multiplied with: of a mixture of experts, those of its own experts alone."""
        return self._outside_llm + self.backbone.active_parameters

    @property
    def _outside_llm(self) -> int:
        """Weights of the tower and the projector."""
        v, width = self.vision, self.backbone.hidden_size
        norm = v.hidden_size * (2 if v.norm_type == "layer_norm" else 1)
        attention = v.hidden_size * (4 * v.hidden_size + 3 * v.qkv_bias + 1 + 2 * v.qk_normalization)
        mlp = v.intermediate_size * (2 * v.hidden_size + 1) + v.hidden_size
        patches = (v.image_size // v.patch_size) ** 2
        embeddings = v.hidden_size * (v.num_channels * v.patch_size**2 + 1 + 1 + patches + 1)
        tower = embeddings + v.num_hidden_layers * (attention + mlp + 2 * norm + 2 * v.hidden_size)
        enters = 4 * v.hidden_size
        projector = 2 * enters + enters * width + width + width * width + width
        return tower + projector


def config_for(row: ReleasedModel) -> dict[str, Any]:
    """Make a config.json with a released model's dimensions, for counting and planning without its files.

    `Config.from_dict` reads it. Loading weights takes the checkpoint's own file, which says more.
    """
    vision = {f.name: getattr(row.vision, f.name) for f in fields(row.vision)}
    stored = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}} if row.int8 else {}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": vision,
        "llm_config": row.backbone.config(),
        "template": row.template,
        "system_message": row.system_message,
        "force_image_size": row.vision.image_size,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": row.max_tiles,
        "torch_dtype": "bfloat16",
        **stored,
    }


def _v1_5(stem: str, tower: str, llm: str, template: str, system_message: str, **options: Any) -> ReleasedModel:
    name = stem.lower().replace("v1-5", "v1_5")
    options |= {"multi_turn_images": False, "video": False, "system_message": system_message}
    return ReleasedModel(name, f"OpenGVLab/{stem}", tower, llm, template, **options)


def _series(family: str, template: str, *sizes: tuple[str, ...], **options: Any) -> tuple[ReleasedModel, ...]:
    """Make models from (size, tower, language model), and a template where it is not the family's."""
    return tuple(
        ReleasedModel(
            f"{family}-{size}".lower(), f"OpenGVLab/{family}-{size}", tower, llm, (*templates, template)[0], **options
        )
        for size, tower, llm, *templates in sizes
    )


_VIT_300M, _VIT_6B = TOWERS

# Templates: the finetuning scripts of OpenGVLab/InternVL (--conv_style).
MODELS: tuple[ReleasedModel, ...] = (
    _v1_5(
        "InternVL-Chat-V1-5",
        _VIT_6B,
        "internlm2-chat-20b",
        "internlm2-chat",
        INTERNLM_SYSTEM,
        modelscope="AI-ModelScope/InternVL-Chat-V1-5",
    ),
    _v1_5(
        "InternVL-Chat-V1-5-Int8",
        _VIT_6B,
        "internlm2-chat-20b",
        "internlm2-chat",
        INTERNLM_SYSTEM,
        modelscope="AI-ModelScope/InternVL-Chat-V1-5-int8",
        int8=True,
    ),
    _v1_5("Mini-InternVL-Chat-2B-V1-5", _VIT_300M, "internlm2-chat-1_8b", "internlm2-chat", INTERNLM_SYSTEM),
    _v1_5("Mini-InternVL-Chat-4B-V1-5", _VIT_300M, "Phi-3-mini-128k-instruct", "phi3-chat", PHI3_SYSTEM),
    *_series(
        "InternVL2",
        "internlm2-chat",
        ("1B", _VIT_300M, "Qwen2-0.5B-Instruct", "Hermes-2"),
        ("2B", _VIT_300M, "internlm2-chat-1_8b"),
        ("4B", _VIT_300M, "Phi-3-mini-128k-instruct", "phi3-chat"),
        ("8B", _VIT_300M, "internlm2_5-7b-chat"),
        ("26B", _VIT_6B, "internlm2-chat-20b"),
        ("40B", _VIT_6B, "Nous-Hermes-2-Yi-34B", "Hermes-2"),
        ("Llama3-76B", _VIT_6B, "Hermes-2-Theta-Llama-3-70B"),
    ),
    *_series(
        "InternVL2_5",
        "internvl2_5",
        ("1B", _VIT_300M, "Qwen2.5-0.5B-Instruct"),
        ("2B", _VIT_300M, "internlm2_5-1_8b-chat"),
        ("4B", _VIT_300M, "Qwen2.5-3B-Instruct"),
        ("8B", _VIT_300M, "internlm2_5-7b-chat"),
        ("26B", _VIT_6B, "internlm2_5-20b-chat"),
        ("38B", _VIT_6B, "Qwen2.5-32B-Instruct"),
        ("78B", _VIT_6B, "Qwen2.5-72B-Instruct"),
        in_document=False,
    ),
    *_series(
        "InternVL3",
        "internvl2_5",
        ("1B", _VIT_300M, "Qwen2.5-0.5B"),
        ("2B", _VIT_300M, "Qwen2.5-1.5B"),
        ("8B", _VIT_300M, "Qwen2.5-7B"),
        ("9B", _VIT_300M, "internlm3-8b-instruct"),
        ("14B", _VIT_300M, "Qwen2.5-14B"),
        ("38B", _VIT_6B, "Qwen2.5-32B"),
        ("78B", _VIT_6B, "Qwen2.5-72B"),
        in_document=False,
    ),
    *_series(
        "InternVL3_5",
        "internvl2_5",
        ("1B", _VIT_300M, "Qwen3-0.6B"),
        ("2B", _VIT_300M, "Qwen3-1.7B"),
        ("4B", _VIT_300M, "Qwen3-4B"),
        ("8B", _VIT_300M, "Qwen3-8B"),
        ("14B", _VIT_300M, "Qwen3-14B"),
        ("38B", _VIT_6B, "Qwen3-32B"),
        ("30B-A3B", _VIT_300M, "Qwen3-30B-A3B"),
        ("241B-A28B", _VIT_6B, "Qwen3-235B-A22B"),
        in_document=False,
    ),
)


# Endings of the repositories of other stages of training, and of transformers' layout. Sources: the model zoo in the
# README of OpenGVLab/InternVL, and the model list of ms-swift.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "InternVL2_5": ("-MPO",),
    "InternVL3": ("-Pretrained", "-Instruct", "-hf"),
    "InternVL3_5": ("-Pretrained", "-Instruct", "-MPO", "-HF"),
}
_DOMAINS = ("DriveLM", "BDD", "Medical", "RS")


def _variants(row: ReleasedModel) -> tuple[ReleasedModel, ...]:
    """Variants of a released model, by name and by id on the hub."""
    owner, _, stem = row.huggingface.partition("/")
    series = stem.partition("-")[0]
    ids = [f"{stem}{ending}" for ending in _ENDINGS.get(series, ())]
    if series in ("InternVL2", "InternVL2_5"):
        ids.append(f"{series}-Pretrain-Models:{stem}-Pretrain")
    if stem == "InternVL2-8B":
        ids.append(f"{stem}-MPO")
    if stem in ("InternVL2-1B", "InternVL2-2B", "InternVL2-4B"):
        ids += [f"Mini-{stem}-DA-{domain}" for domain in _DOMAINS]
    return tuple(
        replace(row, name=name.rpartition(":")[2].lower(), huggingface=f"{owner}/{name}", variant_of=row.name)
        for name in ids
    )


VARIANTS: tuple[ReleasedModel, ...] = tuple(variant for row in MODELS for variant in _variants(row))
"""Variants of MODELS, with the dimensions, template and abilities of their models."""


def find_model(name: str) -> ReleasedModel | None:
    """Return the released model of a name, in any case: `internvl2-2b`, `OpenGVLab/InternVL2-2B@main`.

    A variant (`internvl3-8b-instruct`) is found by its own name. None for everything else, such as another owner's
    copy.
    """
    return _BY_NAME.get(_key(name))


def line_of(config: Config, system_message: str | None = None) -> ReleasedModel | None:
    """Return the model of the V1.5 line that a checkpoint's files show, under any name of its folder.

    The line shares templates with InternVL2 and takes fewer media. None: another line, or the files do not tell.
    `system_message`: that of its conversation.py, which decides where there is one. Else that of its config does, or
    the mark of the line's configs: `transformers_version` null beside the template.
    """
    rows = [row for row in MODELS if not row.video and not row.int8 and row.template == config.template]
    if not rows:
        return None
    if isinstance(name := config.raw.get("release"), str):
        return find_model(name)
    messages = {row.system_message for row in rows}
    version = config.raw.get("transformers_version", "?") is None and "pad2square" in config.raw
    of_line = config.system_message in messages or version if system_message is None else system_message in messages
    if not of_line:
        return None
    width = config.llm.get("hidden_size", 0)
    return min(rows, key=lambda row: abs(row.backbone.hidden_size - width))


def _key(name: str) -> str:
    owner, _, stem = name.lower().partition("@")[0].rpartition("/")
    stem = stem.replace("_", "-").replace(".", "-")
    return stem if owner in ("", "opengvlab", "ai-modelscope") else f"{owner}/{stem}"


_BY_NAME = {
    _key(name): row for row in (*MODELS, *VARIANTS) for name in (row.name, row.huggingface, row.modelscope) if name
}
_BY_NAME["internvl2-76b"] = _BY_NAME["internvl2-llama3-76b"]
