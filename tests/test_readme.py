"""The README says what is true: its tree is the tree, its rows are rows, its commands exist."""

import json
import re
from pathlib import Path

import pytest

from ivl.__main__ import COMMANDS
from ivl.data.formats import parse

REPO = Path(__file__).resolve().parents[1]
TEXT = (REPO / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [text for name, text in re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL) if name == language]


def test_the_tree_names_every_module_and_no_other():
    tree = next(b for b in blocks("") if "ivl/" in b)
    named = set(re.findall(r"(\w+\.py)\b", tree))
    inside = ("model", "model/efficient", "inference", "checkpoint", "data", "lit")
    folders = [REPO / "ivl", *(REPO / "ivl" / name for name in inside)]
    found = {p.name for folder in folders for p in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == found


def test_every_command_is_in_the_table():
    table = {
        name for cell in re.findall(r"^\| (`[^|]+`) \|", TEXT, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert table == set(COMMANDS)


@pytest.mark.parametrize("line", [line for block in blocks("json") for line in block.splitlines()])
def test_the_rows_are_understood(line):
    conversation = parse(json.loads(line), size=lambda media: (640, 480))
    assert conversation.messages[-1].role == "assistant"


@pytest.mark.parametrize("line", [line for block in blocks("shell") for line in block.splitlines() if "-m ivl" in line])
def test_the_commands_and_their_files_exist(line):
    command = line.split("python -m ivl ")[1].split()
    assert command[0] in COMMANDS
    for word in command:
        if word.startswith("configs/"):
            assert (REPO / word).is_file()
