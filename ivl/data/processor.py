"""Processor: tokenizer, template, media and tiles behind one call, the same for training and for inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ivl.config import Config
from ivl.data import collate as collating
from ivl.data import formats, media, template, tiles
from ivl.data.tokenizer import Tokenizer
from ivl.families import ReleasedModel, find_model
from ivl.types import IGNORE, Batch, Conversation, Example, Media, UserError

OnTooLong = Literal["fit", "truncate_text", "drop", "error"]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class TooLong(UserError):
    """A row that `on_too_long: drop` leaves out: to be counted, not to stop a run."""


@dataclass(frozen=True)
class VideoOptions:
    """How a video becomes frames."""

    num_segments: int = 8
    """Frames spread evenly over the video"""
    fps: float | None = None
    """Frames per second of the video instead of `num_segments`"""
    max_frames: int = 256
    """Most frames of one video"""
    sample: Literal["middle", "random"] = "middle"
    """The middle frame of each segment, or any frame of it (in training)"""
    max_tiles: int = 1
    """Most tiles of one frame"""
    frame_prefix: str = "Frame{i}: "
    """What stands before each frame; `Frame-{i}: ` is the other spelling of the releases"""


class Lengths(NamedTuple):
    """Numbers of a row that are known before its pixels."""

    tokens: int
    """Text and image tokens together"""
    tiles: int
    supervised: int
    """Labels that count for the loss; 0 for a prompt"""


@dataclass
class Plan:
    """How a row will be encoded, decided from its text and the headers of its media."""

    conversation: Conversation
    limits: list[int]
    """Most tiles of each image, or of each frame of a video"""
    tiles: list[list[int]]
    """Tiles of each image, or of each frame of a video"""
    ids: list[int]
    labels: list[int]
    notes: list[str] = field(default_factory=list)


class Processor:
    """Rows → examples and batches; token ids → answers. Picklable."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        max_tiles: int | None = None,
        share_tiles: bool = False,
        max_length: int | None = 4096,
        on_too_long: OnTooLong = "fit",
        video: VideoOptions | None = None,
        exif: bool = True,
        compact_boxes: bool = False,
        system_message: str | None = None,
        policy: media.MediaPolicy | None = None,
        released: ReleasedModel | None = None,
    ) -> None:
        """Options as in `from_pretrained`; `released`: what this checkpoint is able to do, where that is known."""
        if max_tiles is not None and max_tiles < config.min_dynamic_patch:
            raise UserError(f"max_tiles: expected at least {config.min_dynamic_patch}, found {max_tiles}")
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length: expected at least 1, found {max_length}")
        self.config = config
        self.tokenizer = tokenizer
        self.template = template.find_template(config.template)
        self.max_tiles = config.max_dynamic_patch if max_tiles is None else max_tiles
        self.share_tiles = share_tiles
        self.max_length = max_length
        self.on_too_long = on_too_long
        self.video = video or VideoOptions()
        self.exif = exif
        self.compact_boxes = compact_boxes
        self.policy = policy or media.MediaPolicy()
        self.released = released
        default = config.system_message if released is None else config.system_message or released.system_message
        self.system_message = default if system_message is None else system_message
        self.stop_ids = [tokenizer.token_id(self.template.end)]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        max_tiles: int | None = None,
        share_tiles: bool = False,
        max_length: int | None = 4096,
        on_too_long: OnTooLong = "fit",
        video: VideoOptions | None = None,
        exif: bool = True,
        compact_boxes: bool = False,
        system_message: str | None = None,
        policy: media.MediaPolicy | None = None,
    ) -> Processor:
        """The processor of a checkpoint: a folder, or a name that `ivl.hub` turns into one.

        Args:
            max_tiles: most tiles of one image, the thumbnail not counted; None: the checkpoint's own limit.
            share_tiles: divide that limit by the number of images of a row, as the reference's trainer does and its
                chat does not.
            max_length: most tokens of one row, text and image tokens together; None: no limit.
            on_too_long: fit lowers the row's tiles, largest image first, then drops the oldest turns;
                truncate_text cuts the end; drop leaves the row out; error stops.
            video: how videos become frames.
            exif: turn pictures upright as their EXIF block says; False: as stored, like the reference.
            compact_boxes: write boxes as `<box>[[...]]</box>`, not as `<box> [[...]] </box>`.
            system_message: for rows without one, instead of the checkpoint's.
            policy: limits of what is opened and fetched.
        """
        from ivl.hub import resolve

        folder = resolve(name_or_path)
        return cls(
            Config.load(folder),
            Tokenizer.load(folder),
            max_tiles,
            share_tiles,
            max_length,
            on_too_long,
            video,
            exif,
            compact_boxes,
            system_message,
            policy,
            find_model(str(name_or_path)),
        )

    # Rows

    def parse(self, row: Any, where: str = "", root: str | Path | None = None) -> Conversation:
        """A row of any format, understood. A Conversation is returned as it is."""
        if isinstance(row, Conversation):
            return row
        size = partial(media.image_size, exif=self.exif, policy=self.policy)
        return formats.parse(row, where, root, size, self.compact_boxes)

    def __call__(
        self,
        row: Any,
        where: str = "",
        root: str | Path | None = None,
        max_tiles: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Example:
        """A row (or a Conversation) → Example. A row without an answer ends where the assistant's begins.

        `where`, `root`: as in `ivl.data.formats.parse`. `max_tiles`: this row's own limit. `generator` draws the
        frames where `video.sample` is random. Raises UserError that begins with the row's `where`.
        """
        conversation = self.parse(row, where, root)
        with _naming(conversation):
            plan = self._plan(conversation, max_tiles)
            pixels = [
                self._pixels(medium, limit, counts, generator)
                for medium, limit, counts in zip(plan.conversation.media, plan.limits, plan.tiles, strict=True)
                if counts
            ]
        S = self.config.image_size
        return Example(
            input_ids=torch.tensor(plan.ids, dtype=torch.int64),
            labels=torch.tensor(plan.labels, dtype=torch.int64),
            tiles=torch.cat([torch.empty((0, 3, S, S), dtype=torch.uint8), *pixels]),
            tiles_per_image=[count for counts in plan.tiles for count in counts],
            conversation=plan.conversation,
            notes=plan.notes,
        )

    def lengths(
        self, row: Any, where: str = "", root: str | Path | None = None, max_tiles: int | None = None
    ) -> Lengths:
        """What the Example will have, from text and headers alone. Arguments and errors as in `__call__`."""
        conversation = self.parse(row, where, root)
        with _naming(conversation):
            plan = self._plan(conversation, max_tiles)
        return Lengths(len(plan.ids), sum(map(sum, plan.tiles)), _supervised(plan.labels))

    def prompt_text(self, conversation: Conversation) -> str:
        """What the model is asked, for people: as it is written down, with marks for media."""
        asked = conversation.as_prompt()
        return template.written(asked, None, self.template, 0, self.system_message, self.video.frame_prefix)

    # Batches and answers

    def collate(self, examples: Sequence[Example], packed: bool = False, multiple_of: int = 1) -> Batch:
        """See `ivl.data.collate.collate`."""
        return collating.collate(examples, self.tokenizer.pad_id, packed, multiple_of)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of an answer: what comes before the token that ends it, without blanks around.

        `<ref>` and `<box>` are kept; bos, eos and padding are left out.
        """
        ids = [int(token) for token in ids]
        end = next((n for n, token in enumerate(ids) if token in self.stop_ids), len(ids))
        skip = [self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id]
        return self.tokenizer.decode(ids[:end], skip=[token for token in skip if token is not None]).strip()

    @staticmethod
    def pixel_values(tiles: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 → float32 with ImageNet's mean and deviation, as the model makes them itself."""
        mean, std = (torch.tensor(v, device=tiles.device).view(3, 1, 1) for v in (MEAN, STD))
        return (tiles.float() / 255 - mean) / std

    # How a row is made to fit

    def _plan(self, conversation: Conversation, max_tiles: int | None) -> Plan:
        self._check_abilities(conversation)
        limit = self.max_tiles if max_tiles is None else max_tiles
        if self.share_tiles:
            images = sum(medium.kind == "image" for medium in conversation.media)
            limit = max(self.config.min_dynamic_patch, limit // max(1, images))
        limits = [limit if medium.kind == "image" else self.video.max_tiles for medium in conversation.media]
        shapes = [self._shape(medium) for medium in conversation.media]
        plan = self._encoded(conversation, shapes, limits)
        if self.max_length is not None and len(plan.ids) > self.max_length:
            plan = self._shortened(plan, shapes)
        if conversation.messages[-1].role == "user":
            plan.labels = [IGNORE] * len(plan.ids)
        elif not _supervised(plan.labels):
            raise UserError(
                "no token is left to train on: "
                + (f"the answer begins after {self.max_length} tokens" if plan.notes else "the answers are empty")
                + "; mend the row or leave it out"
            )
        return plan

    def _check_abilities(self, conversation: Conversation) -> None:
        if self.released is None:
            return
        turns = sum(any(not isinstance(p, str) for p in message.parts) for message in conversation.messages)
        if not self.released.multi_turn_images and turns > 1:
            raise UserError(
                f"{self.released.name} takes images in one turn only, found {turns}; InternVL2 models take them in any"
            )
        if not self.released.video and any(medium.kind == "video" for medium in conversation.media):
            raise UserError(f"{self.released.name} takes no video; InternVL2 models do")

    def _shape(self, medium: Media) -> tuple[int, int, int]:
        """Frames, width and height of a medium, from its header."""
        if medium.kind == "image":
            return (1, *media.image_size(medium.source, self.exif, self.policy))
        v = self.video
        frames = media.video_frame_count(
            medium.source, v.num_segments, v.fps, v.max_frames, medium.start, medium.end, self.policy
        )
        if v.max_tiles == 1:
            return frames, 1, 1
        info = media.video_info(medium.source, self.policy)
        return frames, info.width, info.height

    def _count(self, shape: tuple[int, int, int], limit: int) -> list[int]:
        frames, width, height = shape
        if not self.config.dynamic_image_size:
            return [1] * frames
        low = min(self.config.min_dynamic_patch, limit)
        one = tiles.tile_count(width, height, self.config.image_size, low, limit, self.config.use_thumbnail)
        return [one] * frames

    def _pixels(self, medium: Media, limit: int, counts: list[int], generator: torch.Generator | None) -> Tensor:
        """(N, 3, S, S) uint8 of an image, or of the frames of a video."""
        v = self.video
        if medium.kind == "image":
            images = [media.load_image(medium.source, self.exif, self.policy)]
        else:
            images = media.load_video(
                medium.source, v.num_segments, v.fps, v.max_frames, medium.start, medium.end, v.sample, generator,
                self.policy,
            )  # fmt: skip
        config, S = self.config, self.config.image_size
        cut = [
            tiles.cut(image, S, min(config.min_dynamic_patch, limit), limit, config.use_thumbnail)
            if config.dynamic_image_size
            else tiles.single(image, S, config.pad2square)
            for image in images[: len(counts)]
        ]
        if [len(part) for part in cut] != counts:
            raise UserError(
                f"{media.describe(medium.source)}: {[len(part) for part in cut]} tiles but its header promised "
                f"{counts}; the file changed or is damaged"
            )
        return torch.cat(cut)

    def _encoded(self, conversation: Conversation, shapes: list[tuple[int, int, int]], limits: list[int]) -> Plan:
        counts = [self._count(shape, limit) for shape, limit in zip(shapes, limits, strict=True)]
        ids, labels = template.encode(
            conversation,
            counts,
            self.tokenizer,
            self.template,
            self.config.tokens_per_tile,
            self.system_message,
            self.video.frame_prefix,
        )
        return Plan(conversation, limits, counts, ids, labels)

    def _shortened(self, plan: Plan, shapes: list[tuple[int, int, int]]) -> Plan:
        images = sum(map(sum, plan.tiles)) * self.config.tokens_per_tile
        found = f"{len(plan.ids)} tokens ({images} of them image) but max_length is {self.max_length}"
        if self.on_too_long == "error":
            raise UserError(f"{found}; raise it, lower max_tiles, or choose what to do by on_too_long")
        if self.on_too_long == "drop":
            raise TooLong(found)
        if self.on_too_long == "truncate_text" and plan.conversation.messages[-1].role == "assistant":
            return self._truncated(plan)
        return self._fitted(plan, shapes, found)

    def _truncated(self, plan: Plan) -> Plan:
        """The end cut off. An image that the cut would go through is left out whole, with its tiles."""
        opening, closing = self.tokenizer.token_id("<img>"), self.tokenizer.token_id("</img>")
        cut = self.max_length
        if plan.ids[:cut].count(opening) > plan.ids[:cut].count(closing):
            cut -= 1 + plan.ids[:cut][::-1].index(opening)
        kept = plan.ids[:cut].count(self.tokenizer.context_id) // self.config.tokens_per_tile
        counts = []
        for frames in plan.tiles:
            counts.append([])
            for count in frames:
                if count <= kept:
                    counts[-1].append(count)
                kept -= count
        note = f"text {len(plan.ids)} -> {cut} tokens"
        return replace(plan, tiles=counts, ids=plan.ids[:cut], labels=plan.labels[:cut], notes=[note])

    def _fitted(self, plan: Plan, shapes: list[tuple[int, int, int]], found: str) -> Plan:
        """Fewer tiles, largest image first; where that is not enough, without the oldest turns."""
        whole, dropped = plan, 0
        while True:
            text = len(plan.ids) - sum(map(sum, plan.tiles)) * self.config.tokens_per_tile
            limits = self._lower(shapes, plan.limits, (self.max_length - text) // self.config.tokens_per_tile)
            if limits is not None:
                break
            if len(plan.conversation.messages) <= 2:
                raise UserError(f"{found}, and one turn with the fewest tiles does not fit either; shorten its text")
            removed = plan.conversation.messages[0]
            gone = sum(not isinstance(part, str) for part in removed.parts)
            conversation = replace(plan.conversation, messages=plan.conversation.messages[2:])
            shapes, dropped = shapes[gone:], dropped + 1
            plan = self._encoded(conversation, shapes, plan.limits[gone:])
        before = sum(map(sum, plan.tiles))
        plan = self._encoded(plan.conversation, shapes, limits)
        after = sum(map(sum, plan.tiles))
        plan.notes = [f"tiles {before} -> {after}"] * (after < before)
        plan.notes += [f"dropped {dropped} turn{'s' * (dropped > 1)}"] * (dropped > 0)
        assert len(plan.ids) <= self.max_length < len(whole.ids)
        return plan

    def _lower(self, shapes: list[tuple[int, int, int]], limits: list[int], budget: int) -> list[int] | None:
        """Limits under which all media have at most `budget` tiles; None where there are none."""
        limits = list(limits)
        counts = [sum(self._count(shape, limit)) for shape, limit in zip(shapes, limits, strict=True)]
        stuck: set[int] = set()
        while sum(counts) > budget:
            free = [n for n in range(len(counts)) if n not in stuck]
            if not free:
                return None
            largest = max(free, key=lambda n: counts[n])
            limit, count = limits[largest], counts[largest]
            while limit > self.config.min_dynamic_patch and count == counts[largest]:
                limit -= 1
                count = sum(self._count(shapes[largest], limit))
            if count < counts[largest]:
                limits[largest], counts[largest] = limit, count
            else:
                stuck.add(largest)
        return limits


def _supervised(labels: list[int]) -> int:
    return sum(label != IGNORE for label in labels[1:])


@contextmanager
def _naming(conversation: Conversation) -> Iterator[None]:
    """Errors begin with where the row stands."""
    try:
        yield
    except UserError as error:
        if not conversation.where:
            raise
        raise type(error)(f"{conversation.where}: {error}") from error
