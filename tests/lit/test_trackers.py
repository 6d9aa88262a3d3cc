"""`--trainer.logger WORD`: figures, options and answers go to the tracker, and the run's folder is as without it."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from ivl.__main__ import main
from ivl.lit import trackers
from tests.lit.test_runs import config

OPTIONS = {"model__tune": {"vision_model": "frozen", "mlp1": "full", "language_model": "frozen"}}


def fit(base: Path, root: Path, word: str, *more: str) -> Path:
    """Run fit with a tracker in one word. Returns the run's folder."""
    path = config(base, root, trainer__logger=word, **OPTIONS)
    assert main(["fit", "--config", str(path), "--trainer.logger.save_dir", str(root / "runs"), *more]) == 0
    return root / "runs/version_0"


def check_folder(run: Path) -> None:
    """Assert that a run's folder is whole."""
    assert {"config.yaml", "versions.json", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert (run / "checkpoints/last.ckpt").is_file()


class recorder(trackers.Tracked):
    """A tracker that writes files."""

    package = "json"

    def __init__(self, save_dir: str = "runs", name: str = "", version: str | None = None, project: str = "ivl"):
        super().__init__(save_dir, name, version, project, None)

    def connect(self, identity, run_name):
        folder = Path(self.save_dir).parent / "tracker"
        identity = identity or f"{run_name}-id"
        with folder.with_suffix(".txt").open("a") as file:
            file.write(f"{self.project} {identity}\n")
        return CSVLogger(str(folder), "", identity), identity

    def log_answers(self, table, picture, step):
        path = Path(self.save_dir).parent / f"{table.name}-{step}.json"
        path.write_text(json.dumps([picture and picture.size, table.rows]))

    viewer = "look"


def test_a_tracker_has_figures_options_and_answers(base, tmp_path, capsys):
    word = "tests.lit.test_trackers.recorder"
    run = fit(base, tmp_path, word, "--trainer.logger.project", "mine")
    check_folder(run)
    assert "\n  look\n" in capsys.readouterr().out
    assert list(run.glob("events.out.tfevents*")), "TensorBoard's files are written, too"
    figures = (tmp_path / "tracker/version_0-id/metrics.csv").read_text()
    assert "train/loss" in figures.splitlines()[0] and len(figures.splitlines()) > 2
    assert "tune: " in (tmp_path / "tracker/version_0-id/hparams.yaml").read_text()
    (answers,) = tmp_path.glob("answers-*.json")
    size, rows = json.loads(answers.read_text())
    assert min(size) > 10 and len(rows[0]) == 4 and "val.jsonl" in rows[0][0]
    # the run goes on in its folder, and in the tracker's run
    fit(base, tmp_path, word, "--trainer.logger.project", "mine", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert (tmp_path / "tracker.txt").read_text().splitlines() == ["mine version_0-id"] * 2
    assert not (tmp_path / "runs/version_1").exists()


def test_csv_keeps_the_figures_of_a_run_that_goes_on(base, tmp_path):
    run = fit(base, tmp_path, "csv")
    check_folder(run)
    first = (run / "metrics.csv").read_text()
    assert "train/loss" in first and not list(run.glob("events*"))
    (picture,), (table,) = run.glob("answers/*.png"), run.glob("answers/*.md")
    assert picture.stat().st_size > 500 and table.read_text().startswith("| row | question | expected | answer |")
    fit(base, tmp_path, "csv", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert (run / "metrics-1.csv").read_text() == first
    assert "train/loss" in (run / "metrics.csv").read_text()


def test_tensorboard_in_one_word_is_the_default(base, tmp_path):
    run = fit(base, tmp_path, "tensorboard")
    check_folder(run)
    assert list(run.glob("events.out.tfevents*"))


@pytest.mark.parametrize("word", ["wandb", "mlflow", "swanlab"])
def test_a_missing_package_is_named_with_its_command(base, tmp_path, word, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert main(["fit", "--config", str(config(base, tmp_path, trainer__logger=word, **OPTIONS))]) == 2
    error = capsys.readouterr().err
    assert f"--trainer.logger {word}: expected the package {word}" in error
    assert f'pip install "ivl[{word}]"' in error and "Traceback" not in error


def test_weights_and_biases_offline(base, tmp_path):
    pytest.importorskip("wandb")
    run = fit(base, tmp_path, "wandb", "--trainer.logger.offline", "true", "--trainer.logger.project", "mine")
    check_folder(run)
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(word in content for word in (b"train/loss", b"answers/panel", b"answers/table", b"pretrained"))
    media = {p.suffix for p in run.glob("wandb/offline-run-*/files/media/**/*") if p.is_file()}
    assert media == {".png", ".json"}
    identity = json.loads((run / "tracker.json").read_text())["wandb"]
    assert identity in file.name
    fit(base, tmp_path, "wandb", "--trainer.logger.offline", "true", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert len(list(run.glob(f"wandb/offline-run-*-{identity}"))) == 2


def test_mlflow_in_a_local_folder(base, tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = fit(base, tmp_path, "mlflow")
    fit(base, tmp_path, "mlflow", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    check_folder(run)
    client = tracking.MlflowClient(f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    (record,) = client.search_runs([client.get_experiment_by_name("ivl").experiment_id])
    assert record.info.run_name == "version_0" and record.info.status == "FINISHED"
    assert len(client.get_metric_history(record.info.run_id, "train/loss")) > 3
    assert any("pretrained" in name for name in record.data.params)
    names = {Path(file.path).suffix for file in client.list_artifacts(record.info.run_id, "answers")}
    assert names == {".md", ".png"}


def test_swanlab_offline(base, tmp_path):
    pytest.importorskip("swanlab")
    run = fit(base, tmp_path, "swanlab", "--trainer.logger.offline", "true")
    check_folder(run)
    assert any(p.suffix == ".png" for p in run.glob("swanlab/**/*"))
