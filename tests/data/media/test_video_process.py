"""The helper that decodes videos: answers, crashes, runs out of time, and is there again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ivl.data.media.video_process import DecodeError, Decoder, DecodeTimeout
from tests.data.videos import write_video


@pytest.fixture
def decoder():
    made = Decoder(memory=4 << 30)
    yield made
    made.close()


def test_a_video_stays_open_until_another_is_asked_for(tmp_path, decoder):
    write_video(tmp_path / "a.mp4", 10)
    write_video(tmp_path / "b.mp4", 20)
    a, b = object(), object()
    info, data = decoder(a, str(tmp_path / "a.mp4"), [], 20)
    assert info["frames"] == 10 and len(data) == 0
    _, data = decoder(a, "not opened again", [0, 3], 20)
    assert len(data) == 2 * 3 * 64 * 48
    assert decoder(b, (tmp_path / "b.mp4").read_bytes(), [1], 20)[0]["frames"] == 20
    assert decoder(a, str(tmp_path / "a.mp4"), [1], 20)[0]["frames"] == 10


def test_after_a_crash_or_a_time_out_the_next_is_read(tmp_path, decoder):
    write_video(tmp_path / "a.mp4")
    path = str(tmp_path / "a.mp4")
    decoder(object(), path, [0], 20)
    os.kill(decoder._process.pid, signal.SIGKILL)
    with pytest.raises(DecodeError, match="crashed: SIGKILL"):
        decoder(object(), path, [0], 20)
    assert decoder(object(), path, [0], 20)[0]["frames"] == 30
    with pytest.raises(DecodeTimeout, match="in time"):
        decoder(object(), path, [0], 0)
    with pytest.raises(DecodeError, match="No such file"):
        decoder(object(), path + ".gone", [0], 20)
    assert decoder(object(), path, [0], 20)[0]["frames"] == 30


def test_the_helper_loads_neither_torch_nor_pillow():
    code = "import sys, ivl.data.media.video_process; print([m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_it_ends_with_its_process(tmp_path):
    write_video(tmp_path / "a.mp4")
    code = (
        "import sys; from ivl.data.media.video_process import Decoder; d = Decoder(4 << 30);"
        "d(object(), sys.argv[1], [0], 20); print(d._process.pid, flush=True)"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    pid = int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"helper {pid} is still there")
