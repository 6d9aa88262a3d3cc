"""Tests under other versions of the dependencies, and the table of results in docs/versions.md.

```shell
python -m tests.versions lowest                                                # the lower bounds of pyproject.toml
python -m tests.versions image --with torch==2.11.0 transformers==5.17.0        # named versions, the newest of the rest
python -m tests.versions lowest --python 3.14 --tests tests/data tests/eval     # another Python, some tests
```

A virtual environment is made with uv (`pip install uv`) from wheels alone, the default tests run in it, and it is
removed unless `--keep`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs/versions.md"
COLUMNS = ("set", "Python", "versions", "tests", "passed", "failed", "skipped", "date")
SHOWN = ("torch", "transformers", "lightning", "peft", "numpy")


def install(folder: Path, python: str, lowest: bool, pins: list[str]) -> Path:
    """Make a virtual environment with the package's dependencies. Returns its Python."""
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", python, str(folder)], check=True)
    interpreter = folder / "bin/python"
    resolution = ["--resolution", "lowest-direct"] if lowest else []
    wheels = ["uv", "pip", "install", "--quiet", "--only-binary", ":all:", "--python", str(interpreter), *resolution]
    subprocess.run([*wheels, "-r", "pyproject.toml", "--extra", "test", *pins], cwd=REPO, check=True)
    return interpreter


def versions(interpreter: Path) -> dict[str, str]:
    """Versions of Python and of all packages of a virtual environment."""
    command = ["uv", "pip", "list", "--format", "json", "--python", str(interpreter)]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    script = "import platform; print(platform.python_version())"
    python = subprocess.run([str(interpreter), "-c", script], capture_output=True, text=True, check=True).stdout
    return {"python": python.strip()} | {package["name"]: package["version"] for package in listed}


def run_tests(interpreter: Path, tests: list[str]) -> tuple[dict[str, int], list[str]]:
    """Run the default tests, or those named. Returns counts and names of failed tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(interpreter), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        path = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO), "PATH": path}, check=False)
        return counts(report.read_text(encoding="utf-8"))


def counts(report: str) -> tuple[dict[str, int], list[str]]:
    """Counts of a JUnit report, and the names of failed tests."""
    total = dict.fromkeys(("passed", "failed", "skipped"), 0)
    failed = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        total[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return total, failed


def with_row(page: str, row: dict[str, str]) -> str:
    """Put a row into the page's table, in the place of one of the same set, Python and tests."""
    line = "| " + " | ".join(row[column] for column in COLUMNS) + " |"
    lines = page.splitlines()
    start = lines.index("| " + " | ".join(COLUMNS) + " |") + 2
    end = next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))

    def key(text: str) -> list[str]:
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        python = re.sub(r"\.\d+$", "", cells[1]) if cells[1].count(".") > 1 else cells[1]
        return [cells[0], python, cells[3]]

    rows = [old for old in lines[start:end] if key(old) != key(line)]
    return "\n".join([*lines[:start], *rows, line, *lines[end:]]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="Name of the set in the table; `lowest` takes the declared lower bounds.")
    parser.add_argument("--with", dest="pins", nargs="+", default=[], help="Requirements of named versions.")
    parser.add_argument("--python", default="3.11", help="Version of Python.")
    parser.add_argument("--tests", nargs="+", default=[], help="Folders, files or options of pytest; all by default.")
    parser.add_argument("--folder", type=Path, help="Folder of the virtual environment; a temporary one by default.")
    parser.add_argument("--keep", action="store_true", help="Keep the environment, and use it where it is there.")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix=f"ivl-{args.name}-")) / "venv"
    if args.folder and folder.exists() and not args.keep:
        parser.error(f"--folder {folder}: exists; give another, or --keep to use it")
    try:
        interpreter = folder / "bin/python"
        if not interpreter.exists():
            interpreter = install(folder, args.python, args.name == "lowest", args.pins)
        installed = versions(interpreter)
        total, failed = run_tests(interpreter, args.tests)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    row = {
        "set": args.name,
        "Python": installed["python"],
        "versions": ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed),
        "tests": " ".join(args.tests) or "all default",
        **{outcome: str(count) for outcome, count in total.items()},
        "date": date.today().isoformat(),
    }
    PAGE.write_text(with_row(PAGE.read_text(encoding="utf-8"), row), encoding="utf-8")
    print("\n".join(failed))
    return int(bool(failed) or not total["passed"])


if __name__ == "__main__":
    sys.exit(main())
