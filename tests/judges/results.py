"""Results of the judges, and the page that shows them.

IVL_RECORD=1 pytest -m judge          # writes tests/judges/results/*.json
python -m tests.judges.results        # writes docs/judges.md from them
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from tests.judges.make_env import python_of

REPO = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "results"
PAGE = REPO / "docs" / "judges.md"


@dataclass(frozen=True)
class Result:
    """Comparison with a judge."""

    judge: str
    compared: str
    cases: int
    differences: int
    """Cases that differ and that no known difference explains"""
    explained: dict[str, int] = field(default_factory=dict)
    """Known difference → cases that have it"""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: date.today().isoformat())


def versions_in(name: str, *packages: str) -> dict[str, str]:
    """Versions of packages in a judge's environment."""
    code = "import sys, json, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    out = subprocess.run([python_of(name), "-c", code, *packages], capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def record(name: str, results: list[Result]) -> None:
    """Write results/NAME.json, where IVL_RECORD is set."""
    if os.environ.get("IVL_RECORD"):
        text = json.dumps([asdict(result) for result in results], indent=1, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def page(results: list[Result]) -> str:
    """Text of docs/judges.md: a fixed head and tail, and the table between them."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    lines = ["| judge | compared | cases | differences | explained | date | versions |", "| --- " * 7 + "|"]
    for r in results:
        explained = "; ".join(f"{name}: {count}" for name, count in r.explained.items()) or "-"
        versions = ", ".join(f"{name} {number}" for name, number in r.versions.items())
        lines.append(
            f"| {r.judge} | {r.compared} | {r.cases} | {r.differences} | {explained} | {r.date} | {versions} |"
        )
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}"


BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def recorded() -> list[Result]:
    """Results that stand in results/, by judge."""
    return [Result(**row) for path in sorted(FOLDER.glob("*.json")) for row in json.loads(path.read_text())]


if __name__ == "__main__":
    PAGE.write_text(page(recorded()), encoding="utf-8")
