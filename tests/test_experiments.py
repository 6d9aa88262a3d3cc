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


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import plot

    return plot


def test_titles_are_words(plot):
    assert plot.title_of("val/loss") == "loss of held-out rows"
    assert plot.title_of("val/iou") == "mean IoU of boxes"
    assert plot.title_of("val/2_columns/exact") == "exact answers, 2 columns"


def test_a_plot_has_the_mean_and_the_spread_of_the_seeds(plot, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    found = {"rank 1": [{"val/exact": [(5, 0.2), (9, 0.4)]}, {"val/exact": [(5, 0.4), (9, 0.8)]}]}
    plot.write(tmp_path, found, ("val/exact",))
    (axis,) = drawn[0].axes
    assert axis.get_title() == "exact answers" and axis.get_ylim() == (0, 1)
    ((step, mean), (_, last)) = axis.lines[0].get_xydata()
    assert (step, mean, last) == (5, pytest.approx(0.3), pytest.approx(0.6))
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.2, 0.8)
    first = (tmp_path / "result.png").read_bytes()
    (tmp_path / "result.png").unlink()
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    plot.main()
    assert (tmp_path / "result.png").read_bytes() == first
