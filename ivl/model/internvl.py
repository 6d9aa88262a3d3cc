"""InternVL: vision tower, projector, language model. The file to read first.

tiles → `vision_model` → pixel shuffle → `mlp1` → written over the image tokens' embeddings → `language_model` → loss

Shapes: B rows, T tokens of a row, N tiles of the whole batch, S pixels a side of a tile, P image tokens of a tile,
L tokens of a tile in the tower (patches and one class token), G patches a side of a tile, C width of the tower,
D width of the language model, V vocabulary, M supervised tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ivl.checkpoint.quantization import Quantize
from ivl.config import Config
from ivl.families import llm_family
from ivl.finetune.neftune import add_noise
from ivl.model.attention import AttentionKernel, choose_kernel
from ivl.model.decoder import DecoderConfig, LanguageModel
from ivl.model.efficient import install
from ivl.model.image_tokens import check_image_tokens
from ivl.model.loss import Losses, losses, supervised_places
from ivl.model.projector import build_projector, pixel_shuffle
from ivl.model.sequence_layout import layout_of
from ivl.model.vision import InternViT, normalize
from ivl.parallel import device_map as splitting
from ivl.types import Batch, SequenceLayout, UserError, places

if TYPE_CHECKING:
    from ivl.inference.sampling import Answer, FinishReason


@dataclass
class Output(Losses):
    """Result of a forward: the losses where there are labels, logits on request."""

    logits: Tensor | None = None
    """(B, T, V)"""


class InternVL(nn.Module):
    """A chat model of the released layout; module names are those of the released checkpoints."""

    def __init__(
        self,
        config: Config,
        kernel: str = "sdpa",
        image_token_id: int = -1,
        dtype: torch.dtype = torch.float32,
        efficient: bool = True,
    ) -> None:
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
        self.vision_model = InternViT(config.vision, kernel)
        self.language_model = LanguageModel(
            DecoderConfig.from_llm(config.llm, llm_family(config.llm_architecture), kernel)
        )
        self.mlp1 = build_projector(config.projector_width, self.language_model.config.hidden_size)
        if efficient:
            install(self)
        self.to(dtype)

    @classmethod
    def from_config(
        cls,
        config: Config,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        attention: AttentionKernel = "auto",
        image_token_id: int = -1,
        efficient: bool = True,
    ) -> InternVL:
        """Build the model in eval mode with random weights, or, on the device `meta`, with none.

        On `meta`, `auto` means sdpa: name the kernel, or ask `choose_kernel` about the device to come.
        """
        dtype = splitting.as_dtype(dtype)
        with torch.device(device):
            return cls(config, choose_kernel(attention, device, dtype), image_token_id, dtype, efficient).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        attention: AttentionKernel = "auto",
        quantize: Quantize | None = None,
        devices: int | Sequence[str] | None = None,
        device_max_memory: Sequence[str] | None = None,
        device_map: str | Path | Mapping[str, str | int] | None = None,
        needs: splitting.Sizes | None = None,
        offload: bool = True,
        efficient: bool = True,
    ) -> InternVL:
        """Load a released checkpoint, in eval mode: a folder, or a name that `ivl.hub` finds.

        `quantize`: 8 or 4 bits for the linear layers of the language model's blocks. A checkpoint that is stored in 8
        bits stays so, and computes in bfloat16. float32 is taken, with a warning, where the device has no `dtype`.
        `devices`, `device_max_memory`, `device_map`: the model is split over several devices, and `device` does not
        count; see `ivl.parallel.device_map.choose`, also for `needs` and `offload`. `efficient`: `ivl.model.efficient`.
        Raises UserError where files are missing or broken, or a tensor is missing, unexpected or of another shape.
        """
        from ivl.checkpoint.load import load_model

        places = devices, device_max_memory, device_map, needs, offload
        return load_model(cls, name_or_path, dtype, device, attention, quantize, *places, efficient)

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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        tiles: Tensor | None = None,
        tiles_per_row: Tensor | None = None,
        row_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        layout: SequenceLayout | None = None,
        image_at: Tensor | None = None,
        supervised_at: Tensor | None = None,
        features: Tensor | None = None,
        loss_weights: Tensor | None = None,
        return_logits: bool = False,
        loss_chunk: int = 512,
        label_smoothing: float = 0.0,
    ) -> Output:
        """The fields of `ivl.types.Batch`, whose shapes apply; logits on request or where there are no labels.

        `loss_weights` (B, T): how much each supervised token counts. `loss_chunk`: supervised tokens whose logits
        exist at the same time, so memory does not grow with vocabulary x length. `label_smoothing`: share of each
        target that is spread evenly over the vocabulary.
        Raises UserError where image tokens and tiles disagree.
        """
        embeds_BTD = self.embed(input_ids, tiles, tiles_per_row, row_ids, attention_mask, features, image_at)
        if labels is not None and supervised_at is None:
            supervised_at = supervised_places(labels)
        read_M = None if labels is None or return_logits else supervised_at
        if layout is None:
            layout = layout_of(input_ids, attention_mask, position_ids, row_ids, lengths)
        hidden = self._hidden(embeds_BTD, layout, (attention_mask, position_ids, row_ids), read_M)
        output = Output()
        if labels is not None:
            rows = len(input_ids) if tiles_per_row is None else len(tiles_per_row)
            head = self.language_model.lm_head
            settings = (loss_weights, loss_chunk, label_smoothing, supervised_at)
            output = Output(**vars(losses(head, hidden, labels, row_ids, rows, *settings)))
        if labels is None or return_logits:
            output.logits = self.language_model.lm_head(hidden)
        return output

    def _hidden(
        self,
        embeds_BTD: Tensor,
        layout: SequenceLayout | None,
        masks: tuple[Tensor | None, Tensor | None, Tensor | None],
        read_M: Tensor | None,
    ) -> Tensor:
        """Last hidden states, (B, T, D), or those at `read_M` alone, (M, D)."""
        if layout is not None and self.language_model.config.attention != "eager":
            return self.language_model.packed(embeds_BTD, layout.to(embeds_BTD.device, non_blocking=True), read_M)
        hidden_BTD = self.language_model.padded(embeds_BTD, *masks)
        return hidden_BTD if read_M is None else hidden_BTD.flatten(0, 1).index_select(0, read_M)

    def embed(
        self,
        input_ids_BT: Tensor,
        tiles_N3SS: Tensor | None = None,
        tiles_per_row: Tensor | None = None,
        row_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        features_NPC: Tensor | None = None,
        image_at: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of a batch, those of image tokens taken from the tiles in order: (B, T, D).

        `features_NPC`: `tower_features` of all tiles, or `tile_features` (`features_projected`), from a feature cache.
        `image_at`: as in a Batch; None: computed here, which waits for the device.
        """
        size = self.config.image_size
        image_BT = input_ids_BT == self.image_token_id
        if tiles_N3SS is None:
            tiles_N3SS = torch.zeros(0, 3, size, size, dtype=torch.uint8, device=input_ids_BT.device)
        count = len(tiles_N3SS) if features_NPC is None else len(features_NPC)
        if image_at is None:
            patches = (tiles_N3SS.shape[-1] // self.config.vision.patch_size) ** 2
            per_tile = int(patches * self.config.downsample_ratio**2)
            check_image_tokens(image_BT, count, per_tile, tiles_per_row, row_ids_BT)
        embeds_BTD = self.language_model.get_input_embeddings()(input_ids_BT)
        if self.neftune_alpha and self.training:
            # Image tokens' embeddings are written over below, so only text gets noise (as in transformers' trainer).
            embeds_BTD = add_noise(embeds_BTD, self.neftune_alpha, mask_BT, row_ids_BT)
        if count == 0 and not self._must_run_vision():
            return embeds_BTD
        if count == 0:
            features_NPC = None
            # Written to no place, so every parameter of the tower and the projector gets a gradient, and it is zero.
            tiles_N3SS = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=input_ids_BT.device)
        if features_NPC is None:
            features_NPD = self.tile_features(tiles_N3SS)
        else:
            features_NPD = features_NPC if self.features_projected else self.mlp1(features_NPC.to(self.dtype))
        image_at = places(image_BT) if image_at is None else image_at
        features_ID = features_NPD[:count].flatten(0, 1).to(embeds_BTD.dtype)
        if len(image_at) != len(features_ID):
            raise UserError(f"batch: {len(image_at)} image tokens, but {count} tiles have {len(features_ID)}")
        return embeds_BTD.flatten(0, 1).index_copy(0, image_at, features_ID).unflatten(0, image_BT.shape)

    def tile_features(self, tiles_N3SS: Tensor) -> Tensor:
        """Image token embeddings of tiles, uint8 or normalised: (N, P, D)."""
        return self.mlp1(self.tower_features(tiles_N3SS).to(self.dtype))

    def tower_features(self, tiles_N3SS: Tensor) -> Tensor:
        """Tower features of tiles after pixel shuffle, uint8 or normalised: (N, P, C / ratio²)."""
        trained = any(p.requires_grad for p in self.vision_model.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            pixels_N3SS = normalize(tiles_N3SS, self.vision_model.embeddings.patch_embedding.weight.dtype)
            hidden_NLC = self.vision_model(pixels_N3SS, self.config.select_layer)
            grid_NGGC = hidden_NLC[:, 1:].unflatten(1, (tiles_N3SS.shape[-2] // self.config.vision.patch_size, -1))
            return pixel_shuffle(grid_NGGC, self.config.downsample_ratio, self.config.ps_version)

    def generate(self, batch: Batch, max_new_tokens: int = 128, **settings: Any) -> list[Answer]:
        """Answer a padded batch of prompts; the settings of `ivl.inference.generate.generate`."""
        from ivl.inference.generate import generate

        return generate(self, batch, max_new_tokens, **settings)

    def stream(self, batch: Batch, max_new_tokens: int = 128, **settings: Any) -> Generator[int, None, FinishReason]:
        """Answer one prompt, token by token; the settings of `ivl.inference.generate.stream`."""
        from ivl.inference.generate import stream

        return stream(self, batch, max_new_tokens, **settings)

    def _must_run_vision(self) -> bool:
        if self.always_run_vision:
            return True
        parameters = (*self.vision_model.parameters(), *self.mlp1.parameters())
        return torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
