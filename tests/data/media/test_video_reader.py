"""Videos are decoded as a player shows them: hidden, missing and unevenly spaced frames, turned ones, many containers.

Frame i is grey of level 4 * i, so that a frame's level is its number.
"""

from __future__ import annotations

from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ivl.data.media import video as framing
from ivl.data.media.load import load_video, video_info
from ivl.data.media.video import VideoInfo, sample_indices
from ivl.options import MediaPolicy, Sampling
from ivl.types import UserError

STEP = 4
EXACT = {"libx264": {"qp": "0"}, "libvpx-vp9": {"lossless": "1"}}
"""Options of encoders without loss"""


def write(path: Path, codec: str = "libx264", count: int = 60, seconds: list[float] | None = None, **options) -> Path:
    """A video at 10 frames a second, or with a frame at each of `seconds`; a key frame every 20."""
    rotation = options.pop("rotation", None)
    with av.open(str(path), "w", **options) as out:
        stream = out.add_stream(codec, rate=25 if codec == "mpeg2video" else 10, options=EXACT.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 20
        if codec in ("libx264", "mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = 2
        if codec in ("mpeg4", "mpeg2video"):
            stream.codec_context.qmin = stream.codec_context.qmax = 1
        if seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV writes no turns")
            stream.set_display_rotation(rotation)
        for i in range(count if seconds is None else len(seconds)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), STEP * i, dtype=np.uint8))
            if seconds is not None:
                frame.pts, frame.time_base = round(1000 * seconds[i]), Fraction(1, 1000)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return path


def clip(source: Path, path: Path, key: float, start: float) -> Path:
    """A clip from second `start`, its packets copied from the key frame at `key`: an edit list hides those before."""
    with (
        av.open(str(source)) as opened,
        av.open(str(path), "w", options={"use_editlist": "1", "avoid_negative_ts": "disabled"}) as out,
    ):
        video = opened.streams.video[0]
        copy = out.add_stream_from_template(video)
        for packet in opened.demux(video):
            if packet.dts is not None and packet.pts * video.time_base >= key:
                packet.pts -= round(start / video.time_base)
                packet.dts -= round(start / video.time_base)
                packet.stream = copy
                out.mux(packet)
    return path


def every_frame(path: Path) -> list[int]:
    video = framing.VideoFile(path, str(path), 60)
    return numbers(video.read(range(video.info.frames)))


def numbers(images: list[Image.Image]) -> list[int]:
    return [round(float(np.asarray(image).mean()) / STEP) for image in images]


def test_a_clip_that_was_cut_without_encoding(tmp_path):
    path = clip(write(tmp_path / "a.mp4"), tmp_path / "clip.mp4", key=2.0, start=3.0)
    with av.open(str(path)) as opened:
        assert opened.streams.video[0].frames == 40, "as the header says"
    assert video_info(path).frames == 30
    assert every_frame(path) == list(range(30, 60))
    assert numbers(load_video(path, Sampling(3), start=1.0, end=2.0)) == [41, 44, 48]


SECONDS = [0.1 * i for i in range(20)] + [2.0, 3.0, 4.0, 5.0]


def test_seconds_are_those_of_the_clock(tmp_path):
    """Frames 20 to 23 appear at the seconds 2 to 5."""
    path = write(tmp_path / "a.mkv", seconds=SECONDS)
    info = video_info(path)
    assert info.frames == 24 and info.times == pytest.approx(SECONDS)
    assert set(numbers(load_video(path, Sampling(4), start=3, end=4))) == {21, 22}
    assert set(numbers(load_video(path, Sampling(2), start=3.2, end=3.8))) == {21}, (
        "frame 21 is on the screen until second 4"
    )
    assert numbers(load_video(path, Sampling(3), end=0.35)) == [0, 1, 2]
    assert numbers(load_video(path, Sampling(fps=1))) == [5, 15, 20, 21, 22], "the middle of each second"
    assert numbers(load_video(path, Sampling(fps=1), start=2, end=4)) == [20, 21]
    assert every_frame(path) == list(range(24))
    assert numbers(load_video(path, Sampling(4))) == [2, 8, 14, 19], (
        "without seconds, frames are spread as in the reference"
    )
    with pytest.raises(UserError, match="nothing between 9 and"):
        load_video(path, start=9)


def test_evenly_spaced_frames_follow_the_reference(tmp_path):
    """Time stamps rounded to milliseconds, and a first frame that comes late, are no other rate."""
    for name, shift in (("a.mkv", 0.0), ("b.mkv", 0.4)):
        path = write(tmp_path / name, seconds=[shift + i / 24 for i in range(48)])
        assert video_info(path).times is None
        assert numbers(load_video(path, Sampling(4), start=0.5, end=1.5)) == [15, 21, 27, 33]


def test_times_of_frames_choose_frames():
    info = VideoInfo(4, 1.0, 8, 8, times=(0.0, 1.0, 5.0, 6.0))
    assert info.seconds == 4 and VideoInfo(4, 2.0, 8, 8).seconds == 2
    for start, end, wanted in ((0, 0.5, {0}), (1, 3, {1}), (None, 1, {0, 1}), (0.99999, 1, {1})):
        assert set(sample_indices(info, Sampling(8), start, end)) == wanted


def test_a_header_that_promises_too_many_frames(tmp_path):
    path = write(tmp_path / "a.mp4", options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: int(0.7 * len(data))])
    found = video_info(path).frames
    assert 10 <= found < 60
    assert every_frame(path)[:-1] == list(range(found - 1)), "the last one may be there in part"


def test_a_turned_video(tmp_path):
    """Phones store video lying, with a turn in the header."""
    path = write(tmp_path / "a.mp4", rotation=90)
    info = video_info(path)
    assert (info.width, info.height) == (48, 64) == load_video(path, Sampling(1))[0].size


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.flv", "libx264"),
        ("a.avi", "libx264"),
        ("b.avi", "mpeg4"),
        ("a.h264", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.webm", "libvpx-vp9"),
        ("b.mp4", "libsvtav1"),
    ],
)
def test_every_frame_of_every_container(tmp_path, name, codec):
    """In order and at random, with frames that are decoded before those that they are shown after."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = write(tmp_path / name, codec)
    assert video_info(path).frames == 60 and video_info(path).times is None
    assert every_frame(path) == pytest.approx(list(range(60)), abs=0 if codec in EXACT else 1)
    assert numbers(load_video(path, Sampling(3))) == pytest.approx([10, 30, 49], abs=1)
    assert numbers(load_video(path.read_bytes(), Sampling(3))) == pytest.approx([10, 30, 49], abs=1)


def test_decord_is_an_option(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    policy = MediaPolicy(video_backend="decord")
    if find_spec("decord"):
        assert numbers(load_video(path, Sampling(3), policy=policy)) == pytest.approx([10, 30, 49], abs=1)
    monkeypatch.setattr(framing, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.mp4: data\.media\.video_backend is decord, .*pip install 'ivl\[decord\]'"):
        load_video(path, policy=policy)
    assert len(load_video(path)) == 8


def test_animations_with_uneven_durations(tmp_path):
    stills = [Image.new("RGB", (16, 16), (STEP * i,) * 3) for i in range(6)]
    path = tmp_path / "a.gif"
    stills[0].save(path, save_all=True, append_images=stills[1:], duration=[100, 100, 100, 2000, 100, 100])
    assert numbers(load_video(path, Sampling(2), start=1.0, end=2.0)) == [3, 3]
    assert numbers(load_video(path, Sampling(3))) == [0, 2, 3]


def test_recorded_cases(shared):
    folder = shared / "cases/data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    assert video_info(folder / "clip_copy.mp4").frames == 77
    assert len(load_video(folder / "clip_copy.mp4")) == len(load_video(folder / "av1.mp4")) == 8
    info = video_info(folder / "vfr.mp4")
    assert info.times is not None
    chosen = sample_indices(info, Sampling(8), 3, 4)
    assert {info.times[i] for i in chosen} == {3.0, 4.0}
