"""Shared types of `data/` and `model/`: Conversation, Example, Batch, UserError.

Shapes: B rows, T tokens, N tiles of the whole batch, S pixels a side of a tile.
`data/` makes these, `model/` reads them; neither imports the other. torch is imported where tensors are made, so that
what reads conversations or answers alone starts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ivl.errors import UserError as UserError
from ivl.errors import first_few as first_few
from ivl.errors import plural as plural
from ivl.errors import printable as printable
from ivl.errors import shortened as shortened
from ivl.errors import text_table as text_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100
"""Label of a position that is not trained on (torch's own default for cross entropy)."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of each colour of ImageNet's pictures, by which tiles are normalised."""

TRUTH = ("answers", "options", "category", "group", "box", "size")
"""Fields of a row that a benchmark's rule scores by, beside the expected answer."""


@dataclass(frozen=True)
class Media:
    """Image or video of a row, not yet opened.

    `source` is a local path, an http(s) URL, a `data:` URI, bytes, or a PIL image (images),
    a folder of frames (videos). `start` and `end` cut a video, in seconds. `fps`, `num_frames` and `max_frames` are its
    own, and go before those of `data.video`.
    """

    kind: Literal["image", "video"]
    source: Any
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None


@dataclass(frozen=True)
class Message:
    """Turn of one speaker. `parts` holds text and media in reading order, so a mark can never be miscounted later.

    `trained`: True if an assistant's message is learnt from; a user's message never is. `marked`: True if its row says
    so itself, which goes before `data.learn`.
    """

    role: Literal["user", "assistant"]
    parts: tuple[str | Media, ...]
    trained: bool = True
    reasoning: str | None = None
    """Thought before an assistant's answer, where the row has it apart; the template writes the marks around it."""
    marked: bool = False

    @property
    def text(self) -> str:
        """Text alone, each medium written as its mark; without a thought that the row has apart."""
        return "".join(p if isinstance(p, str) else f"<{p.kind}>" for p in self.parts)


@dataclass(frozen=True)
class Conversation:
    """Row in the one form of the package; `ivl.data.rows.formats` makes it from every format.

    `messages` alternate, mostly a user's first. A last message by the user is a prompt: the answer is to be generated.
    `system` None means the checkpoint's own system message, an empty string a system turn without words, and
    `ivl.system_text.NONE` no system turn.
    `where` is `file:line` for messages to people; `id` the row's own id where it has one.
    `reference` is the expected answer of a prompt, kept for scoring and never shown to the model.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    id: str | None = None
    where: str = ""
    reference: str | None = None
    source: str = ""
    """Name of the data set (the kind of row) it came from, for scores and losses per source."""
    truth: dict[str, Any] = field(default_factory=dict, hash=False)
    """Fields of the row among TRUTH: for scoring like `reference`, and never shown to the model."""
    unread: tuple[str, ...] = ()
    """Names of the row's keys that are not read, and marks in its texts that have no effect."""
    prefix: str = ""
    """Beginning of the answer to a prompt, as the row has it: the answer goes on from there."""
    turned_boxes: int = 0
    """Number of boxes of `objects` that were turned with their pictures, as EXIF blocks say."""
    rejected: Conversation | None = None
    """The same with a worse answer, for preference tuning: most often only the last message differs."""
    tools: str = ""
    """Text of the tools that may be called, behind the system text"""
    uses_tools: bool = False
    """True if there are tools, or calls and results of them"""
    weight: float = 1.0
    """Weight of the row in the loss: that of its key `weight` times that of its source"""

    @property
    def media(self) -> tuple[Media, ...]:
        """All media in order of appearance."""
        return tuple(p for m in self.messages for p in m.parts if not isinstance(p, str))

    @property
    def question(self) -> str:
        """Text of the last user's turn; empty where there is none."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    def as_prompt(self) -> Conversation:
        """Return the conversation up to the last answer, which becomes the reference."""
        last = self.messages[-1]
        if last.role == "user":
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Conversation(**values | {"messages": self.messages[:-1], "reference": last.text, "rejected": None})


Stored: TypeAlias = "tuple[str | None, int, Tensor | None]"
"""Cache entry of an image or video: key in the feature cache, number of tiles, and features (tiles, P, C) if stored.

A key of None: not to be stored."""


@dataclass
class Example:
    """Row ready for the model.

    The image tokens of `input_ids` are exactly `len(tiles)` times the checkpoint's tokens per tile.
    """

    input_ids: Tensor
    """Token ids, (T,) int64."""
    labels: Tensor
    """Labels, (T,) int64, IGNORE where not trained on."""
    tiles: Tensor
    """Tiles, (N, 3, S, S) uint8, RGB; N is 0 for a row without media."""
    tiles_per_image: list[int]
    """Number of tiles of each image (of each frame of a video), in order; sums to N."""
    conversation: Conversation
    stored: list[Stored] | None = None
    """Cache entry of each image or video, with a feature cache; those with stored features are not among `tiles`."""
    notes: list[str] = field(default_factory=list)
    """Changes that made the row fit (`tiles 12 -> 6`, `dropped 1 turn`)."""
    rejected: Example | None = None
    """The row with its rejected answer, in preference tuning."""
    shares_tiles: bool = False
    """True for a rejected example whose tiles are those of the chosen one, and are not held twice."""
    reference: tuple[float, float] | None = None
    """Negative log-likelihoods of the chosen and the rejected answer by the reference, where they were stored."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, of both answers of a pair."""
        return len(self.input_ids) + (self.rejected.num_tokens if self.rejected else 0)

    @property
    def num_tiles(self) -> int:
        """Number of tiles of all media, those with stored features included; shared ones count once."""
        more = self.rejected.num_tiles if self.rejected and not self.rejected.shares_tiles else 0
        return sum(self.tiles_per_image) + more

    @property
    def num_supervised(self) -> int:
        """Number of labels that count for the loss; the first position has nothing before it to predict it from."""
        more = self.rejected.num_supervised if self.rejected else 0
        return int((self.labels[1:] != IGNORE).sum()) + more


def nonzero_indices(mask_BT: Tensor) -> Tensor:
    """Indices of True in a flattened mask: (places,) int64. Waits for the mask's device."""
    return mask_BT.flatten().nonzero()[:, 0]


def supervised_indices(labels_BT: Tensor) -> Tensor:
    """Flattened indices whose next token is supervised: (M,) int64. Waits for the labels' device."""
    ahead_BT = labels_BT.new_full(labels_BT.shape, IGNORE)
    ahead_BT[:, :-1] = labels_BT[:, 1:]
    return nonzero_indices(ahead_BT != IGNORE)


def _bounds(counts: Sequence[int]) -> Tensor:
    """Where each row begins, and where the last ends: (rows + 1,) int32."""
    import torch

    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


@dataclass
class SequenceLayout:
    """Bounds and positions of rows that follow one another in one sequence, without padding, for attention.

    Made on the host, once a batch; only its tensors go to the device. For rows a, b, c of 3, 4 and 2 tokens:

        one pack, B = 1, T = 12             padded, B = 3, T = 4
        a a a b b b b c c . . .             a a a .
                                            b b b b
                                            c c . .

        sequence      a a a b b b b c c     R = 9 tokens in both cases
        lengths       3     4       2
        positions     0 1 2 0 1 2 3 0 1
        cu_seqlens    0     3       7   9   row i: tokens cu_seqlens[i] up to cu_seqlens[i + 1]
        indices       0 1 2 3 4 5 6 7 8     of the pack; None where it has no padding
                      0 1 2 4 5 6 7 8 9     of the padded batch, flattened

    A row may begin with tokens of the row before it, as both answers of a pair with their prompt. These are computed
    once, for both. Where b shares two tokens with a:

        sequence      a a a b b c c
        lengths       3     2   2           of the tokens that are computed
        shared        0     2   0
        positions     0 1 2 2 3 0 1
        keys          0 1 2 0 1 3 4 5 6     b's queries meet the first two tokens of a, and b's own
        cu_seqlens_k  0     3       7   9
    """

    lengths: tuple[int, ...]
    """Tokens of each row that has any, without shared ones; R in all"""
    positions: Tensor
    """(1, R) int64, from 0 within each row"""
    cu_seqlens: Tensor
    """(rows + 1,) int32: where each row begins, and where the last ends"""
    indices: Tensor | None = None
    """(R,) int64: where these tokens are in a flattened batch with padding; None: there is none"""
    shared: tuple[int, ...] = ()
    """Tokens of each row that are the first of the row before it; empty: no row has any"""
    keys: Tensor | None = None
    """(S,) int64: where in the sequence the keys of each row are; None: where its queries are"""
    cu_seqlens_k: Tensor | None = None
    """(rows + 1,) int32: bounds of rows among `keys`; None: those of the queries"""

    @classmethod
    def of(cls, lengths: Tensor, size: int, packed: bool, shared: Sequence[int] = ()) -> SequenceLayout:
        """The layout of rows of `lengths`: of one pack of `size` tokens, or of rows padded on the right to `size`.

        `shared`: tokens of each row that are the first of the row before it; that one shares none itself.
        """
        import torch

        totals: list[int] = lengths.tolist()
        starts = [sum(totals[:n]) if packed else n * size for n in range(len(totals))]
        rows = [row for row in zip(starts, totals, shared or [0] * len(totals), strict=True) if row[1]]
        counts = tuple(total - before for _, total, before in rows)
        indices = None
        if sum(counts) < size * (1 if packed else len(totals)):
            indices = torch.cat([torch.arange(start + before, start + total) for start, total, before in rows])
        positions = torch.cat([torch.arange(before, total) for _, total, before in rows])[None]
        layout = cls(counts, positions, _bounds(counts), indices)
        if any(shared):
            layout.shared = tuple(before for *_, before in rows)
            begins = layout.cu_seqlens.tolist()
            spans = [torch.arange(begin, end) for begin, end in pairwise(begins)]
            seen = [(spans[n - 1][:before], spans[n]) for n, before in enumerate(layout.shared)]
            layout.keys = torch.cat([part for parts in seen for part in parts])
            layout.cu_seqlens_k = _bounds([total for _, total, _ in rows])
        return layout

    @property
    def max_length(self) -> int:
        """Tokens of the longest row, without shared ones."""
        return max(self.lengths)

    @property
    def max_keys(self) -> int:
        """Keys of the row that has most."""
        return max(map(sum, zip(self.lengths, self.shared))) if self.shared else self.max_length

    @property
    def num_pairs(self) -> int:
        """Squares of the rows' lengths, without what is shared, added up: the work of attention."""
        shared = self.shared or (0,) * len(self.lengths)
        return sum((count + before) ** 2 - before**2 for count, before in zip(self.lengths, shared, strict=True))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> SequenceLayout:
        indices, keys, ends = (None if t is None else fn(t) for t in (self.indices, self.keys, self.cu_seqlens_k))
        return SequenceLayout(self.lengths, fn(self.positions), fn(self.cu_seqlens), indices, self.shared, keys, ends)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceLayout:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SequenceLayout:
        return self._map(lambda t: t.pin_memory())


@dataclass
class Batch:
    """Keywords of the model's forward: `model(**batch)`. Only tensors are passed; `rows` stays behind.

    Padded: B rows, right-padded. Packed: B is 1, rows follow one another, `position_ids` restart at 0 at each.
    """

    input_ids: Tensor
    """Token ids, (B, T) int64."""
    attention_mask: Tensor
    """Mask, (B, T) bool: True where there is a token of a row. Made from lengths, never from token ids."""
    position_ids: Tensor
    """Positions, (B, T) int64, from 0 within each row."""
    labels: Tensor
    """Labels, (B, T) int64, IGNORE where not trained on; the first label of every row is IGNORE."""
    tiles: Tensor
    """Tiles of all rows in order, (N, 3, S, S) uint8."""
    tiles_per_row: Tensor
    """Number of tiles of each row, (rows,) int64 on the CPU."""
    row_ids: Tensor | None = None
    """Row of each token of a pack, (B, T) int64, -1 for padding; None where padded."""
    lengths: Tensor | None = None
    """Tokens of each row, (rows,) int64 on the CPU."""
    layout: SequenceLayout | None = None
    """Layout of the rows as one sequence, from their lengths; None: the model makes it."""
    image_positions: Tensor | None = None
    """Indices of image tokens in the flattened (B, T), (image tokens,) int64.

    They are computed on the host: a device must finish its queue before it can tell their number."""
    supervised_positions: Tensor | None = None
    """Indices in the flattened (B, T) whose next token is supervised, (M,) int64."""
    row_weights: Tensor | None = None
    """Weight of each row in the loss, (rows,) float32; None: all are 1."""
    tile_index: Tensor | None = None
    """Tile of each place for one, in order, where rows share tiles: (sum of tiles_per_row,) int64; None: none do."""
    features: Tensor | None = None
    """Stored features of tiles (`ivl.data.media.feature_store`) that are not among `tiles`, (tiles, P, C)."""
    stored: list[tuple[str | None, int, bool]] = field(default_factory=list)
    """Cache entry of each image in order, with a feature cache: key, number of tiles, True if in `features`."""
    rows: list[Conversation] = field(default_factory=list)
    """Conversation of each row, for messages, pictures and predictions."""
    supervised: list[int] = field(default_factory=list)
    """Number of labels of each row that count for the loss, known without waiting for a device."""
    paired: bool = False
    """True if row 2i is the chosen and row 2i + 1 the rejected answer of pair i."""
    reference: Tensor | None = None
    """Negative log-likelihood of each row by the model that preference tuning began from, (rows,); None: not stored.
    It is not passed to the model."""

    _tensors = (
        "input_ids", "attention_mask", "position_ids", "labels", "tiles", "tiles_per_row", "row_ids", "lengths",
        "layout", "image_positions", "supervised_positions", "row_weights", "tile_index", "features",
    )  # fmt: skip
    _stay = ("tiles_per_row", "lengths")

    def keys(self) -> Iterator[str]:
        return (k for k in self._tensors if getattr(self, k) is not None)

    def __getitem__(self, key: str) -> Tensor:
        return getattr(self, key)

    def __len__(self) -> int:
        """Number of rows (in a packed batch: of rows, not of packs)."""
        return len(self.tiles_per_row)

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of rows, padding not counted."""
        return int((self.attention_mask if self.lengths is None else self.lengths).sum())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        moved: dict[str, Any] = {k: fn(getattr(self, k)) for k in self.keys() if k not in self._stay}
        unmoved = {k: getattr(self, k) for k in (*self._stay, "stored", "rows", "supervised", "paired")}
        reference = None if self.reference is None else fn(self.reference)
        return Batch(**moved, **unmoved, reference=reference)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())


def row_names(rows: Sequence[Conversation]) -> str:
    """List rows by file, line and id, for messages."""
    names = [f"{row.where} ({row.id})" if row.id and row.where else row.where or row.id or "?" for row in rows]
    return printable(first_few(names), " ")
