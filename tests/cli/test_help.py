"""Help pages: the first page is short and instant, every group has a page."""

import subprocess
import sys
import time

import pytest

from ivl.__main__ import main
from ivl.cli.help import FIRST_PAGES, PURPOSES, readable

COMMANDS = list(FIRST_PAGES)


def shown(capsys, *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_page_has_what_people_use(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(capsys, command, "--help")
    assert text.startswith(f"usage: python -m ivl {command} ") and PURPOSES[command] in text
    assert 15 <= text.count("\n  --") <= 30 and text.count("\n") < 90
    assert f"python -m ivl {command} --config" in text and f"{command} --help full" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    entries = text.split("\n  --")[1:]
    assert all(len(entry.split("\n\n")[0].split()) > 4 for entry in entries), entries


def test_the_first_page_of_fit_has_defaults(capsys):
    text = shown(capsys, "fit", "--help")
    for words in ("--data.max_length int", "(default: 4096)", "--model.optimizer.lr float", "Default: 8."):
        assert words in text


@pytest.mark.parametrize("topic", ["model", "data", "trainer", "checkpoint", "predictions", "data.video", "model.tune"])
def test_a_group_has_a_page(capsys, topic):
    text = shown(capsys, "fit", "--help", topic)
    assert text.startswith(f"options of fit: {topic}\n")
    assert all(name.startswith(topic) for name in text.split("\n  --")[1:])
    assert shown(capsys, "fit", f"--help={topic}") == text


def test_an_unknown_group_is_named(capsys):
    assert main(["fit", "--help", "dat"]) == 2
    assert "--help dat: no such group; expected one of model, data, trainer" in capsys.readouterr().err


def test_types_are_written_for_people():
    assert readable("Optional[Union[int, str]]") == "int|str"
    assert readable("Literal['a', 'b'] | None") == "a|b"
    assert readable("str | list[str] | None") == "str|list"


def test_help_and_mistakes_come_at_once():
    """Neither torch nor Lightning is imported. The best of three starts, as a busy machine slows any one."""
    code = "import sys; from ivl.__main__ import main; s = main({}); print('torch' in sys.modules, s)"
    for argv, status in (
        (["fit", "--help"], 0),
        (["fit", "--data.trian", "x"], 2),
        (["fit", "--data.max_tiles", "x"], 2),
    ):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code.format(argv)], capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
            assert done.stdout.splitlines()[-1] == f"False {status}", done.stderr
        assert min(seconds) < 2
