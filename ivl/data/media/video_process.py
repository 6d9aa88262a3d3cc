"""Video decoding in a helper process, so that a damaged file costs a row, not a run.

On damaged files a decoder may crash or never return. There is one helper per process, started with its first video and
ended with it. Requests and answers are lines of JSON, followed by raw bytes where the line gives their number. The
helper imports only numpy and the decoder (`ivl.data.media.video_reader`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from ivl.data.media.video_reader import VideoReader

from ivl.data.workers import signals_held

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from ivl.data.media.video_process import serve; serve()"
)


class DecodeError(Exception):
    """Reason why a video cannot be read."""


class DecodeTimeout(DecodeError):
    """Decoding did not end in time; the file may be sound and the machine slow."""


class Decoder:
    """Client of this process's helper. `memory`: bytes that the helper may allocate."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._opened: object = None
        self._lock = threading.Lock()

    def __call__(
        self, key: object, source: str | bytes, indices: Sequence[int], timeout: float, backend: str = "pyav"
    ) -> tuple[dict[str, Any], memoryview]:
        """Frames, fps, times, width and height of a video, and the RGB bytes of its frames at `indices`.

        The video stays open until a call with another `key`. `timeout` in seconds; `backend`: pyav or decord. Raises
        DecodeError; the next call starts a new helper.
        """
        with self._lock:
            try:
                self._start()
                request: dict[str, Any] = {"indices": list(indices), "memory": self._memory}
                body = b""
                if self._opened is not key:
                    body = source if isinstance(source, bytes) else b""
                    request |= {"source": len(body) if body else source, "backend": backend}
                answer = self._ask(json.dumps(request).encode() + b"\n" + body, time.monotonic() + timeout)
            except BaseException:  # after any fault, the helper's next answer may belong to another request
                self.close()
                raise
            self._opened = key
            return answer

    def close(self) -> None:
        """End the helper."""
        process, self._process, self._opened = self._process, None, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            return
        # A forked loader worker inherits the helper of its parent and needs one of its own
        self._owner, self._opened = os.getpid(), None
        with signals_held():  # Ctrl-C is for this process to handle
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # ffmpeg's remarks, thousands for one bad file
                pipesize=1 << 20,
            )

    def _ask(self, request: bytes, deadline: float) -> tuple[dict[str, Any], memoryview]:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; reading below raises the reason
            self._process.stdin.write(request)
            self._process.stdin.flush()
        header = bytearray()
        while not header.endswith(b"\n"):
            header += self._read(1, deadline)
        answer = json.loads(header)
        if "error" in answer:
            raise DecodeError(answer["error"])
        return answer, memoryview(self._read(answer["bytes"], deadline))

    def _read(self, count: int, deadline: float) -> bytearray:
        assert self._process is not None and self._process.stdout is not None
        data = bytearray(count)
        view, done = memoryview(data), 0
        stream = self._process.stdout.fileno()
        while done < count:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise DecodeTimeout("it did not end in time")
            got = os.readv(stream, [view[done:]])
            if not got:
                code = self._process.wait()
                raise DecodeError(f"it crashed: {signal.Signals(-code).name if code < 0 else f'exit {code}'}")
            done += got
        return data


def serve() -> None:
    """Answer requests in the helper process until its input ends."""
    import resource

    from ivl.data.media.video_reader import open_reader

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not be read as an answer
    reader: VideoReader | None = None
    for line in requests:
        request = json.loads(line)
        with contextlib.suppress(ValueError):  # systems without this limit
            resource.setrlimit(resource.RLIMIT_AS, (request["memory"],) * 2)
        try:
            if "source" in request:
                source = request["source"]
                opened = io.BytesIO(requests.read(source)) if isinstance(source, int) else source
                reader = open_reader(request["backend"], opened)
            assert reader is not None, "the first request names a source"
            _answer(reader, request["indices"], answers)
        except Exception as error:  # noqa: BLE001  (the decoders' own, MemoryError, AssertionError)
            reason = getattr(error, "strerror", None) or str(error)
            lines = [text for text in reason.splitlines() if text.strip()] or [type(error).__name__]
            answers.write(json.dumps({"error": lines[0][-200:]}).encode() + b"\n")
        answers.flush()


def _answer(reader: VideoReader, indices: list[int], answers: BinaryIO) -> None:
    pixels = reader.read(indices or [0])
    _, height, width, _ = pixels.shape
    info: dict[str, Any] = {"frames": reader.frames, "fps": reader.fps, "width": width, "height": height}
    if not indices:
        info["times"] = None if reader.times is None else reader.times.tolist()
    info["bytes"] = pixels.nbytes if indices else 0
    answers.write(json.dumps(info).encode() + b"\n")
    if indices:
        answers.write(pixels.tobytes())
