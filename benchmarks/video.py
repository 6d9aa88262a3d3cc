"""Frames and time of twenty odd videos by each decoder: PyAV (ours), decord and torchcodec, where they are installed.

    python benchmarks/video.py [--folder DIR] [--repeats 3]

The videos are made: codecs, containers, frame rates, turns, uneven and hidden frames, odd sizes, 10 bits. Frame i is a
picture with a square whose place and grey tell i, so that another frame is told from another conversion of colours.
A cell has the number of frames, then "same" where every pixel is PyAV's, else the largest difference in levels of 255,
then how many frames show another picture (a mean difference above 8, or a frame that the other has not), then the
milliseconds of processor time, of all threads, to open the file and read 8 frames spread over it: the median of the
repeats. Each decoder is asked for one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ivl.data.media.video_reader import DecordReader, PyAVReader, VideoReader

OTHER = 8.0
"""Mean difference in levels from which a frame shows another picture"""


@dataclass(frozen=True)
class Clip:
    """A video to be made."""

    name: str
    codec: str = "libx264"
    title: str = ""
    rate: Fraction = Fraction(25)
    size: tuple[int, int] = (320, 240)
    count: int = 60
    format: str = "yuv420p"
    rotation: int = 0
    seconds: list[float] | None = None
    """Time of each frame, where they are not evenly spaced"""
    options: dict[str, str] = field(default_factory=dict)
    change: Callable[[Path], Path] | None = None
    """What is done to the file afterwards"""


def picture(i: int, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8: a coloured slope, and a square that moves and changes its grey with i."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    pixels = np.stack([x, y, np.full_like(x, 90)], axis=-1)
    side = height // 2
    left = (7 * i) % max(1, width - side)
    pixels[height // 4 : height // 4 + side, left : left + side] = (37 * i) % 256
    return pixels.astype(np.uint8)


def write(clip: Clip, folder: Path) -> Path:
    """Encode a clip; a key frame every 20."""
    path = folder / clip.name
    with av.open(str(path), "w") as out:
        stream = out.add_stream(clip.codec, rate=clip.rate, options=clip.options)
        stream.width, stream.height, stream.pix_fmt = *clip.size, clip.format
        stream.codec_context.gop_size = 20
        if clip.codec in ("libx264", "mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = 2
        if clip.codec in ("mpeg4", "mpeg2video", "msmpeg4", "wmv2", "flv"):
            stream.codec_context.bit_rate = 4_000_000
        if clip.seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if clip.rotation:
            stream.set_display_rotation(clip.rotation)
        for i in range(clip.count if clip.seconds is None else len(clip.seconds)):
            frame = av.VideoFrame.from_ndarray(picture(i, clip.size))
            if clip.seconds is not None:
                frame.pts, frame.time_base = round(1000 * clip.seconds[i]), Fraction(1, 1000)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return path if clip.change is None else clip.change(path)


def cut(path: Path) -> Path:
    """Copy the packets from the key frame at frame 20 on, with an edit list that hides those before frame 30."""
    out_path = path.with_name(f"cut-{path.name}")
    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    with av.open(str(path)) as opened, av.open(str(out_path), "w", options=options) as out:
        video = opened.streams.video[0]
        copy = out.add_stream_from_template(video)
        tick = 1 / (video.average_rate * video.time_base)
        for packet in opened.demux(video):
            if packet.dts is not None and packet.pts >= round(20 * tick):
                packet.pts -= round(30 * tick)
                packet.dts -= round(30 * tick)
                packet.stream = copy
                out.mux(packet)
    return out_path


def fast_start(path: Path) -> Path:
    """Write the header first, and leave the last third of the file out."""
    whole = path.with_name(f"fast-{path.name}")
    with av.open(str(path)) as opened, av.open(str(whole), "w", options={"movflags": "faststart"}) as out:
        copy = out.add_stream_from_template(opened.streams.video[0])
        for packet in opened.demux(opened.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    data = whole.read_bytes()
    whole.write_bytes(data[: 2 * len(data) // 3])
    return whole


def animation(folder: Path) -> Path:
    """GIF with one frame that stays two seconds."""
    stills = [Image.fromarray(picture(i, (160, 120))) for i in range(12)]
    durations = [100] * 6 + [2000] + [100] * 5
    stills[0].save(folder / "pauses.gif", save_all=True, append_images=stills[1:], duration=durations, optimize=False)
    return folder / "pauses.gif"


UNEVEN = [0.04 * i for i in range(40)] + [1.6 + 0.5 * i for i in range(20)]
LATE = [0.4 + 0.04 * i for i in range(60)]
CLIPS = (
    Clip("h264.mp4", title="H.264, 25 a second, B-frames"),
    Clip("ntsc.mp4", title="H.264, 30000/1001 a second", rate=Fraction(30000, 1001)),
    Clip("fast.mp4", title="H.264, 60 a second", rate=Fraction(60)),
    Clip("slow.mp4", title="H.264, 1 a second", rate=Fraction(1)),
    Clip("h264.mkv", title="H.264 in Matroska"),
    Clip("h264.ts", title="H.264 in a transport stream"),
    Clip("h264.flv", title="H.264 in FLV"),
    Clip("h264.avi", title="H.264 with B-frames in AVI"),
    Clip("h264.h264", title="H.264 without a container"),
    Clip("mpeg4.avi", "mpeg4", "MPEG-4 part 2 in AVI"),
    Clip("mpeg2.mpg", "mpeg2video", "MPEG-2 in a program stream"),
    Clip("wmv2.asf", "wmv2", "WMV 2 in ASF"),
    Clip("vp8.webm", "libvpx", "VP8", options={"deadline": "realtime", "cpu-used": "8"}),
    Clip("vp9.webm", "libvpx-vp9", "VP9", options={"deadline": "realtime", "cpu-used": "8"}),
    Clip("av1.mp4", "libsvtav1", "AV1", options={"preset": "10"}),
    Clip("hevc.mp4", "libx265", "H.265", options={"x265-params": "log-level=none"}),
    Clip("deep.mp4", "libx265", "H.265, 10 bits", format="yuv420p10le", options={"x265-params": "log-level=none"}),
    Clip("mjpeg.mov", "mjpeg", "Motion JPEG in QuickTime", format="yuvj420p"),
    Clip("left.mp4", title="H.264, turned by 90 degrees", rotation=90),
    Clip("over.mp4", title="H.264, turned by 180 degrees", rotation=180),
    Clip("uneven.mkv", title="uneven times in Matroska", seconds=UNEVEN),
    Clip("uneven.mp4", title="uneven times in mp4", seconds=UNEVEN),
    Clip("late.mkv", title="a first frame at 0.4 s", seconds=LATE),
    Clip("clip.mp4", title="cut without encoding, 10 frames hidden", change=cut),
    Clip("torn.mp4", title="the last third of the file is missing", change=fast_start),
    Clip("odd.mp4", title="131 x 97 pixels", size=(131, 97), format="yuv444p"),
    Clip("narrow.webm", "libvpx-vp9", "17 x 241 pixels", size=(17, 241)),
    Clip(
        "hd.mp4", title="H.264, 1920 x 1080, 300 frames", size=(1920, 1080), count=300, options={"preset": "ultrafast"}
    ),
)


class TorchcodecReader:
    """torchcodec, with its exact mode of seeking, which counts frames by packets."""

    def __init__(self, source: str) -> None:
        from torchcodec.decoders import VideoDecoder

        self._decoder = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        self.frames = len(self._decoder)

    def read(self, indices: list[int]) -> np.ndarray:
        return self._decoder.get_frames_at(list(indices)).data.numpy()


READERS: dict[str, Callable[[str], VideoReader]] = {
    "av": PyAVReader,
    "decord": DecordReader,
    "torchcodec": TorchcodecReader,  # type: ignore[dict-item]
}


def every_frame(package: str, path: Path) -> np.ndarray:
    """(frames, height, width, 3): all frames in the order of their numbers."""
    reader = READERS[package](str(path))
    return np.stack([reader.read([i])[0] for i in range(reader.frames)])


def milliseconds(package: str, path: Path, repeats: int) -> float:
    """Median processor time to open a file and read 8 frames spread over it."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        reader = READERS[package](str(path))
        reader.read([int((n + 0.5) * reader.frames / 8) for n in range(8)])
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times)


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How frames differ from PyAV's: "same", the largest difference, and the number of other pictures."""
    if ours.shape[1:] != theirs.shape[1:]:
        return f"{theirs.shape[2]} x {theirs.shape[1]} pixels"
    count = min(len(ours), len(theirs))
    gaps = [np.abs(a.astype(np.int16) - b) for a, b in zip(ours, theirs)]
    others = sum(gap.mean() > OTHER for gap in gaps) + max(len(ours), len(theirs)) - count
    alike = max((int(gap.max()) for gap in gaps if gap.mean() <= OTHER), default=0)
    text = f"≤ {alike}" if alike else "same"
    return f"{text}, {others} other" if others else text


def cells(path: Path, packages: list[str], repeats: int) -> list[str]:
    """One cell for each package."""
    found, ours = [], None
    for package in packages:
        try:
            pixels = every_frame(package, path)
            taken = milliseconds(package, path, repeats)
        except Exception as error:  # noqa: BLE001  (each library has errors of its own)
            print(f"{path.name}: {package}: {error}", file=sys.stderr)
            found.append("fails")
            continue
        ours = pixels if package == "av" else ours
        parts = [str(len(pixels)), f"{taken:.1f} ms"]
        if package != "av" and ours is not None:
            parts.insert(1, difference(ours, pixels))
        found.append("; ".join(parts).replace("|", "/"))
    return found


def processor_name() -> str:
    """Name of the processor, as Linux has it."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the videos are written; a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="names of files; all by default")
    options = parser.parse_args(argv)
    packages = [name for name in READERS if find_spec(name)]
    told = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"{told}; Python {platform.python_version()}; {os.cpu_count()} cores of {processor_name()}\n")
    print("| file | what | " + " | ".join("PyAV" if name == "av" else name for name in packages) + " |")
    print("| --- " * (len(packages) + 2) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for clip in CLIPS:
            if options.only and clip.name not in options.only:
                continue
            if clip.codec not in av.codecs_available:
                print(f"| {clip.name} | {clip.title} | PyAV has no {clip.codec} here |" + " |" * (len(packages) - 1))
                continue
            found = cells(write(clip, folder), packages, options.repeats)
            print(f"| {clip.name} | {clip.title} | " + " | ".join(found) + " |", flush=True)
        if not options.only:
            found = cells(animation(folder), packages, options.repeats)
            print("| pauses.gif | GIF, one frame stays 2 s | " + " | ".join(found) + " |")


if __name__ == "__main__":
    main()
