"""Video readers: frames of a file by number, as a player shows them; PyAV, or decord.

Runs in the process of `ivl.data.media.video_process` and imports neither torch nor Pillow.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

_SEEKABLE = frozenset(("mov", "matroska", "avi", "flv", "asf", "mpegts"))
"""Containers whose packets have the same time stamps after a seek; others are decoded from their beginning"""


class VideoReader(Protocol):
    """Open video. Frames are numbered in the order in which a player shows them."""

    frames: int
    fps: float
    """Average over the file; 0 where it is not known"""
    times: np.ndarray | None
    """(frames,) seconds at which each frame appears; None where frame i appears at i / fps"""

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """(len(indices), height, width, 3) uint8 RGB; `indices` in ascending order."""


def open_reader(backend: str, source: str | BinaryIO) -> VideoReader:
    """Reader of a file's path or content. Raises what the library raises."""
    return DecordReader(source) if backend == "decord" else PyAVReader(source)


class PyAVReader:
    """PyAV. Packets are listed once, without decoding them; a frame is decoded from the key frame before it.

    The header's number of frames is not trusted: frames that an edit list hides (a clip cut without encoding it anew)
    are not counted, nor are those that are missing from the file. A damaged frame is shown as players show it: the one
    before it stays.
    """

    def __init__(self, source: str | BinaryIO) -> None:
        self._source = source
        self._open()
        self._marks: list[int] = []
        """Time stamp of each frame, or its number where packets have no time stamps"""
        self._keys: list[tuple[int, int]] = []
        """Time stamp and decoding time stamp of each key frame"""
        self._numbered = not self._list_packets()
        kinds = set(self._container.format.name.split(","))
        self._seekable = not self._numbered and not kinds.isdisjoint(_SEEKABLE)
        stamps = self._list_frames() if self._numbered else self._marks
        if not stamps:
            raise ValueError("no frame can be decoded")
        self.frames = len(stamps)
        self.fps, self.times = self._clock(np.array(stamps, np.int64))

    def read(self, indices: Sequence[int]) -> np.ndarray:
        pixels = [self._pixels(self._frame_on_screen(self._marks[i])) for i in indices]
        return np.stack(pixels)

    # Position: frames are decoded in order from the last seek

    def _open(self) -> None:
        import av

        if not isinstance(self._source, str):
            self._source.seek(0)
        # `file:` keeps ffmpeg from taking a name with a colon for another protocol
        place = f"file:{self._source}" if isinstance(self._source, str) else self._source
        options: dict[str, Any] = {"options": {"protocol_whitelist": "file"}}
        if int(av.__version__.partition(".")[0]) < 19:  # later ones take any bytes for a title
            options["metadata_errors"] = "ignore"
        self._container = av.open(place, "r", **options)
        if not self._container.streams.video:
            raise ValueError("it has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # loader workers are the parallel ones
        self._restart()

    def _restart(self) -> None:
        self._decoding = self._decoded()
        self._count = 0
        self._last: tuple[int, Any] | None = None
        self._next: tuple[int, Any] | None = None

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _decoded(self) -> Iterator[Any]:
        """Frames from here on. Damaged packets are passed over."""
        import av

        # The video ends where ffmpeg cannot demux any further
        with contextlib.suppress(av.error.InvalidDataError, av.error.EOFError, av.error.OSError):
            for packet in self._container.demux(self._stream):
                with contextlib.suppress(av.error.InvalidDataError):
                    yield from packet.decode()
            return
        with contextlib.suppress(av.error.FFmpegError):
            yield from self._stream.decode(None)

    def _advance(self) -> None:
        """Make the next frame the last one."""
        self._last = self._peek()
        self._next = None

    def _peek(self) -> tuple[int, Any] | None:
        if self._next is None and (frame := next(self._decoding, None)) is not None:
            self._next = (self._count if self._numbered or frame.pts is None else frame.pts, frame)
            self._count += 1
        return self._next

    def _frame_on_screen(self, mark: int) -> Any:
        """Frame of this mark, or the one that is still on screen then."""
        key = bisect_right(self._keys, mark, key=lambda pair: pair[0]) - 1
        before = self._keys[key][0] if key >= 0 else None
        ahead = self._seekable and before is not None and self._last is not None and before > self._last[0]
        if self._last is None or self._last[0] > mark or ahead:
            self._seek(key)
            if (first := self._peek()) is None or first[0] > mark:  # the container's index was wrong
                self._reopen()
        while (self._last is None or self._last[0] < mark) and (following := self._peek()) is not None:
            if self._last is not None and following[0] > mark:
                break
            self._advance()
        if self._last is None:
            raise ValueError("no frame can be decoded")
        return self._last[1]

    def _seek(self, key: int) -> None:
        import av

        if not self._seekable or key < 0:
            self._reopen()
            return
        try:
            self._container.seek(self._keys[key][1], stream=self._stream)
        except av.error.FFmpegError:
            self._reopen()
        else:
            self._restart()

    # List of frames, and their times

    def _list_packets(self) -> bool:
        """Fill marks and keys from the packets. Returns True if each packet has its time stamp."""
        import av

        marks, known = set(), True
        with contextlib.suppress(av.error.FFmpegError):
            for packet in self._container.demux(self._stream):
                if not packet.size:
                    continue
                if packet.pts is None:
                    known = False
                    break
                if packet.is_keyframe:
                    self._keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
                if not packet.is_discard:
                    marks.add(packet.pts)
        self._marks = sorted(marks)
        self._keys.sort()
        self._reopen()
        return known

    def _list_frames(self) -> list[int]:
        """Fill marks by decoding all frames. Returns their time stamps."""
        self._keys, stamps = [], []
        for number, frame in enumerate(self._decoded()):
            stamps.append(frame.pts)
            self._marks = list(range(number + 1))
        if any(stamp is None for stamp in stamps) or stamps != sorted(set(stamps)):
            rate = self._rate() * float(self._stream.time_base or 0)
            stamps = [round(number / rate) if rate else number for number in self._marks]
        self._reopen()
        return stamps

    def _rate(self) -> float:
        return float(self._stream.average_rate or self._stream.guessed_rate or 0)

    def _clock(self, stamps: np.ndarray) -> tuple[float, np.ndarray | None]:
        """Average frames per second; and the time of each frame, where they are not evenly spaced from 0."""
        times = stamps * float(self._stream.time_base or 0)
        # The clock begins with the first stream; some containers count a lone stream's decoding delay
        alone = self._numbered or len(self._container.streams) == 1
        start = None if alone else self._container.start_time
        times = times - (times[0] if start is None else min(start / 1_000_000, times[0]))
        return _paced(times, self._rate())

    def _pixels(self, frame: Any) -> np.ndarray:
        """(height, width, 3) RGB of the first frame's size, turned as the file says."""
        if not hasattr(self, "_size"):
            self._size = (frame.width, frame.height)
        pixels = frame.reformat(*self._size, format="rgb24").to_ndarray()
        return np.rot90(pixels, round(frame.rotation / 90) % 4)


class DecordReader:
    """decord. Frames are those of the container's list of packets."""

    def __init__(self, source: str | BinaryIO) -> None:
        import decord

        self._reader = decord.VideoReader(source, ctx=decord.cpu(0), num_threads=1)
        self.frames = len(self._reader)
        times = self._reader.get_frame_timestamp(range(self.frames))[:, 0]
        self.fps, self.times = _paced(np.asarray(times, np.float64), float(self._reader.get_avg_fps()))

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self._reader.get_batch(list(indices)).asnumpy()


def _paced(times: np.ndarray, fps: float) -> tuple[float, np.ndarray | None]:
    """Frames per second, by the header or by the times; and the times, where they are not evenly spaced."""
    count = len(times)
    if _even(times, fps):
        return fps, None
    if count < 2 or times[-1] <= times[0]:
        return fps, None
    last = float(np.median(np.diff(times)))  # how long the last frame is shown is not written down everywhere
    fps = count / (float(times[-1] - times[0]) + last)
    return fps, None if _even(times, fps) else times


def _even(times: np.ndarray, fps: float) -> bool:
    """True if each frame is at most half a frame off its time by the rate."""
    return fps > 0 and bool(np.abs(times - np.arange(len(times)) / fps).max() <= 0.5 / fps)
