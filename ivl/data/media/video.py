"""Video frame sampling, and decoding of the sampled frames.

Source of the formulas: `get_index` of the released models' README, `get_frame_indices` of OpenGVLab/InternVL,
internvl_chat/internvl/train/dataset.py. The entry point is `ivl.data.media.load.load_video`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ivl.data.media.video_process import DecodeError, Decoder, DecodeTimeout
from ivl.options.media import Backend, Sample, Sampling
from ivl.types import UserError

_ROUNDING = 1e-4
"""Seconds by which time stamps are rounded in a file"""


@dataclass(frozen=True)
class VideoInfo:
    """Frames of a video, their times, and their size in pixels. `fps` is the average over the file."""

    frames: int
    fps: float
    width: int
    height: int
    times: tuple[float, ...] | None = field(default=None, repr=False)
    """Seconds at which each frame appears; None where frame i appears at i / fps"""

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.frames / self.fps if self.times is None else self.times[0] + self.frames / self.fps

    def frame_at(self, seconds: float) -> int:
        """The frame on screen at a time; where frames are evenly spaced, the nearest one, as in the reference.

        Below 0 before the video, `frames` or more after it.
        """
        if self.times is None:
            return round(seconds * self.fps)
        if not 0 <= seconds < self.seconds:
            return -1 if seconds < 0 else self.frames
        return max(0, bisect_right(self.times, seconds + _ROUNDING) - 1)


def release_indices(
    bound: tuple[float, float] | None, fps: float, max_frame: int, first_idx: int = 0, num_segments: int = 32
) -> list[int]:
    """Middle frames of `num_segments` equal parts between the seconds of `bound`, as the released models sample.

    `max_frame` is the last frame's index. Frames repeat where the range is shorter than `num_segments`. A bound that
    begins after the last frame gives descending indices past the end; `load_video` refuses it before.
    """
    start, end = bound or (-100000, 100000)
    first = max(first_idx, round(start * fps))
    last = min(round(end * fps), max_frame)
    segment = float(last - first) / num_segments
    return [int(first + segment / 2 + np.round(segment * i)) for i in range(num_segments)]


def training_indices(
    num_frames: int,
    vlen: int,
    sample: Sample = "middle",
    fix_start: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """One frame of each of `num_frames` equal parts of `vlen` frames, as the reference's training loader samples.

    `fix_start`: that many frames after each part's first, instead of its middle. The last frame is repeated where
    there are fewer than `num_frames`. "random" draws from `generator`.
    """
    edges = np.linspace(0, vlen, min(num_frames, vlen) + 1).astype(int)
    parts = list(pairwise(edges))
    if sample == "random":
        draws = torch.rand(len(parts), generator=generator, dtype=torch.float64).tolist()
        indices = [int(a + draw * (b - a)) for draw, (a, b) in zip(draws, parts)]
    elif fix_start is not None:
        indices = [int(a + fix_start) for a, _ in parts]
    else:
        indices = [int(a + b - 1) // 2 for a, b in parts]
    return indices + indices[-1:] * (num_frames - len(indices))


def fps_indices(output_fps: float, vlen: int, input_fps: float, max_frames: int = -1) -> list[int]:
    """The middle frame of every 1/output_fps seconds, as the reference's training loader samples with `fpsX`.

    `max_frames` above 0 keeps only the first so many. Empty where the video is shorter than half a step.
    """
    step = 1 / output_fps
    seconds = np.arange(step / 2, vlen / input_fps + step / 2, step)
    indices = [int(i) for i in np.around(seconds * input_fps).astype(int) if i < vlen]
    return indices[:max_frames] if max_frames > 0 else indices


def sample_indices(
    info: VideoInfo,
    sampling: Sampling,
    start: float | None = None,
    end: float | None = None,
    generator: torch.Generator | None = None,
    where: str = "video",
) -> list[int]:
    """Frames of a video that `sampling` takes between `start` and `end` seconds; never empty, all inside the video.

    Raises UserError where the range is empty or begins after the video's end.
    """
    first, last = _range(info, start, end, where)
    length = last - first + 1
    count = sampling.num_segments
    if sampling.fps is not None:
        if info.times is None:
            wanted = [first + i for i in fps_indices(sampling.fps, length, info.fps)]
        else:
            wanted = _clock_indices(info, sampling.fps, start, end)
        if sampling.sample == "middle" and 1 <= len(wanted) <= sampling.max_frames:
            return wanted
        count = min(max(len(wanted), 1), sampling.max_frames)
    if sampling.sample == "random":
        return [first + i for i in training_indices(count, length, "random", generator=generator)]
    if sampling.fps is None and info.times is None:
        bound = (-100000 if start is None else start, 100000 if end is None else end)
        return release_indices(bound, info.fps, info.frames - 1, 0, count)
    return release_indices(None, info.fps, last, first, count)


def _clock_indices(info: VideoInfo, fps: float, start: float | None, end: float | None) -> list[int]:
    """Frame on screen in the middle of every 1/fps seconds, for frames that are not evenly spaced."""
    assert info.times is not None, "only for videos with uneven times"
    step = 1 / fps
    last = info.seconds if end is None else min(end, info.seconds)
    return [info.frame_at(float(t)) for t in np.arange(max(start or 0.0, info.times[0]) + step / 2, last, step)]


def _range(info: VideoInfo, start: float | None, end: float | None, where: str) -> tuple[int, int]:
    """First and last frame between two times."""
    seconds = info.seconds
    for name, value in (("start", start), ("end", end)):
        if value is not None and not -1e9 < value < 1e9:
            raise UserError(f"{where}: {name} is {value}; expected seconds within the video's {seconds:.2f}")
    if start is not None and end is not None and end < start:
        raise UserError(f"{where}: end {end} is before start {start}; expected seconds in order")
    first = max(0, info.frame_at(start or 0.0))
    last = info.frames - 1 if end is None else min(info.frame_at(end), info.frames - 1)
    if first > last:
        raise UserError(
            f"{where}: nothing between {start or 0} and {'its end' if end is None else end} seconds; "
            f"the video has {seconds:.2f} seconds ({info.frames} frames)"
        )
    return first, last


_DECODER = Decoder(memory=8 << 30)


class VideoFile:
    """Video file read by `backend`. `where` names it in errors; `timeout` bounds each call, in seconds."""

    def __init__(self, source: Path | bytes, where: str, timeout: float, backend: Backend = "pyav") -> None:
        if backend == "decord" and find_spec("decord") is None:
            raise UserError(
                f"{where}: data.media.video_backend is decord, which is not installed; pip install 'ivl[decord]' "
                "(Linux on x86-64), or use pyav"
            )
        self._source = source if isinstance(source, bytes) else str(source)
        self._key, self._where, self._timeout, self._backend = object(), where, timeout, backend
        self.info, _ = self._ask([])

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """RGB images of these frames, in this order."""
        wanted = sorted(set(indices))
        info, data = self._ask(wanted)
        frame = 3 * info.width * info.height
        images = {
            i: Image.frombytes("RGB", (info.width, info.height), data[n * frame : (n + 1) * frame])
            for n, i in enumerate(wanted)
        }
        return [images[i] for i in indices]

    def _ask(self, indices: list[int]) -> tuple[VideoInfo, memoryview]:
        try:
            answer, data = _DECODER(self._key, self._source, indices, self._timeout, self._backend)
        except DecodeTimeout:
            raise UserError(
                f"{self._where}: decoding did not end within {self._timeout:g} s; where the video plays elsewhere, "
                "raise data.media.video_timeout, else convert it or remove the row"
            ) from None
        except DecodeError as error:
            raise UserError(
                f"{self._where}: {self._backend} cannot read this video ({error}); expected a file that ffmpeg can "
                f"decode, such as H.264 in mp4; convert it or remove the row"
            ) from None
        fps = answer["fps"] if answer["fps"] > 0 else 1.0
        times = answer.get("times")
        times = None if times is None else tuple(times)
        return VideoInfo(answer["frames"], fps, answer["width"], answer["height"], times), data
