"""Processor: tokenizer, template, media and tiles in one call, for training and inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ivl.architecture.config import Config
from ivl.architecture.families import ReleasedModel, find_model, line_of
from ivl.architecture.hf_config import read_config
from ivl.data import collate as collating
from ivl.data import truncation
from ivl.data.learnt_turns import nothing_learnt, with_learnt_turns
from ivl.data.media.feature_store import FeatureStore
from ivl.data.media.tiler import ImageTiler, MediaCache
from ivl.data.pairs import EncodedPair, encode_pair
from ivl.data.row_checks import check_abilities, prefix_errors
from ivl.data.rows import formats
from ivl.data.rows.box_frames import BoxFrames
from ivl.data.rows.tools import CALL
from ivl.data.text import template
from ivl.data.text.jinja_template import recognised, thoughts_of
from ivl.data.text.tokenizer import Tokenizer
from ivl.data.truncation import EncodedRow, Shape
from ivl.options import MediaPolicy, ProcessorOptions
from ivl.reasoning import BEGUN, CLOSED
from ivl.system_text import NONE, system_text
from ivl.types import IGNORE, IMAGENET_MEAN, IMAGENET_STD, Batch, Conversation, Example, Stored, UserError


class TooLong(UserError):
    """Error of a row that `on_too_long: drop` leaves out; it is counted and does not stop a run."""


class Lengths(NamedTuple):
    """Lengths of a row, known before its pixels."""

    tokens: int
    """Text and image tokens together"""
    tiles: int
    supervised: int
    """Labels that count for the loss; 0 for a prompt"""
    changes: int = 0
    """Bits of the changes that made the row fit, see `ivl.data.truncation.changes`"""


class Processor:
    """Processor: rows → examples and batches; token ids → answers. Picklable."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        options: ProcessorOptions = ProcessorOptions(),
        released: ReleasedModel | None = None,
        thoughts: template.Thoughts | None = None,
    ) -> None:
        """Make a processor. `released`: abilities of this checkpoint, where they are known; `thoughts`: rules of its
        own chat template, else the template's."""
        tiled, padded = options.dynamic_image_size, options.pad2square
        config = config if tiled is None else replace(config, dynamic_image_size=tiled)
        config = config if padded is None else replace(config, pad2square=padded)
        self.config = config
        self.tokenizer = tokenizer
        row = template.find_template(config.template)
        prefill = config.answer_prefill if options.thinking is None else BEGUN if options.thinking else CLOSED
        self.template = replace(row, prefill=prefill, thoughts=thoughts or row.thoughts)
        self.max_tiles = config.max_dynamic_patch if options.max_tiles is None else options.max_tiles
        self.share_tiles, self.compact_boxes = options.share_tiles, options.compact_boxes
        self.max_length, self.on_too_long, self.learn = options.max_length, options.on_too_long, options.learn
        self.tiler = ImageTiler(config, options)
        self.released = released
        self.line = line_of(config)
        of_config = config.system_message if config.system_turn else NONE
        known = (system_text(options.system_message), of_config, released.system_message if released else None)
        self.system_message = next((text for text in known if text is not None), self.template.system_message)
        self.pairs = False
        """Rows are pairs of answers, for preference tuning; False: a rejected answer is left out"""
        self.answer_room = 0
        """Tokens left free below max_length in a row that has to be shortened"""
        self.features: FeatureStore | None = None
        """Cache of image features, read before pixels are decoded; None: no cache"""
        self.stop_ids = [tokenizer.token_id(self.template.end)]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        policy: MediaPolicy | None = None,
        **options: Any,
    ) -> Processor:
        """Load the processor of a checkpoint: a folder, or a name that `ivl.hub` resolves to one.

        `options`: those of `ivl.options.ProcessorOptions`, such as max_tiles and max_length. `policy`: another name of
        the option `media`.
        """
        options |= {} if policy is None else {"media": policy}
        return cls.load(name_or_path, ProcessorOptions(**options))

    @classmethod
    def load(cls, name_or_path: str | Path, options: ProcessorOptions) -> Processor:
        """Load the processor of a checkpoint, with its options in one."""
        from ivl.hub import resolve

        folder = resolve(name_or_path, weights=False)  # they come once the rows are read
        config = read_config(folder)
        if not config.template:
            config = recognised(folder, config)
        row = template.find_template(config.template)
        release_message = template.release_system_message(folder, row)
        if options.system_message is None and config.system_message is None and config.system_turn:
            options = replace(options, system_message=release_message)
        released = find_model(str(name_or_path))
        processor = cls(config, Tokenizer.load(folder), options, released, thoughts_of(folder, config, row))
        processor.line = line_of(config, release_message)
        return processor

    @property
    def abilities(self) -> ReleasedModel | None:
        """Released model whose abilities this checkpoint has: by its name, else by its files."""
        return self.released or self.line

    # Rows

    def parse(self, row: Any, where: str = "", root: str | Path | None = None) -> Conversation:
        """Parse a row of any format. A Conversation is returned as it is."""
        if isinstance(row, Conversation):
            return row
        frames = BoxFrames(self.tiler.exif, self.tiler.policy)
        conversation = formats.parse(row, where, root, frames.size, self.compact_boxes, frames.reorient)
        if conversation.rejected is not None and not self.pairs:
            unread = (*conversation.unread, "rejected answer (model.objective dpo or mpo reads it)")
            conversation = replace(conversation, rejected=None, unread=unread)
        return replace(conversation, turned_boxes=frames.turned) if frames.turned else conversation

    def __call__(
        self,
        row: Any,
        where: str = "",
        root: str | Path | None = None,
        max_tiles: int | None = None,
        generator: torch.Generator | None = None,
        opened: MediaCache | None = None,
    ) -> Example:
        """Make the Example of a row or a Conversation. A prompt ends where the assistant's answer begins.

        `where`, `root`: as in `ivl.data.rows.formats.parse`. `max_tiles`: limit of this row. `generator` draws the
        frames where `video.sample` is random. `opened`: media of earlier calls, not opened again.
        Raises UserError that begins with the row's `where`.
        """
        conversation = self.parse(row, where, root)
        with prefix_errors(conversation):
            opened = opened or MediaCache()
            if not self._is_pair(conversation):
                return self._example(self._encode_fitting(conversation, max_tiles, opened=opened), generator, opened)
            pair = self._encode_pair(conversation, max_tiles, opened=opened)
            example = self._example(pair.chosen, generator, opened)
            if pair.shares_media:
                example.rejected = self._as_example(pair.rejected, [], [])
            else:
                example.rejected = self._example(pair.rejected, generator, opened)
            example.rejected.shares_tiles = pair.shares_media
            return example

    def _is_pair(self, conversation: Conversation) -> bool:
        """True for a row to be learnt from by its two answers; a prompt has none."""
        return self.pairs and conversation.messages[-1].role == "assistant"

    def _example(self, encoded: EncodedRow, generator: torch.Generator | None, opened: MediaCache) -> Example:
        """Cut the tiles of an encoded row."""
        pixels: list[Tensor] = []
        stored: list[Stored] = []
        for medium, limit, counts in zip(encoded.conversation.media, encoded.limits, encoded.tiles, strict=True):
            if not counts:
                continue
            key = self.tiler.key(medium, limit, self.features) if self.features else None
            features = self.features.get(key, sum(counts)) if self.features and key else None
            if features is None:
                cut = partial(self.tiler.pixels, medium, limit, counts, generator)
                pixels.append(opened.pixels(medium, limit, cut))
            stored.append((key, sum(counts), features))
        return self._as_example(encoded, pixels, stored)

    def _as_example(self, encoded: EncodedRow, pixels: Sequence[Tensor], stored: list[Stored]) -> Example:
        S = self.config.image_size
        return Example(
            input_ids=torch.tensor(encoded.ids, dtype=torch.int64),
            labels=torch.tensor(encoded.labels, dtype=torch.int64),
            tiles=torch.cat([torch.empty((0, 3, S, S), dtype=torch.uint8), *pixels]),
            stored=None if self.features is None else stored,
            tiles_per_image=[count for counts in encoded.tiles for count in counts],
            conversation=encoded.conversation,
            notes=encoded.notes,
        )

    def lengths(
        self,
        row: Any,
        where: str = "",
        root: str | Path | None = None,
        max_tiles: int | None = None,
        probe_urls: bool = True,
    ) -> Lengths:
        """Lengths of a row's Example, from text and headers alone. Arguments and errors as in `__call__`.

        `probe_urls` False: nothing is fetched; media behind a URL count with the most tiles they can have.
        """
        conversation = self.parse(row, where, root)
        with prefix_errors(conversation):
            if self._is_pair(conversation):
                pair = self._encode_pair(conversation, max_tiles, probe_urls)
                return Lengths(pair.num_tokens, pair.num_tiles, pair.num_supervised, truncation.changes(pair.notes))
            encoded = self._encode_fitting(conversation, max_tiles, probe_urls)
        return Lengths(len(encoded.ids), encoded.num_tiles, encoded.num_supervised, truncation.changes(encoded.notes))

    def prompt_text(self, conversation: Conversation) -> str:
        """Prompt text of a conversation for people, with marks for media."""
        prompt = conversation.as_prompt()
        return template.written(prompt, None, self.template, 0, self.system_message, self.tiler.video.frame_prefix)

    # Batches and answers

    def collate(self, examples: Sequence[Example], packed: bool = False) -> Batch:
        """Collate examples into a Batch, see `ivl.data.collate.collate`."""
        return collating.collate(examples, self.tokenizer.pad_id, packed, self.tokenizer.context_id)

    def decode(self, ids: Sequence[int] | Tensor, stop: Sequence[str] = (), prefix: str = "") -> str:
        """Text of an answer, up to the token that ends it, without blanks around.

        `<ref>` and `<box>` stay; bos, eos and padding are left out. `stop`: texts that end an answer; the first of them
        is not part of it. `prefix`: beginning of the answer that stood in the prompt (`Conversation.prefix`).
        """
        text = self._text(ids)
        return (prefix + text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]).strip()

    def answer(self, ids: Sequence[int] | Tensor, stop: Sequence[str] = (), prefix: str = "") -> str:
        """Text of the answer to a prompt: as `decode`, after the row's prefix or the thought that the prompt begins."""
        return self.decode(ids, stop, prefix) if prefix else self.template.begun + self.decode(ids, stop)

    def stopped_by(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """Stopping criterion: a function of an answer's token ids, True if their text contains one of `stop`.

        None where `stop` is empty.
        """
        if "" in stop:
            raise UserError("stop: an empty text would end every answer; remove it")
        return (lambda ids: any(text in self._text(ids) for text in stop)) if stop else None

    def _text(self, ids: Sequence[int] | Tensor) -> str:
        ids = [int(token) for token in ids]
        end = next((n for n, token in enumerate(ids) if token in self.stop_ids), len(ids))
        skip = [self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id]
        return self.tokenizer.decode(ids[:end], skip=[token for token in skip if token is not None])

    @staticmethod
    def pixel_values(tiles: Tensor) -> Tensor:
        """Normalise tiles (N, 3, S, S), uint8 → float32, by ImageNet's mean and deviation, as the model does."""
        mean, std = (torch.tensor(v, device=tiles.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (tiles.float() / 255 - mean) / std

    # Encoding of a conversation within the limits

    def _encode_fitting(
        self,
        conversation: Conversation,
        max_tiles: int | None = None,
        probe_urls: bool = True,
        opened: MediaCache | None = None,
    ) -> EncodedRow:
        if self.abilities is not None:
            check_abilities(conversation, self.abilities, self.released.name if self.released else None)
        if conversation.uses_tools and CALL not in self.tokenizer.added:
            raise UserError(
                f"tools: the vocabulary of this checkpoint has no {CALL}, so its template has no words for them; write "
                "calls and results as texts of the turns, or take a model on Qwen2.5 or Qwen3 such as internvl3-2b"
            )
        conversation = with_learnt_turns(conversation, self.learn)
        limit = self.max_tiles if max_tiles is None else max_tiles
        if self.share_tiles:
            images = sum(medium.kind == "image" for medium in conversation.media)
            limit = max(1, limit // max(1, images))
        most = [limit if medium.kind == "image" else self.tiler.video.max_tiles for medium in conversation.media]
        shape = self.tiler.shape if opened is None else partial(opened.shape, self.tiler.shape)
        encoded = self._encode(conversation, [shape(m, probe_urls) for m in conversation.media], most)
        training = conversation.messages[-1].role == "assistant"
        if self.max_length is not None and len(encoded.ids) > self.max_length:
            encoded = self._shorten(encoded, self.max_length - self.answer_room, training)
        if not training:
            encoded.labels = [IGNORE] * len(encoded.ids)
        elif not encoded.num_supervised:
            cut = any(note.startswith("text") for note in encoded.notes)
            reason = nothing_learnt(conversation, self.learn) or "the answers are empty"
            reason = f"the answer begins after token {self.max_length}" if cut else reason
            raise UserError(f"no token is left to train on: {reason}; mend the row or leave it out")
        return encoded

    def _encode_pair(
        self,
        conversation: Conversation,
        max_tiles: int | None = None,
        probe_urls: bool = True,
        opened: MediaCache | None = None,
    ) -> EncodedPair:
        fit = partial(self._encode_fitting, max_tiles=max_tiles, probe_urls=probe_urls, opened=opened)
        return encode_pair(conversation, fit, self._encode)

    def _encode(self, conversation: Conversation, shapes: Sequence[Shape], most: Sequence[int]) -> EncodedRow:
        counts = [[self.tiler.count(shape, limit)] * shape.frames for shape, limit in zip(shapes, most, strict=True)]
        ids, labels = template.encode(
            conversation,
            counts,
            self.tokenizer,
            self.template,
            self.config.tokens_per_tile,
            self.system_message,
            self.tiler.video.frame_prefix,
            [shape.times for shape in shapes],
        )
        return EncodedRow(conversation, list(shapes), list(most), counts, ids, labels)

    def _shorten(self, encoded: EncodedRow, most: int, training: bool) -> EncodedRow:
        P = self.config.tokens_per_tile
        excess = f"{len(encoded.ids)} tokens ({encoded.num_tiles * P} of them image) but max_length is {most}"
        if self.on_too_long == "error":
            raise UserError(f"{excess}; raise it, lower max_tiles, or choose what to do by on_too_long")
        if self.on_too_long == "drop":
            raise TooLong(excess)
        if self.on_too_long == "truncate_text" and training:
            return truncation.truncated(encoded, most, self.tokenizer, P)
        return truncation.fitted(encoded, most, P, self._encode, self.tiler.count)
