"""Diffs of the documentation, applied to the present code."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def applied(text: str) -> dict[str, str]:
    """Path → source of each file that a diff names, with the diff applied.

    Its unchanged and removed lines stand in the file, in that order. A line that is added comes right after the line
    above it; at the start of a hunk, right before the line below.
    """
    sources = {}
    for part in re.split(r"^--- ", text, flags=re.MULTILINE)[1:]:
        path, *hunk = part.splitlines()
        code = (REPO / path.strip()).read_text(encoding="utf-8").splitlines()
        made, at, added = [], 0, []
        for line in hunk:
            kind, line = line[:1], line[1:]
            if kind == "+":
                (made if at else added).append(line)
                continue
            assert line in code[at:], f"{path}: {line!r} is not there (any more)"
            found = code.index(line, at)
            made += code[at:found] + added + [line] * (kind == " ")
            at, added = found + 1, []
        sources[path.strip()] = "\n".join(made + code[at:]) + "\n"
    return sources
