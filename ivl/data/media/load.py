"""Loading of media: path, URL or bytes → RGB image or sampled video frames, with limits.

The result is an RGB image or a UserError, whatever a file holds. Decoders fail in many ways, so they are called in one
place that turns any failure into one sentence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ivl.data.media.download import cached_path
from ivl.data.media.orientation import StoredImage, orientation_of, stored_image, upright, upright_size
from ivl.data.media.pixels import deep_png, to_rgb
from ivl.data.media.source import HEAD, content, describe, is_url, kind_of, open_source
from ivl.data.media.video import VideoFile, VideoInfo, sample_indices
from ivl.options.media import MediaPolicy, Sampling
from ivl.storage.picture_file import FORMATS, MAX_BYTES, check_jpeg, check_size, open_picture
from ivl.types import UserError

_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}


_DEFAULT = MediaPolicy()


def load_image(source: Any, exif: bool = True, policy: MediaPolicy = _DEFAULT) -> Image.Image:
    """RGB image, upright.

    `source`: a local path, an http(s) URL, a `data:` URI, bytes, or a PIL image. `exif` False leaves the picture as it
    is stored, as the reference implementation does. Alpha is dropped without blending, or the picture put on white
    (`policy.transparency`); 16 bits are scaled to 8, from 12 where no value needs more; of an animation the first
    frame is taken. An EXIF block that cannot be read counts as none.
    Raises UserError naming the source.
    """
    where = describe(source)
    with _opened_image(source, where, policy) as (image, opened):
        return _upright(image, opened, exif, where, policy)


def image_size(source: Any, exif: bool = True, policy: MediaPolicy = _DEFAULT) -> tuple[int, int]:
    """(width, height) of the image that `load_image` returns, from the header alone.

    Raises UserError as `load_image` does, except for faults that only decoding shows.
    """
    where = describe(source)
    with _opened_image(source, where, policy, decode=False) as (image, _):
        return _size(image, exif, where, policy)


def stored_picture(source: Any, policy: MediaPolicy = _DEFAULT) -> StoredImage:
    """Size of an image as it is stored, and its orientation, from the header alone. Raises as `image_size` does."""
    where = describe(source)
    with _opened_image(source, where, policy, decode=False) as (image, _):
        _check_size(image.size, where, policy)
        return stored_image(image)


def image_bytes(source: Any, policy: MediaPolicy = _DEFAULT) -> bytes | None:
    """Bytes of an image's file, not decoded; None for a PIL image. Raises UserError where it cannot be opened."""
    if isinstance(source, Image.Image):
        return None
    image_size(source, policy=policy)  # a download is an image before it is kept
    with open_source(source, policy.fetch, lambda opened: None) as opened:
        return opened.read()


def local_file(source: Any, policy: MediaPolicy = _DEFAULT) -> Path | None:
    """File that an image is read from: its path, or a URL's path in the cache; None where there is none."""
    if not isinstance(source, (str, os.PathLike)) or str(source)[:5].lower() == "data:":
        return None
    return cached_path(source, policy.fetch) if isinstance(source, str) and is_url(source) else Path(source)


def load_video(
    source: Any,
    sampling: Sampling = Sampling(),
    start: float | None = None,
    end: float | None = None,
    generator: torch.Generator | None = None,
    policy: MediaPolicy = _DEFAULT,
) -> list[Image.Image]:
    """RGB frames of a video, in order.

    `source`: as for `load_image`, a folder of frames (in natural order of their names), or a list of images. Animated
    GIF, WebP, PNG and AVIF are read by Pillow, other files by `policy.video_backend`. `start` and `end` cut the video,
    in seconds. `generator` draws the frames where `sampling.sample` is random.
    Raises UserError naming the source.
    """
    where = describe(source)
    with _video(source, where, policy) as video:
        info = _info(video, sampling, start, end)
        indices = sample_indices(info, sampling, start, end, generator, where)
        count = len(set(indices))
        if count * info.width * info.height > policy.max_video_pixels:
            raise UserError(
                f"{where}: {count} frames of {info.width} x {info.height} pixels are more than "
                f"{policy.max_video_pixels} pixels (max_video_pixels); take fewer frames"
            )
        return video.read(indices)


def video_info(source: Any, policy: MediaPolicy = _DEFAULT) -> VideoInfo:
    """Frames, frames per second and size of a video, without decoding more than its first frame."""
    with _video(source, describe(source), policy) as video:
        return video.info


def video_frame_count(
    source: Any,
    sampling: Sampling = Sampling(),
    start: float | None = None,
    end: float | None = None,
    policy: MediaPolicy = _DEFAULT,
) -> int:
    """Number of frames that `load_video` returns. A video file is decoded only where that depends on its length.

    Where it does not, the first bytes of a local source are read: one that is missing or no video is refused.
    """
    where = describe(source)
    if sampling.fps is None:
        _look_at_video(source, where, policy)
        return sampling.num_segments
    with _video(source, where, policy) as video:
        return len(sample_indices(_info(video, sampling, start, end), sampling, start, end, where=where))


def video_times(
    source: Any,
    sampling: Sampling = Sampling(),
    start: float | None = None,
    end: float | None = None,
    policy: MediaPolicy = _DEFAULT,
) -> list[float]:
    """Seconds, from the beginning of the video, of the frames that `load_video` returns."""
    where = describe(source)
    with _video(source, where, policy) as video:
        indices = sample_indices(_info(video, sampling, start, end), sampling, start, end, where=where)
        info = video.timed() if isinstance(video, _Animation) else video.info
        return [i / info.fps if info.times is None else info.times[i] for i in indices]


def _info(
    video: VideoFile | _Animation | _Stills, sampling: Sampling, start: float | None, end: float | None
) -> VideoInfo:
    """VideoInfo of a video; of an animation with the time of each frame, where the options are in seconds."""
    seconds = any(value is not None for value in (start, end, sampling.fps))
    return video.timed() if seconds and isinstance(video, _Animation) else video.info


@contextmanager
def _decoding(where: str, opened: BinaryIO | None = None) -> Iterator[None]:
    """Raise any failure of a decoder as a UserError."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError:
        _refuse(opened, where, f"an image ({', '.join(FORMATS)})")
    except Image.DecompressionBombError as error:
        size = "".join(re.findall(r"\(\d+ pixels\)", str(error)))
        raise UserError(f"{where}: too large {size}; scale it down, or raise data.media.max_pixels") from None
    except Exception as error:  # decoders raise every kind there is
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{where}: a damaged image ({reason[:200]}); copy the file again or remove the row") from error


def _refuse(opened: BinaryIO | None, where: str, expected: str) -> None:
    kind = "another thing"
    if opened is not None:
        opened.seek(0)
        kind = content(opened.read(HEAD))
    raise UserError(f"{where}: expected {expected}, found {kind}")


@contextmanager
def _opened_image(
    source: Any, where: str, policy: MediaPolicy, decode: bool = True
) -> Iterator[tuple[Image.Image, BinaryIO | None]]:
    """Image of a file, its pixels not yet decoded, or a copy of a PIL image. `decode`: the pixels will be decoded, so
    look first for damage in a JPEG that Pillow passes over.
    """
    if isinstance(source, Image.Image):
        _check_size(source.size, where, policy)
        with _decoding(where):
            yield source.copy() if decode else source, None
        return

    def check(opened: BinaryIO) -> None:
        with _decoding(where, opened), open_picture(opened, policy.max_pixels) as image:
            _check_size(image.size, where, policy)

    with open_source(source, policy.fetch, check) as opened, _decoding(where, opened):
        if decode and kind_of(head := opened.read(HEAD)) == "JPEG":
            check_jpeg(head + opened.read(MAX_BYTES))
        opened.seek(0)
        with open_picture(opened, policy.max_pixels) as image:
            yield image, opened


def _check_size(size: tuple[int, int], where: str, policy: MediaPolicy) -> None:
    check_size(size, where, policy.max_pixels, policy.max_side)


def _size(image: Image.Image, exif: bool, where: str, policy: MediaPolicy) -> tuple[int, int]:
    _check_size(image.size, where, policy)
    return upright_size(image.size, orientation_of(image)) if exif else image.size


def _upright(image: Image.Image, opened: BinaryIO | None, exif: bool, where: str, policy: MediaPolicy) -> Image.Image:
    """RGB image without the EXIF block, so that it cannot be turned a second time. Changes `image`."""
    _check_size(image.size, where, policy)
    orientation = orientation_of(image) if exif else 1
    image.load()
    deep = None if opened is None else deep_png(image, opened)
    rgb = upright(to_rgb(image if deep is None else deep, where, policy.transparency), orientation)
    rgb.info = {}
    return rgb


class _Animation:
    """Animated GIF, WebP, PNG or AVIF. The rate is that of the first frame, until `timed` draws all frames."""

    def __init__(self, opened: BinaryIO, where: str, policy: MediaPolicy) -> None:
        self._opened, self._where, self._policy = opened, where, policy
        with _decoding(where, opened):
            self._image = open_picture(opened, policy.max_pixels, _ANIMATED)
            _check_size(self._image.size, where, policy)
            self._image.load()  # WebP has its durations only now
            milliseconds = float(self._image.info.get("duration") or 100)
            frames = getattr(self._image, "n_frames", 1)
            self.info = VideoInfo(frames, 1000 / max(milliseconds, 1), *self._image.size)

    def timed(self) -> VideoInfo:
        """VideoInfo with the time of each frame; all frames are drawn for it."""
        self._check_drawn(self.info.frames - 1)
        ends: list[float] = []
        with _decoding(self._where, self._opened):
            for i in range(self.info.frames):
                self._image.seek(i)
                self._image.load()
                ends.append((ends[-1] if ends else 0.0) + float(self._image.info.get("duration") or 100) / 1000)
        times = np.array([0.0, *ends[:-1]])
        fps = len(ends) / ends[-1]
        even = np.abs(times - np.arange(len(times)) / fps).max() <= 0.5 / fps
        return replace(self.info, fps=fps, times=None if even else tuple(times.tolist()))

    def _check_drawn(self, last: int) -> None:
        painted = (last + 1) * self.info.width * self.info.height  # each frame is drawn over the one before
        if painted > 10 * self._policy.max_video_pixels:
            raise UserError(
                f"{self._where}: {last + 1} frames of {self.info.width} x {self.info.height} pixels are too many to "
                f"draw (10 * max_video_pixels); cut the animation"
            )

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        self._check_drawn(max(indices))
        images = {}
        with _decoding(self._where, self._opened):
            for i in sorted(set(indices)):
                self._image.seek(i)
                images[i] = to_rgb(self._image.copy(), self._where, self._policy.transparency)
        return [images[i] for i in indices]


class _Stills:
    """Images that stand for the frames of a video."""

    def __init__(self, sources: Sequence[Any], where: str, policy: MediaPolicy) -> None:
        if not sources:
            raise UserError(f"{where}: no frames; expected images ({', '.join(sorted(_SUFFIXES))})")
        self._sources, self._policy = sources, policy
        self.info = VideoInfo(len(sources), policy.folder_fps, *image_size(sources[0], policy=policy))

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        images = {i: load_image(self._sources[i], policy=self._policy) for i in set(indices)}
        return [images[i] for i in indices]


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key of a file name: frame2 before frame10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts if p]


def _check_video(opened: BinaryIO, where: str) -> None:
    kind = kind_of(opened.read(HEAD))
    if kind in FORMATS and kind not in _ANIMATED:
        raise UserError(f"{where}: expected a video, found a {kind} image; list it under images")
    if kind != "video" and kind not in _ANIMATED:
        _refuse(opened, where, "a video (mp4, webm, avi, gif, …)")
    opened.seek(0)


def _look_at_video(source: Any, where: str, policy: MediaPolicy) -> None:
    """Refuse a local source that is no video by its first bytes. Nothing is fetched."""
    if isinstance(source, str) and is_url(source):
        return
    if isinstance(source, (list, tuple, Image.Image)) or (
        isinstance(source, (str, os.PathLike)) and os.path.isdir(source)
    ):
        with _video(source, where, policy):
            return
    with open_source(source, policy.fetch, lambda opened: None) as opened:
        _check_video(opened, where)


@contextmanager
def _video(source: Any, where: str, policy: MediaPolicy) -> Iterator[VideoFile | _Animation | _Stills]:
    if isinstance(source, (list, tuple)):
        yield _Stills(source, where, policy)
        return
    if isinstance(source, Image.Image):
        raise UserError(f"{where}: expected a video, found one image; a list of images is a video")
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        images = [p for p in Path(source).iterdir() if p.suffix.lower() in _SUFFIXES and p.name[0] != "."]
        yield _Stills(sorted(images, key=_natural), where, policy)
        return

    with open_source(source, policy.fetch, lambda opened: _check_video(opened, where)) as opened:
        _check_video(opened, where)
        if kind_of(opened.read(HEAD)) in _ANIMATED:
            opened.seek(0)
            yield _Animation(opened, where, policy)
        else:
            opened.seek(0)
            data = Path(opened.name) if hasattr(opened, "name") else opened.read()
            video = VideoFile(data, where, policy.video_timeout, policy.video_backend)
            _check_size((video.info.width, video.info.height), where, policy)
            yield video
