"""Video files for tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(path: Path, frames: int = 30, fps: int = 10, size: tuple[int, int] = (64, 48)) -> None:
    """Frame i is grey of level 8 * i."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 1
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 8 * i % 256, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels)):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)


def write_long_video(path: Path, size: tuple[int, int] = (64, 48), hours: int = 3) -> Path:
    """One frame a second, grey of level 80 times the hour; a few frames are encoded and written again and again."""
    gop = 12
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for hour in range(hours):
            encoder = av.CodecContext.create("mpeg4", "w")
            encoder.width, encoder.height, encoder.pix_fmt = stream.width, stream.height, stream.pix_fmt
            encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1), 1, gop
            frame = av.VideoFrame.from_ndarray(np.full((*reversed(size), 3), 80 * hour, dtype=np.uint8))
            made = [packet for _ in range(gop) for packet in encoder.encode(frame)] + encoder.encode()
            for n in range(3600):
                packet = av.Packet(bytes(made[n % gop]))
                packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1), n % gop == 0
                packet.pts = packet.dts = 3600 * hour + n
                out.mux(packet)
    return path
