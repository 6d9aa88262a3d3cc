"""InternVL: vision tower, projector, language model. The file to read first.

tiles → `vision_model` → pixel shuffle → `mlp1` → written over the image tokens' embeddings → `language_model` → loss

Shapes: B rows, T tokens of a row, N tiles of the whole batch, S pixels a side of a tile, P image tokens of a tile,
L tokens of a tile in the tower (patches and one class token), G patches a side of a tile, C width of the tower,
D width of the language model, V vocabulary, M supervised tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivl.architecture.config import Config
from ivl.architecture.families import llm_family
from ivl.finetune.neftune import add_noise
from ivl.model.attention import choose_kernel
from ivl.model.decoder import DecoderConfig, LanguageModel
from ivl.model.efficient import install
from ivl.model.image_tokens import check_image_tokens
from ivl.model.loss import CHUNK, Output, losses, supervised_indices
from ivl.model.moe.experts import RouterLoads
from ivl.model.parts import ModelParts
from ivl.model.projector import build_projector, pixel_shuffle
from ivl.model.sequence_layout import layout_of
from ivl.model.vision import InternViT, normalize
from ivl.options import AttentionKernel, Quantize
from ivl.parallel.devices import as_dtype
from ivl.types import Batch, SequenceLayout, UserError, nonzero_indices

if TYPE_CHECKING:
    from ivl.inference.sampling import Answer, FinishReason
    from ivl.parallel.device_map import Sizes


class InternVL(ModelParts):
    """A chat model of the released layout; module names are those of the released checkpoints."""

    def __init__(
        self,
        config: Config,
        kernel: str = "sdpa",
        image_token_id: int = -1,
        dtype: torch.dtype = torch.float32,
        efficient: bool = True,
    ) -> None:
        super().__init__(config, image_token_id, efficient)
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
        dtype = as_dtype(dtype)
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
        needs: Sizes | None = None,
        offload: bool = True,
        efficient: bool = True,
    ) -> InternVL:
        """Load a released checkpoint, in eval mode, by its folder or name: `ivl.checkpoint.load.load_model`."""
        from ivl.checkpoint.load import load_model

        spread = devices, device_max_memory, device_map, needs, offload
        return load_model(cls.from_config, name_or_path, dtype, device, attention, quantize, *spread, efficient)

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
        image_positions: Tensor | None = None,
        supervised_positions: Tensor | None = None,
        row_weights: Tensor | None = None,
        tile_index: Tensor | None = None,
        features: Tensor | None = None,
        loss_weights: Tensor | None = None,
        return_logits: bool = False,
        loss_chunk: int = CHUNK,
        label_smoothing: float = 0.0,
        return_router_load: bool = False,
    ) -> Output:
        """The fields of `ivl.types.Batch`, whose shapes apply; logits on request or where there are no labels.

        `loss_weights` (B, T): how much each supervised token counts, times its row's `row_weights`. `loss_chunk`:
        supervised tokens whose logits exist at the same time, so memory does not grow with vocabulary x length.
        `label_smoothing`: share of each target that is spread evenly over the vocabulary. `return_router_load`: count
        how tokens, padding left out, go to the experts of a mixture (`ivl.model.moe.experts.balancing_loss` takes it).
        Raises UserError where image tokens and tiles disagree.
        """
        language = self.language_model
        embeds_BTD = self.embed(
            input_ids, tiles, tiles_per_row, row_ids, attention_mask, features, image_positions, tile_index
        )
        if labels is not None and supervised_positions is None:
            supervised_positions = supervised_indices(labels)
        read_M = None if labels is None or return_logits else supervised_positions
        if layout is None or (layout.shared and read_M is None):  # all logits: of shared prompts in each row
            layout = layout_of(input_ids, attention_mask, position_ids, row_ids, lengths)
        loads = RouterLoads() if return_router_load else None
        if layout is not None and language.config.attention != "eager":
            layout = layout.to(embeds_BTD.device, non_blocking=True)
            hidden = language.packed(embeds_BTD, layout, read_M, loads)
        else:
            hidden = language.padded(embeds_BTD, attention_mask, position_ids, row_ids, read_M, loads)
        output = Output()  # hidden: (B, T, D), or of the positions that are read alone, (M, D)
        if labels is not None:
            rows = len(input_ids) if tiles_per_row is None else len(tiles_per_row)
            settings = (loss_weights, loss_chunk, label_smoothing, supervised_positions, row_weights)
            output = losses(language.lm_head, hidden, labels, row_ids, rows, *settings)
        if labels is None or return_logits:
            output.logits = language.lm_head(hidden)
        output.router_load = loads.stacked() if loads is not None else None
        return output

    def embed(
        self,
        input_ids_BT: Tensor,
        tiles_N3SS: Tensor | None = None,
        tiles_per_row: Tensor | None = None,
        row_ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        features_NPC: Tensor | None = None,
        image_positions: Tensor | None = None,
        tile_index: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of a batch, those of image tokens taken from the tiles in order: (B, T, D).

        `features_NPC`: `tower_features` of all tiles, or `tile_features` (`features_projected`), from a feature cache.
        `image_positions`, `tile_index`: as in a Batch; the first is computed here where None, and waits for the device.
        """
        image_BT = input_ids_BT == self.image_token_id
        images, size = tiles_N3SS if features_NPC is None else features_NPC, self.config.image_size
        count = 0 if images is None else len(images)
        if image_positions is None:
            per_tile = self.config.tokens_of_tile(size if tiles_N3SS is None else tiles_N3SS.shape[-1])
            places_for_tiles = count if tile_index is None else len(tile_index)
            check_image_tokens(image_BT, places_for_tiles, per_tile, tiles_per_row, row_ids_BT)
        embeds_BTD = self.language_model.get_input_embeddings()(input_ids_BT)
        if self.neftune_alpha and self.training:
            # Image tokens' embeddings are written over below, so only text gets noise (as in transformers' trainer).
            embeds_BTD = add_noise(embeds_BTD, self.neftune_alpha, mask_BT, row_ids_BT)
        if count == 0 and not self.must_run_vision():
            return embeds_BTD
        if count == 0:
            # Written to no place, so every parameter of the tower and the projector gets a gradient, and it is zero.
            features_NPC, tiles_N3SS = None, input_ids_BT.new_zeros(1, 3, size, size, dtype=torch.uint8)
        if features_NPC is None:
            assert tiles_N3SS is not None, "there are tiles or features"
            features_NPD = self.tile_features(tiles_N3SS)
        else:
            features_NPD = features_NPC if self.features_projected else self.mlp1(features_NPC.to(self.dtype))
        image_positions = nonzero_indices(image_BT) if image_positions is None else image_positions
        if tile_index is not None and count:  # rows that share tiles
            features_NPD, count = features_NPD.index_select(0, tile_index), len(tile_index)
        features_ID = features_NPD[:count].flatten(0, 1).to(embeds_BTD.dtype)
        if len(image_positions) != len(features_ID):
            raise UserError(f"batch: {len(image_positions)} image tokens, but {count} tiles have {len(features_ID)}")
        return embeds_BTD.flatten(0, 1).index_copy(0, image_positions, features_ID).unflatten(0, image_BT.shape)

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
