"""Prefix cache of one conversation: a prompt is read from where it differs from the last.

Every turn brings the whole conversation as token ids and tiles. Where it begins as what was read before, the cache is
cut there and the rest is read. So an answer is that of a fresh prompt, whatever changed. Features of tiles are kept.

Shapes: T tokens, N tiles, P image tokens of a tile, S pixels a side of a tile, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ivl.architecture.config import Config
from ivl.inference import decoding
from ivl.inference.kv_cache import KVCache
from ivl.model.decoder import LanguageModel


class TileModel(Protocol):
    """Parts of `InternVL` that are used here."""

    config: Config
    language_model: LanguageModel
    image_token_id: int

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def tile_features(self, tiles_N3SS: Tensor) -> Tensor: ...


class PrefixCache:
    """Keys of one conversation in slot 0 of a KV cache, and the features of its tiles."""

    def __init__(self) -> None:
        self.cache = KVCache()
        self.tokens_read = 0
        """Tokens of the last prompt that were not in the cache"""
        self.tiles_read = 0
        """Tiles of the last prompt whose features were not known"""
        self._keys: list[int] = []
        """Contents of the cache: token ids, and for an image token the negative hash of its tile"""
        self._features_PD: dict[int, Tensor] = {}
        self._first = self._longest = 0
        """Tokens of the prompt that the cache was begun with, and the most there have been since"""

    def forget(self) -> None:
        """Drop everything. The cache's tensors stay, and are zero."""
        self.cache.clear(0, 0)
        self._keys, self._features_PD = [], {}
        self._first = self._longest = 0

    def read(self, model: TileModel, input_ids_T: Tensor, tiles_N3SS: Tensor) -> Tensor:
        """Read a prompt as far as it is new. Returns the logits (1, V) after its last token."""
        ids = input_ids_T.tolist()
        keys = self._keys_of(model, ids, tiles_N3SS)
        same = next((n for n, (a, b) in enumerate(zip(self._keys, keys)) if a != b), min(len(self._keys), len(keys)))
        # The last token is read again even where all is known: its logits are asked for.
        same = min(same, len(keys) - 1)
        if not self._serves(model, len(keys)):
            same = 0
        if same == 0:
            self._first = self._longest = len(keys)
        self.tokens_read = len(keys) - same
        self._see(model, keys, tiles_N3SS)
        new_T = torch.tensor(ids[same:]).to(model.device, non_blocking=True)
        embeds_TD = model.language_model.get_input_embeddings()(new_T)
        # A cut may go through a tile: the last features of that one are still to be read.
        images = [key for key in keys if key < 0]
        begun = len(images) - sum(key < 0 for key in keys[same:])
        P = model.config.tokens_per_tile
        rest = [self._features_PD[key][max(0, begun - at) :] for at, key in _tiles(images, P) if at + P > begun]
        if rest:
            embeds_TD = embeds_TD.masked_scatter((new_T == model.image_token_id)[:, None], torch.cat(rest))
        self._keys = keys[:same]
        logits_1V = self._append(model, embeds_TD[None], same)
        self._keys = keys
        self._longest = max(self._longest, len(keys))
        return logits_1V

    def _append(self, model: TileModel, embeds_1TD: Tensor, start: int) -> Tensor:
        self.cache.reserve(1, start + embeds_1TD.shape[1] + 1)
        if start == 0:
            return decoding.prefill(model.language_model, embeds_1TD, [embeds_1TD.shape[1]], self.cache, [0])
        return decoding.append(model.language_model, embeds_1TD, self.cache, 0, start)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Note that these tokens are fed to the row."""
        self._keys = [*self._keys, *token_ids]
        self._longest = max(self._longest, len(self._keys))

    def _keys_of(self, model: TileModel, ids: list[int], tiles_N3SS: Tensor) -> list[int]:
        """Return the ids, image tokens replaced by the negative hash of their tile."""
        P, number = model.config.tokens_per_tile, 0
        tiles = [-1 - abs(hash(tile.cpu().numpy().tobytes())) for tile in tiles_N3SS]
        keys = []
        for token in ids:
            if token == model.image_token_id:
                token, number = tiles[number // P], number + 1
            keys.append(token)
        assert number == P * len(tiles), f"{number} image tokens for {len(tiles)} tiles"
        return keys

    def _see(self, model: TileModel, keys: list[int], tiles_N3SS: Tensor) -> None:
        """Make the features of the tiles that are new; drop those of tiles that are gone."""
        P = model.config.tokens_per_tile
        order = [key for _, key in _tiles([key for key in keys if key < 0], P)]
        self._features_PD = {key: features for key, features in self._features_PD.items() if key in set(order)}
        new = {key: n for n, key in enumerate(order) if key not in self._features_PD}
        self.tiles_read = len(new)
        if new:
            features_NPD = model.tile_features(tiles_N3SS[list(new.values())].to(model.device))
            self._features_PD |= dict(zip(new, features_NPD.to(model.dtype)))

    def _serves(self, model: TileModel, total: int) -> bool:
        """Return True if the cached keys are those of a prompt of `total` tokens.

        Beyond a limit the rotary frequencies follow from the length of the row (`ivl.model.rotary`).
        """
        rope = model.language_model.config.rope
        if rope.limit is None:
            return True
        if total <= rope.limit:
            return self._longest <= rope.limit
        return rope.kind == "longrope" and self._first > rope.limit


def _tiles(images: list[int], tokens_per_tile: int) -> list[tuple[int, int]]:
    """Return (index of its first image token among all, key) of each tile."""
    return [(at, images[at]) for at in range(0, len(images), tokens_per_tile)]
