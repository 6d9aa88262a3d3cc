"""What rows, paths and answers hold never steers the terminal, and a terminal that is not UTF-8 ends nothing."""

import io
import json
import sys

import pytest

from ivl.__main__ import main, run_command
from ivl.data.row_files.row_file import RowFile
from ivl.errors import amount
from ivl.types import UserError, printable
from tests.tiny import write_checkpoint

STEERING = "\x1b]0;title\x07\x1b[2J\x9b2J\u202etxt\u2066\r"
"""A title, a cleared screen, two marks of direction, and a return to the line's begin"""
RAW = set("\x1b\x07\x9b\u202e\u2066\r")


def test_what_steers_is_written_as_an_escape():
    assert printable("a\x1b[31mb\u202ec\x7f") == "a\\x1b[31mb\\u202ec\\x7f"
    assert printable("a\tb\n图 é 👨‍👩‍👧 ½") == "a\tb\n图 é 👨‍👩‍👧 ½"
    assert printable("one\r\ntwo\u2028three\n", " ") == "one two three "
    assert printable("a\udcffb\rc") == "a\\udcffb\\rc"
    assert not RAW & set(printable(STEERING))


def test_small_amounts_keep_two_digits():
    assert [amount(value) for value in (0, 0.00032, 0.05, 0.1, 3.14159, 24.0)] == [
        "0.00", "0.00032", "0.05", "0.10", "3.14", "24.00",
    ]  # fmt: skip


def test_an_error_has_only_the_lines_it_was_given():
    error = UserError(f"a.jpg\nerror: forged {STEERING}", "second\nline")
    assert str(error).splitlines() == [str(error).splitlines()[0], "second line"]
    assert not RAW & set(str(error))
    assert str(type(error)(*error.args)) == str(error), "as it comes from another process"
    told = UserError("Caught UserError in worker 0.\nOriginal Traceback …\nivl.types.UserError: a.jpg: no such file\n")
    assert str(told) == "a.jpg: no such file"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def test_check_prints_nothing_that_steers(model, tmp_path, capsys):
    rows = [
        {"query": f"Say it {STEERING}", "response": f"Well {STEERING}"},
        {"query": f"Say it {STEERING}", "response": f"Well {STEERING}"},
        {"query": "<image>", "images": [f"{STEERING}\nerror: forged.png"], "response": "x"},
        {"query": "<bbox>", "objects": [{"bbox": f"{STEERING}"}], "response": "x"},
        {"query": "a", "response": "b", f"key{STEERING}\nerror": 1},
    ]
    folder = tmp_path / "odd\x1b[2J\nname"
    folder.mkdir()
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["check", "--model.pretrained", str(model), "--data.train", str(path), "--workers", "0"]
    main([*argv, "--out", str(tmp_path / "out")])
    found = capsys.readouterr()
    assert "\\x1b[2J" in found.out and "repeat an earlier one" in found.out
    assert not RAW & set(found.out) and not RAW - {"\r"} & set(found.err)
    assert not any(line.startswith(("error", "name")) for line in found.out.splitlines())


def test_errors_and_scores_print_nothing_that_steers(model, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "<image>", "images": [f"{STEERING}\nerror: forged.png"]}) + "\n")
    argv = ["predict", "--model.pretrained", str(model), "--data.predict", str(path), "--trainer.logger", "false"]
    assert main([*argv, "--trainer.accelerator", "cpu", "--data.num_workers", "0"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and not RAW & set(lines[0]) and "\\u202e" in lines[0]
    rows = [{"id": name, "response": "yes", "reference": "yes", "category": f"{name}\n{STEERING}"} for name in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_command("score", [str(path), "--task", "pope", "--resamples", "5"]) == 0
    assert not RAW & set(capsys.readouterr().out)


def test_where_a_row_stands_is_one_line(tmp_path):
    path = tmp_path / "a\nb\x1b.jsonl"
    path.write_text('{"query": "Q"}\n')
    assert RowFile(path).where(0) == f"{tmp_path}/a b\\x1b.jsonl:1"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_a_terminal_that_is_not_utf8_gets_a_replaced_character(model, tmp_path, monkeypatch, encoding):
    """chat, check, score, and an error."""
    written = {}
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        written[name] = stream.buffer
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("四只羊?\nexit\n".encode()), encoding=encoding))
    assert main(["chat", "--model", str(model), "--max_new_tokens", "12", "--device", "cpu"]) == 0
    assert b"-----" in written["stdout"].getvalue()
    rows = tmp_path / "羊.jsonl"
    rows.write_text(json.dumps({"query": "四只羊", "response": "羊"}, ensure_ascii=False) + "\n", encoding="utf-8")
    argv = ["--model.pretrained", str(model), "--data.train", str(rows), "--workers", "0", "--out", str(tmp_path / "o")]
    assert main(["check", *argv]) == 0
    said = {"id": "1", "response": "羊", "answers": ["羊"], "category": "羊"}
    rows.write_text(json.dumps(said, ensure_ascii=False) + "\n", encoding="utf-8")
    assert main(["score", str(rows), "--task", "docvqa", "--resamples", "5"]) == 0
    assert main(["score", str(tmp_path / "狗.jsonl"), "--task", "docvqa"]) == 2
    assert b"?.jsonl" in written["stdout"].getvalue() and b"?.jsonl: no such file" in written["stderr"].getvalue()
