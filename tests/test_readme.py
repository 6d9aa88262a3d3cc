"""The README says what is true: its tree is the tree, its rows are rows, its commands exist."""

import ast
import json
import re
from pathlib import Path

import pytest

from ivl.__main__ import COMMANDS
from ivl.data.rows.formats import parse

REPO = Path(__file__).resolve().parents[1]
TEXT = (REPO / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [text for name, text in re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL) if name == language]


def first_line(path: Path) -> str:
    """First line of a module's docstring, cut to the width of a page."""
    line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return line if len(line) <= 96 else line[:95].rsplit(" ", 1)[0] + " …"


def tree(folder: Path, depth: int = 1) -> list[str]:
    """Lines of the README's tree: files first, then folders."""
    indent = "  " * depth
    files = [path for path in sorted(folder.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
    lines = [f"{indent}{path.name:<22}{first_line(path)}" for path in files]
    for sub in sorted(path.parent for path in folder.glob("*/__init__.py")):
        lines.append(f"{indent}{sub.name + '/':<22}{first_line(sub / '__init__.py')}")
        lines += tree(sub, depth + 1)
    return lines


def test_the_tree_is_that_of_the_first_lines_of_the_files():
    """To write it anew: `python -m tests.test_readme`."""
    drawn = re.search(r"^ivl/\n((?:  .*\n)*)", TEXT, re.MULTILINE)
    assert drawn and drawn[1].splitlines() == tree(REPO / "ivl")


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


if __name__ == "__main__":
    lines = "\n".join(tree(REPO / "ivl"))
    fresh = re.sub(r"^ivl/\n(?:  .*\n)*", lambda _: f"ivl/\n{lines}\n", TEXT, count=1, flags=re.MULTILINE)
    (REPO / "README.md").write_text(fresh, encoding="utf-8")
