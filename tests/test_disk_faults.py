"""Disks that are full, cannot be written, or are no folders: commands go on without a cache, or end with one line."""

from __future__ import annotations

import errno
import gzip
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its first import: not one test's own)
import pytest
import torch
from safetensors.torch import save_file

from ivl.__main__ import main
from ivl.data import cache
from ivl.data.index import index_file
from ivl.data.row_files import row_file
from ivl.storage.files import atomic_file, atomic_path, disk_fault, write_text
from tests.commands.test_export import write_run
from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_rows(folder / "data", 4)
    plain = folder / "data/train.jsonl"
    (folder / "data/train.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    write_run(folder / "run", folder / "model")
    answers = '{"id": "1", "prompt": "What?", "response": "blue", "answers": ["blue"]}\n'
    (folder / "answers.jsonl").write_text(answers)
    return folder


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file above `limit` bytes can be written, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fit(base: Path, out: Path, rows: str = "train.jsonl") -> list[str]:
    options = {
        "model.pretrained": base / "model",
        "data.train": base / "data" / rows,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": out,
        "trainer.logger.init_args.name": "run",
    }
    return ["fit", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]


def predict(base: Path, out: Path, rows: str = "train.jsonl") -> list[str]:
    argv = ["predict", "--model.pretrained", base / "model", "--data.predict", base / "data" / rows]
    argv += ["--predictions.file", out / "answers.jsonl", "--model.generation.max_new_tokens", "2"]
    argv += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    return list(map(str, argv))


def check(base: Path, out: Path, rows: str = "train.jsonl") -> list[str]:
    argv = ["check", "--model.pretrained", base / "model", "--data.train", base / "data" / rows]
    return list(map(str, [*argv, "--workers", "0", "--out", out / "check"]))


def score(base: Path, out: Path) -> list[str]:
    report = ["--html", str(out / "report.html")]
    return ["score", str(base / "answers.jsonl"), "--task", "docvqa", "--out", str(out / "scores.json"), *report]


def export(base: Path, out: Path) -> list[str]:
    return ["export", "--run", str(base / "run"), "--out", str(out / "merged")]


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """A cache below a file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cache, "_noted", [])


@pytest.mark.parametrize("command", [fit, predict, check])
def test_commands_go_on_without_a_cache(base, tmp_path, capfd, no_cache, command):
    """The rows are compressed, so there is something that must be written somewhere."""
    assert main(command(base, tmp_path, "train.jsonl.gz")) == 0
    error = capfd.readouterr().err
    assert error.count("note: the cache cannot be written") == 1 and str(tmp_path / "file") in error


def test_a_cache_that_becomes_full(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_noted", [])
    rows = tmp_path / "many.jsonl.gz"
    rows.write_bytes(gzip.compress((base / "data/train.jsonl").read_bytes()))
    real = cache.atomic_file
    argv = ["check", "--model.pretrained", str(base / "model"), "--data.train", str(rows), "--workers", "0"]
    argv += ["--data.media_root", str(base / "data"), "--out", str(tmp_path / "check")]
    for module in (row_file, index_file):

        @contextmanager
        def full(path):
            if tmp_path in Path(path).parents:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            with real(path) as out:
                yield out

        monkeypatch.setattr(module, "atomic_file", full)
    assert main(argv) == 0
    assert capfd.readouterr().err.count("No space left on device; free space there") == 1


def one_line(capfd, status: int) -> str:
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize("command", [fit, predict, check, score, export])
def test_a_folder_that_is_a_file(base, tmp_path, capfd, command):
    (tmp_path / "file").write_text("kept")
    line = one_line(capfd, main(command(base, tmp_path / "file")))
    assert str(tmp_path / "file") in line and "; " in line
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(("command", "limit"), [(fit, 20_000), (check, 200), (score, 200), (export, 20_000)])
def test_a_full_disk_leaves_nothing_half_written(base, tmp_path, capsys, monkeypatch, command, limit):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = command(base, tmp_path)
    with full_disk(limit):
        status = main(argv)
    assert "File too large" in one_line(capsys, status)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if path.name.endswith((".part", ".tmp")) or path.suffix == ".safetensors"]


def test_what_is_there_stays_where_the_disk_is_full(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with full_disk(100), pytest.raises(OSError, match="File too large") as caught:
        write_text(path, "x" * 1000)
    remedy = "raise the limit of a file's size (ulimit -f), or name another folder"
    assert disk_fault(caught.value) == f"{path}: File too large; {remedy}"
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_links_and_devices_stay(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "after"
    os.mkfifo(tmp_path / "pipe")
    with atomic_path(tmp_path / "pipe") as part:
        assert part == tmp_path / "pipe"
    with atomic_file(os.devnull) as out:
        out.write(b"nothing")
    assert not Path(os.devnull).is_file()


def test_faults_of_disks_are_told_from_other_errors(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert disk_fault(full) == "/a/b: No space left on device; free space there, or name another folder"
    worker = f"Caught OSError in DataLoader worker process 0.\nOriginal Traceback ...\nOSError: {full}"
    assert disk_fault(OSError(worker)) == disk_fault(full)
    with pytest.raises(Exception, match="os error 2") as caught:
        save_file({"a": torch.zeros(1)}, tmp_path / "none" / "a.safetensors")
    assert disk_fault(caught.value).endswith("No such file or directory; check the path")
    for other in (ValueError("[Errno 28] is not one"), OSError("a decoder's own"), ConnectionResetError(104, "reset")):
        assert disk_fault(other) is None
