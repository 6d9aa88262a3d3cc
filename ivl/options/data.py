"""Options of data: rows, their processing, and batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ivl.errors import UserError
from ivl.options.media import MediaPolicy, VideoOptions

OnTooLong = Literal["fit", "truncate_text", "drop", "error"]
Learn = Literal["all", "last_answer", "marked"]
Resize = Literal["exact", "fast"]


@dataclass(frozen=True)
class FileLimits:
    """Limits of files of rows, in memory and on disk."""

    max_row_bytes: int = 64 << 20
    """Bytes of the longest row; a longer one is a problem."""
    max_expansion: float = 200.0
    """Most times its size to which a compressed file may expand; 256 MiB are always allowed."""

    def __post_init__(self) -> None:
        if self.max_row_bytes < 1 or not self.max_expansion >= 1:
            raise UserError(
                f"data.file_limits: expected numbers of at least 1, found max_row_bytes {self.max_row_bytes} and "
                f"max_expansion {self.max_expansion}"
            )


@dataclass(frozen=True)
class Source:
    """Source of rows. Give repeat or ratio to all sources, or to none."""

    path: str
    """A file of rows (jsonl, json, parquet, csv, tsv), a folder or a pattern (*) of them, a meta file of several, or a
    data set's name, as OWNER/NAME:SUBSET:SPLIT on Hugging Face; #N after it takes N rows."""
    name: str = ""
    """Its name in losses and scores per source; a row's own `source` wins."""
    repeat: float | None = None
    """Times that each row is seen in an epoch; 0.1 is a tenth of the rows, another tenth each epoch."""
    ratio: float | None = None
    """Share of the epoch's rows, relative to the other sources."""
    loss_weight: float = 1.0
    """Weight of this source's token losses, times a row's own `weight`; rows are seen as often as before."""
    media_root: str | None = None
    """Folder that this source's relative media paths start from."""
    max_tiles: int | None = None
    """Most tiles of an image of this source."""
    columns: dict[str, str] | None = None
    """Our key → the files' own, such as {query: question, response: answer, images: image}."""


@dataclass(frozen=True)
class RowOptions:
    """Rows: their files, and where their media are."""

    train: str | list[str] | None = None
    """Training rows: files, folders, OpenGVLab meta files, or names of data sets; NAME#N takes N rows."""
    mixture: list[Source] | None = None
    """Several sources of training rows, each with its share of an epoch, instead of `train`."""
    val: str | list[str] | None = None
    """Files of held-out rows: loss and answers."""
    val_fraction: float | None = None
    """Hold out this share of the training rows where `val` is not given."""
    test: str | list[str] | None = None
    """Files for `test`."""
    predict: str | list[str] | None = None
    """Files for `predict`; rows need no response."""
    split: str | None = None
    """Rows for `predict` instead of files: `run-validation` takes those that the run of `--ckpt_path` held out (its
    `val`, or its share by `val_fraction`); a run's folder takes that run's."""
    task: str | None = None
    """A benchmark to answer instead (`score` has the list). Its tiles, lengths and greedy decoding come with it, save
    what is typed on the command line."""
    task_root: str = "data"
    """Folder of the benchmark's official files."""
    media_root: str | None = None
    """Where relative media paths start. Default: the folder of the file they stand in."""
    columns: dict[str, str] | None = None
    """Our key → the key or column that all files of rows have instead, such as {query: question, response: answer}."""
    file_limits: FileLimits = field(default_factory=FileLimits)
    """Limits of files of rows: bytes of a row, and what a compressed file may become."""


@dataclass(frozen=True)
class ProcessorOptions:
    """Processing of a row: its length, tiles and pixels."""

    max_length: int | None = 4096
    """Most tokens of a row, image tokens included (of fit, validate and test). Unset: no limit."""
    learn: Learn = "all"
    """Answers that are learnt from: all of a row, last_answer, or those marked in it (`loss: true` of a turn). What a
    turn says itself goes before."""
    max_tiles: int | None = None
    """Most tiles of an image, thumbnail not counted. Default: the checkpoint's."""
    share_tiles: bool = False
    """Divide max_tiles by the number of images of a row, as the official trainer does; `chat` does not."""
    dynamic_image_size: bool | None = None
    """false makes one tile of each image. Default: as the checkpoint says."""
    pad2square: bool | None = None
    """Pad an image of one tile to a square, instead of stretching it. Default: as the checkpoint says."""
    on_too_long: OnTooLong = "fit"
    """Treatment of a row above its limit: fit lowers tiles, largest image first, then drops the oldest turns;
    truncate_text cuts the end (of a prompt, which needs its end: as fit); drop leaves the row out; error stops."""
    video: VideoOptions = field(default_factory=VideoOptions)
    """Sampling of frames from videos."""
    media: MediaPolicy = field(default_factory=MediaPolicy)
    """Limits of what is opened and fetched: pixels, frames, times, sizes, addresses."""
    resize: Resize = "exact"
    """exact makes the reference's pixels; fast takes about half the time, and a pixel in some hundreds is a level
    off."""
    exif: bool = True
    """Turn pictures upright as their EXIF block says; false: as stored, like the reference."""
    compact_boxes: bool = False
    """Write boxes as `<box>[[...]]</box>`, not as `<box> [[...]] </box>`."""
    system_message: str | Literal[False] | None = None
    """For rows without one, instead of the checkpoint's: a text, `none` (or false) for no system turn, or `r1` for the
    thinking prompt of InternVL3.5. Unset, or null: the checkpoint's."""
    thinking: bool | None = None
    """true begins each answer to a prompt with a thought, false with an empty one. Default: as the checkpoint says."""

    def __post_init__(self) -> None:
        for name in ("max_tiles", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, found {value}")
        choices = {"on_too_long": OnTooLong, "resize": Resize, "learn": Learn}
        for name, values in ((name, get_args(choice)) for name, choice in choices.items()):
            if (value := getattr(self, name)) not in values:
                raise UserError(f"{name}: expected one of {', '.join(values)}, found {value!r}")


@dataclass(frozen=True)
class DataOptions(ProcessorOptions, RowOptions):
    """Rows from files, made into batches by the checkpoint's own processor."""

    batch_size: int | None = None
    """Rows per batch and process, where rows are not packed. Default: 8."""
    eval_batch_size: int | None = None
    """Rows per batch and process in validation. Default: batch_size."""
    packing: bool | None = None
    """Rows follow one another in sequences of at most pack_tokens, instead of being padded to the longest of a batch.
    Default: yes, unless batch_size or group_by_length says how to pad."""
    pack_tokens: int | None = None
    """Most tokens of a pack. Default: max_length; twice that for pairs of answers."""
    pack_tiles: int | None = None
    """Most tiles of a pack. Default: no limit."""
    group_by_length: bool = False
    """Batches that are padded hold rows of like length."""
    max_prompt_length: int | None = None
    """Most tokens of a prompt in predict, where a typed --data.max_length means it too. Default: the model's
    context."""
    on_error: Literal["error", "skip"] = "error"
    """A row that cannot be used stops the run, or is skipped: in training it is left out and listed in `report`; in
    prediction its line says the error instead of an answer."""
    max_bad: float = 0.05
    """Largest share of rows that may be skipped."""
    report: str | None = None
    """File that lists the training rows that were left out, and why."""
    probe_urls: bool = False
    """Fetch media behind URLs before training, so that their sizes are known; otherwise they count with the most tiles
    they can have, and are fetched when their turn comes."""
    shuffle: bool = True
    """A new order of the training rows in each epoch; false: as they stand, for a curriculum."""
    feature_cache: str | None = None
    """Folder that keeps what a frozen vision encoder makes of each image, for later epochs and runs."""
    feature_cache_gb: float = 100.0
    """Most disk of that folder, in gigabytes."""
    num_workers: int | None = None
    """Loader processes. Default: at most four, and in training more where rows are waited for, up to one less than a
    process has cores."""
    seed: int = 0
    """Seed of the order of rows and of random choices inside them."""

    @property
    def is_packed(self) -> bool:
        """True if rows are packed: as `packing` says, or by default unless another option asks for padding."""
        return self.packing if self.packing is not None else self.batch_size is None and not self.group_by_length

    @property
    def rows_per_batch(self) -> int:
        return self.batch_size or 8

    @property
    def eval_rows_per_batch(self) -> int:
        return self.eval_batch_size or self.rows_per_batch

    @property
    def tokens_per_pack(self) -> int:
        """Most tokens of a pack. Raises UserError where neither of two options has a number."""
        if (tokens := self.pack_tokens or self.max_length) is None:
            raise UserError("data.pack_tokens: not given; expected a number, since data.max_length is null")
        return tokens

    @property
    def holds_out(self) -> bool:
        """True if some rows are held out of training."""
        return bool(self.val or self.val_fraction)
