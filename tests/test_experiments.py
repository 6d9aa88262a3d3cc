"""Every experiment says its question, command, result and verdict, and asks for options that there are."""

import runpy
import sys
from pathlib import Path

import pytest

from ivl.__main__ import main

ROOT = Path(__file__).resolve().parents[1] / "experiments"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/run.py"))


def test_the_folders_are_found():
    assert {folder.name for folder in FOLDERS} >= {"digits", "tiles", "lora_rank", "packing"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_has_its_parts(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("Question: ", "Command: ", "Result: ", "Verdict: "):
        assert part in text
    assert f"python experiments/{folder.name}/run.py" in text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_settings_are_options(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    import sweep

    asked = []
    monkeypatch.setattr(sweep, "make_data", lambda: None)
    monkeypatch.setattr(sweep, "part_of", lambda kind, share: f"{kind}-{share}.jsonl")
    monkeypatch.setattr(sweep, "sweep", lambda here, settings, scores, kind="single": asked.append((settings, scores)))
    path = sys.path[:]
    runpy.run_path(str(folder / "run.py"))
    sys.path[:] = path
    ((settings, scores),) = asked
    assert len(settings) > 1 and scores
    for options in settings.values():
        with pytest.raises(SystemExit) as stop:
            main(["fit", *(part for key, value in options.items() for part in (f"--{key}", value)), "--print_config"])
        assert stop.value.code == 0
    capsys.readouterr()
