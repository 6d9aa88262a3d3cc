"""Options of media: frames of videos, limits of what is opened, limits of downloads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ivl.errors import UserError
from ivl.storage.picture_file import MAX_PIXELS, MAX_SIDE

Sample = Literal["middle", "random"]
Backend = Literal["pyav", "decord"]
Transparency = Literal["drop", "white"]


@dataclass(frozen=True)
class Sampling:
    """Sampling of a video's frames."""

    num_segments: int = 8
    """Number of frames, spread evenly over the video"""
    fps: float | None = None
    """Frames per second of the video instead of `num_segments`"""
    max_frames: int = 256
    """Most frames of one video; where `fps` would take more, they are spread evenly instead"""
    sample: Sample = "middle"
    """Frame of each segment: its middle one, as the released models do, or any one (in training)"""

    def __post_init__(self) -> None:
        if self.num_segments < 1 or self.max_frames < 1:
            raise UserError(
                f"video sampling: num_segments {self.num_segments} and max_frames {self.max_frames} must be at least 1"
            )
        if self.num_segments > self.max_frames:
            raise UserError(f"video sampling: num_segments {self.num_segments} is above max_frames {self.max_frames}")
        if self.fps is not None and not self.fps > 0:
            raise UserError(f"video sampling: fps must be above 0, found {self.fps}")


def frame_text(prefix: str, i: int, seconds: float) -> str:
    """Text before frame `i`, counted from 1, at a time."""
    return prefix.format(i=i, time=f"{seconds:.1f}s")


@dataclass(frozen=True)
class VideoOptions(Sampling):
    """Sampling of a video's frames, and their tiles."""

    max_tiles: int = 1
    """Most tiles of one frame"""
    frame_prefix: str = "Frame{i}: "
    """Text before each frame; `Frame-{i}: ` is the other spelling of the releases. `{time}` is the frame's second in
    the video, as in `Frame{i} ({time}): ` → `Frame1 (0.5s): `"""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.prefix_of(1, 0.0)
        except (KeyError, IndexError, ValueError, AttributeError):
            raise UserError(
                f"video sampling: frame_prefix {self.frame_prefix!r}: expected a text with {{i}} for the number of a "
                "frame, and {time} for its second"
            ) from None
        if self.writes_times and self.sample == "random":
            raise UserError(
                "video sampling: frame_prefix has {time}, and sample is random: the length of a row would differ from "
                "epoch to epoch; take sample middle, or leave {time} out"
            )

    @property
    def writes_times(self) -> bool:
        """True if the times of frames stand in the prompt."""
        return self.prefix_of(1, 0.0) != self.prefix_of(1, 1.0)

    def prefix_of(self, i: int, seconds: float) -> str:
        """Text before frame `i`, counted from 1, at a time."""
        return frame_text(self.frame_prefix, i, seconds)


@dataclass(frozen=True)
class FetchPolicy:
    """Limits of a download. Times in seconds, sizes in bytes."""

    timeout: float = 20.0
    """Longest silence of the server"""
    total_timeout: float = 300.0
    """Longest time of one attempt"""
    max_bytes: int = 512 * 1024 * 1024
    """Largest file that is fetched"""
    max_redirects: int = 5
    """Most redirections that are followed, each checked like a new address"""
    retries: int = 3
    """Further attempts after a time-out, a broken connection, or the answers 429 and 5xx"""
    backoff: float = 0.5
    """Pause before the first further attempt; it doubles each time"""
    allow_private: bool = False
    """Allow addresses that are not public (loopback, private, link-local)"""
    cache_dir: str | None = None
    """Folder of fetched files; None: ~/.cache/ivl/media. A file is fetched once: delete it to fetch it again"""


@dataclass(frozen=True)
class MediaPolicy:
    """Limits and settings of media that are opened."""

    max_pixels: int = MAX_PIXELS
    """Width times height of an image or a frame; a larger one is refused before anything is decoded"""
    max_side: int = MAX_SIDE
    """Longest side of an image in pixels; resizing one of 1 x 80,000,000 would need 100 times its own memory"""
    max_video_pixels: int = 1_000_000_000
    """Pixels of all frames taken from one video; each needs 4 bytes of memory"""
    video_timeout: float = 120.0
    """Seconds that decoding one video may take"""
    video_backend: Backend = "pyav"
    """Decoder of video files: pyav, or decord where it is installed (Linux on x86-64); decord counts frames as the
    container's header does, and does not read AV1"""
    folder_fps: float = 3.0
    """Frames per second that a folder of frames stands for, where a start, an end or a rate is given"""
    transparency: Transparency = "drop"
    """Transparent ground: drop leaves the colour below it, as the reference does (print on transparent ground may be
    black on black); white puts the picture on white"""
    boxes: Literal["stored", "upright"] = "stored"
    """Picture that the boxes of `objects` belong to, where its EXIF block turns it: as it is stored, or upright"""
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    """Limits of downloads"""
