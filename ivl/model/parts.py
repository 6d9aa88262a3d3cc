"""Parts and settings of an InternVL: the type that loading, splitting and quantisation take.

`ivl.model.internvl` builds the parts and computes with them; it calls those files, and they take this class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ivl.architecture.config import Config
from ivl.model.decoder import LanguageModel
from ivl.model.vision import InternViT

ADAPTER = "default"
"""peft's name for the one adapter a model carries"""


class ModelParts(nn.Module):
    """Vision encoder, projector, language model, and the settings that a run gives them."""

    vision_model: InternViT
    mlp1: nn.Sequential
    language_model: LanguageModel

    def __init__(self, config: Config, image_token_id: int = -1, efficient: bool = True) -> None:
        super().__init__()
        self.config = config
        self.image_token_id = image_token_id
        """Id of `<IMG_CONTEXT>`, from a checkpoint's tokenizer files; -1: there are no image tokens"""
        self.eos_ids: list[int] = []
        """Ids that end an answer, from the checkpoint's generation_config.json"""
        self.always_run_vision = False
        """Run a zero tile where a batch has none, so that every process of a sharded run calls the same modules"""
        self.neftune_alpha = 0.0
        """Noise on the embeddings of text in training, by `add_noise`; 0: none"""
        self.lora_start: dict[str, tuple[Tensor, Tensor]] = {}
        """PiSSA: initial (A, B) of each layer, needed to export the update (`ivl.finetune.tune`)"""
        self.is_loaded_in_8bit = self.is_loaded_in_4bit = False
        """True if layers are quantised (`ivl.checkpoint.quantization`); peft reads these names"""
        self.features_projected = False
        """True if the features in a batch are outputs of `mlp1`; False: of the tower"""
        self.efficient = efficient
        """Train in less memory and time, by `ivl.model.efficient`"""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.mlp1.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.mlp1.parameters()).device

    @property
    def vocab_size(self) -> int:
        """V: ids of a batch must be below."""
        return self.language_model.config.vocab_size

    def set_checkpointing(self, vision: bool, language: bool) -> None:
        """Set activation checkpointing: save only layer inputs in training, and recompute the rest in backward."""
        self.vision_model.encoder.checkpointing = vision
        self.language_model.model.checkpointing = language

    def must_run_vision(self) -> bool:
        """True if a batch without tiles runs a zero tile: for gradients of zero, or in step with other processes."""
        if self.always_run_vision:
            return True
        parameters = (*self.vision_model.parameters(), *self.mlp1.parameters())
        return torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
