"""Checkpoint files: read whole or refused in a line, by every command, whatever is in them."""

import os
import pickle
import time
import zipfile

import pytest
import torch
import yaml

from ivl.__main__ import main
from ivl.checkpoint.ckpt_file import damage, read_ckpt, trained_state
from ivl.types import UserError
from tests.tiny import write_checkpoint

STATE = {"model.a": torch.arange(40.0), "model.b": torch.ones(3, 5)}
LOOPS = {"fit_loop": {"epoch_loop.batch_progress": {}, "state_dict": {}}}
CONTENT = {"pytorch-lightning_version": "2.5.0", "state_dict": STATE, "global_step": 3, "epoch": 0, "loops": LOOPS}


def test_a_whole_file_is_read(tmp_path):
    torch.save(CONTENT, tmp_path / "a.ckpt")
    assert damage(tmp_path / "a.ckpt") is None
    read = trained_state(tmp_path / "a.ckpt")
    assert {n: t.tolist() for n, t in read.items()} == {n[6:]: t.tolist() for n, t in STATE.items()}


def test_a_flipped_bit_anywhere_changes_no_number_unnoticed(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(CONTENT, path)
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        try:
            read = read_ckpt(path)["state_dict"]
        except UserError:
            refused += 1
            continue
        assert read.keys() == STATE.keys() and all(torch.equal(read[n], t) for n, t in STATE.items()), at
    assert refused > len(content) / 7 / 3


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def bomb(path) -> None:
    """A file of 100 kB that would become 100 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"0" * 100_000_000)


def overlapping(path) -> None:
    """An archive whose directory names the same bytes many times."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"0" * 100_000)
        first = file.infolist()[0]
        for n in range(1000):
            again = zipfile.ZipInfo(f"archive/data/{n}")
            again.header_offset, again.file_size = first.header_offset, first.file_size
            again.compress_size, again.CRC = first.compress_size, first.CRC
            file.filelist.append(again)


def of(value):
    return lambda path: torch.save(value, path)


FILES = {
    "missing": (lambda path: None, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole checkpoint"),
    "text": (lambda path: path.write_text("epoch 1"), "not a whole checkpoint"),
    "cut": (lambda path: (torch.save(CONTENT, path), os.truncate(path, path.stat().st_size - 100)), "not a whole"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(CONTENT)), "not a whole checkpoint"),
    "code": (lambda path: torch.save(Evil(path.parent / "made"), path), "not a checkpoint of this program's"),
    "old torch": (lambda path: torch.save(CONTENT, path, _use_new_zipfile_serialization=False), "not a whole"),
    "bomb": (bomb, "compressed"),
    "overlapping": (overlapping, "larger than the file"),
    "a list": (of([1]), "it holds a list"),
    "no state": (of({"weights": 1}), "state_dict: expected tensors .* found nothing"),
    "foreign names": (of(CONTENT | {"state_dict": {"net.a": torch.ones(2)}}), "state_dict: expected tensors"),
    "no tensors": (of(CONTENT | {"state_dict": {"model.a": 3}}), "state_dict: expected tensors"),
    "other loops": (of(CONTENT | {"loops": [1]}), "loops: expected the positions of a fit"),
    "other step": (of(CONTENT | {"global_step": "3"}), "global_step: expected a whole number"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_checkpoint_is_refused_in_a_line(tmp_path, kind):
    make, message = FILES[kind]
    path = tmp_path / "a.ckpt"
    make(path)
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        read_ckpt(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert time.monotonic() - start < 2 and not (tmp_path / "made").exists()


@pytest.mark.parametrize("argv", [["export", "--out", "OUT", "--run"], ["chat", "--ckpt_path"]], ids=["export", "chat"])
def test_commands_refuse_a_damaged_run(tmp_path, capsys, argv):
    """`predict` and the others read by Lightning: tests/lit/callbacks/test_checkpoint.py."""
    base = write_checkpoint(tmp_path / "base")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    path = tmp_path / "run/checkpoints/last.ckpt"
    torch.save(CONTENT, path)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": str(base), "tune": {}}}))
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(40.0).numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(content)
    argv = [str(tmp_path / "out") if word == "OUT" else word for word in argv]
    assert main([*argv, str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"note: {path}: damaged (checksum of" in said and f"error: {tmp_path / 'run'}: no whole checkpoint" in said
    torch.save(CONTENT, path)
    (tmp_path / "run/config.yaml").write_text("- 1\n")
    assert main([*argv, str(tmp_path / "run")]) == 2
    assert "config.yaml: not the config of a run" in capsys.readouterr().err
