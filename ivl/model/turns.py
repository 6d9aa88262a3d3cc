"""A conversation that goes on: the cache of what was read is kept, and only what is new is read.

Every turn brings the whole conversation as token ids and tiles. Where it begins as what was read before, the cache is
cut there and the rest is read; so an answer is that of a fresh prompt, whatever changed. Features of tiles are kept.

Shapes: T tokens of this call, N tiles, P image tokens of a tile, S pixels a side of a tile, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ivl.model.generate import Choice, FinishReason, Memory, check_finite, read

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL


class Turns:
    """What a model has read of one conversation."""

    def __init__(self, model: InternVL) -> None:
        self.model = model
        self.tokens_read = 0
        """Of the last prompt: those that were not in the cache"""
        self.tiles_read = 0
        """Of the last prompt: those that the tower had not seen"""
        self.finish_reason: FinishReason | None = None
        """Why the last answer ended; None while it goes on, or where it was stopped"""
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self._memory = Memory()
        self._keys: list[int] = []
        """What the cache holds: ids, and for an image token the negative key of its tile"""
        self._features_PD: dict[int, Tensor] = {}
        self._first = self._longest = 0
        """Tokens of the prompt that the cache was begun with, and the most there have been since"""

    @torch.no_grad()
    def answer(
        self,
        input_ids: Sequence[int],
        tiles_N3SS: Tensor,
        max_new_tokens: int,
        eos_ids: Collection[int],
        choose: Choice,
        seed: int = 0,
    ) -> Iterator[int]:
        """The token ids that follow a conversation, as they are made, without the one that ends them.

        Ends at the model's context, too. Raises UserError where logits are not finite.
        """
        language_model = self.model.language_model
        generator = torch.Generator().manual_seed(seed)
        said: list[int] = []
        self.finish_reason = None
        room = language_model.config.max_position_embeddings - len(input_ids)
        logits_1V = self._read_prompt(list(input_ids), tiles_N3SS)
        while True:
            token = int(choose(logits_1V, [said], [generator]))
            if token < 0:
                self.forget()
            check_finite([token], logits_1V.dtype)
            if token in eos_ids:
                self.finish_reason = "stop"
                return
            said.append(token)
            if len(said) == min(max_new_tokens, room):
                self.finish_reason = "length" if len(said) == max_new_tokens else "context"
            yield token
            if self.finish_reason:
                return
            ids_11 = torch.tensor([[token]], device=self.model.device)
            logits_1V = self._read(language_model.get_input_embeddings()(ids_11), [token])

    def _read_prompt(self, ids: list[int], tiles_N3SS: Tensor) -> Tensor:
        keys = self._keys_of(ids, tiles_N3SS)
        same = next((n for n, (a, b) in enumerate(zip(self._keys, keys)) if a != b), min(len(self._keys), len(keys)))
        # The last token is read again even where all is known: its logits are asked for.
        same = min(same, len(keys) - 1)
        if not self._lasts(len(keys)):
            same = 0
        self._cut(same)
        if same == 0:
            self._first, self._longest = len(keys), 0
        self.tokens_read = len(keys) - same
        self._look(keys, tiles_N3SS)
        new = torch.tensor(ids[same:], device=self.model.device)
        embeds_TD = self.model.language_model.get_input_embeddings()(new)
        # A cut may go through a tile: of that one the last features are still to be read.
        images = [key for key in keys if key < 0]
        begun = len(images) - sum(key < 0 for key in keys[same:])
        P = self.model.config.tokens_per_tile
        rest = [self._features_PD[key][max(0, begun - at) :] for at, key in _tiles(images, P) if at + P > begun]
        if rest:
            embeds_TD = embeds_TD.masked_scatter((new == self.model.image_token_id)[:, None], torch.cat(rest))
        return self._read(embeds_TD[None], keys[same:])

    def _read(self, embeds_1TD: Tensor, keys: list[int]) -> Tensor:
        mask_1T = torch.ones(embeds_1TD.shape[:2], dtype=torch.bool, device=embeds_1TD.device)
        try:
            logits_1V = read(self.model.language_model, embeds_1TD, mask_1T, self._memory)
        except BaseException:  # an interruption too: some layers may have read it and others not
            self.forget()
            raise
        self._keys += keys
        self._longest = max(self._longest, len(self._keys))
        return logits_1V

    def _keys_of(self, ids: list[int], tiles_N3SS: Tensor) -> list[int]:
        """Ids, those of image tokens replaced by what tells their tile from others."""
        P, number = self.model.config.tokens_per_tile, 0
        tiles = [-1 - abs(hash(tile.cpu().numpy().tobytes())) for tile in tiles_N3SS]
        keys = []
        for token in ids:
            if token == self.model.image_token_id:
                token, number = tiles[number // P], number + 1
            keys.append(token)
        assert number == P * len(tiles), f"{number} image tokens for {len(tiles)} tiles"
        return keys

    def _look(self, keys: list[int], tiles_N3SS: Tensor) -> None:
        """Features of the tiles that were not seen before; those of tiles that are gone are dropped."""
        P = self.model.config.tokens_per_tile
        order = [key for _, key in _tiles([key for key in keys if key < 0], P)]
        self._features_PD = {key: found for key, found in self._features_PD.items() if key in set(order)}
        new = {key: n for n, key in enumerate(order) if key not in self._features_PD}
        self.tiles_read = len(new)
        if new:
            features_NPD = self.model.tile_features(tiles_N3SS[list(new.values())].to(self.model.device))
            self._features_PD |= dict(zip(new, features_NPD.to(self.model.dtype)))

    def _lasts(self, total: int) -> bool:
        """Whether the cached keys are those that a prompt of `total` tokens would have.

        Beyond a limit the rotary frequencies follow from the length of the prompt (`ivl.model.rotary.RotaryEmbedding`).
        """
        rope = self.model.language_model.config.rope
        if rope.limit is None:
            return True
        if total <= rope.limit:
            return self._longest <= rope.limit
        return rope.kind == "longrope" and self._first > rope.limit

    def _cut(self, length: int) -> None:
        """Keep the first tokens only."""
        if length == 0:
            self._memory, self._keys = Memory(), []
        elif length < len(self._keys):
            memory = self._memory
            memory.cache.crop(length)
            memory.positions_BK = memory.positions_BK[:, :length]
            memory.lengths_B = memory.lengths_B.clamp(max=length)
            self._keys = self._keys[:length]


def _tiles(images: list[int], tokens_per_tile: int) -> list[tuple[int, int]]:
    """(place of its first image token among all, key) of each tile."""
    return [(at, images[at]) for at in range(0, len(images), tokens_per_tile)]
