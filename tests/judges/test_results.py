"""The page of the judges shows what was recorded, and their environments are described whole."""

import subprocess
import sys
from dataclasses import asdict

from tests.judges import results
from tests.judges.make_env import ENVIRONMENTS
from tests.judges.results import FOLDER, PAGE, REPO, Result, page, recorded


def test_the_page_shows_the_recorded_results():
    """To write it anew: `python -m tests.judges.results`."""
    assert PAGE.read_text(encoding="utf-8") == page(recorded())
    assert len(recorded()) >= 6


def test_a_result_is_recorded_on_request_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    one = Result("judge", "ids", 3, 1, {"line break": 2}, {"judge": "1.0"})
    monkeypatch.delenv("IVL_RECORD", raising=False)
    results.record("one", [one])
    assert not list(tmp_path.iterdir()) and FOLDER.is_dir()
    monkeypatch.setenv("IVL_RECORD", "1")
    results.record("one", [one])
    assert [asdict(result) for result in results.recorded()] == [asdict(one)]
    assert f"| judge | ids | 3 | 1 | line break: 2 | {one.date} | judge 1.0 |" in page([one])


def test_environments_are_listed_and_pinned():
    command = [sys.executable, str(REPO / "tests/judges/make_env.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split(":")[0] for line in printed.splitlines()] == list(ENVIRONMENTS)
    for name, environment in ENVIRONMENTS.items():
        wanted = f"{environment.packages} {environment.bare}".split()
        assert wanted and all("==" in package for package in wanted), name
