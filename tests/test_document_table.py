"""Table of docs/from_ms_swift.md: a command of ours and tests for each part of ms-swift's page."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.test_docs import COMMAND_LINES, REPO, blocks

PAGE = REPO / "docs/from_ms_swift.md"
COLUMNS = ["part of the page", "there", "here", "tried by"]


def table() -> list[dict[str, str]]:
    """Rows of the table of commands."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    start = cells.index(COLUMNS) + 2
    rows = []
    for row in cells[start:]:
        if len(row) != len(COLUMNS):
            break
        rows.append(dict(zip(COLUMNS, row)))
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def functions_of(path: str) -> set[str]:
    """Names of the functions of a file."""
    source = ast.parse((REPO / path).read_text(encoding="utf-8"))
    return {part.name for part in source.body if isinstance(part, ast.FunctionDef)}


ROWS = table()


def test_the_table_is_read():
    assert len(ROWS) > 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["part of the page"])
def test_a_part_has_a_command_that_is_parsed_and_tests_that_exist(row):
    """Its command is one of the lines that tests/test_docs.py gives to the command's own parser."""
    parsed = {line for page, line in COMMAND_LINES if page == PAGE}
    commands = [line for line in code(row["here"]) if "-m ivl" in line]
    assert set(commands) <= parsed
    assert commands or row["there"].count("swift ") == 0, "a command of its page has one here"
    named = code(row["tried by"])
    assert named
    for test in named:
        path, _, name = test.partition("::")
        assert name in functions_of(path), test


@pytest.fixture
def document(shared) -> Path:
    path = shared / "document.md"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return path


def plain(line: str) -> str:
    return " ".join(re.sub(r"[\"'\\]", "", line).split())


def test_every_command_of_the_document_is_in_the_table(document):
    there = {plain(command) for row in ROWS for command in code(row["there"])}
    lines = [line for block in blocks(document, "shell") for line in block.replace("\\\n", " ").splitlines()]
    commands = [plain(line) for line in lines if re.search(r"\bswift (infer|sft|export) |^pip install", line)]
    assert len(commands) > 10
    assert [command for command in commands if command not in there] == []


def test_every_section_of_the_document_is_in_the_table(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    sections = re.findall(r"^#{2,} (.+)$", text, re.MULTILINE)
    sections += [f"FAQ {n}" for n in re.findall(r"^(\d)\. \*\*(?!caption|bbox|image)", text, re.MULTILINE)]
    sections += re.findall(r"^\*\*(Single Sample Inference)\*\*", text, re.MULTILINE)
    parts = {row["part of the page"].partition(",")[0] for row in ROWS}
    assert set(sections) - {"Table of Contents"} <= parts and len(sections) > 8


def test_every_flag_and_function_of_the_document_is_on_the_page(document):
    text, page = document.read_text(encoding="utf-8"), PAGE.read_text(encoding="utf-8")
    flags = set(re.findall(r"--[a-z]\w+", text))
    imported = re.search(r"from swift\.llm import \((.*?)\)", text, re.DOTALL)
    functions = set(re.findall(r"\w+", imported[1]))
    assert len(flags) > 10 and len(functions) > 3
    slip = "--bf16"  # "`dtype --bf16`": --dtype bf16 is meant
    assert {name for name in flags | functions if name not in page} == {slip}
