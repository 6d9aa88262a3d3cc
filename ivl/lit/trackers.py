"""Trackers of experiments in one word: `--trainer.logger tensorboard | csv | wandb | mlflow | swanlab`.

A class is named as it is typed, since the command line takes a class by its name. Each has the run's folder as
TensorBoard's logger makes it (`runs/version_N`), with TensorBoard's files in it, or a table for `csv`; figures, options
and answers go to the tracker as well. A run that goes on in its folder goes on as the same run of the tracker.
"""

from __future__ import annotations

import json
import os
import secrets
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL.Image import Image

from ivl.errors import UserError
from ivl.storage.files import write_text

IDENTITY = "tracker.json"
"""File in a run's folder: the tracker's id of the run"""


@dataclass(frozen=True)
class Table:
    """Sample answers as texts."""

    name: str
    columns: tuple[str, ...]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Table as Markdown."""
        lines: list[Sequence[str]] = [self.columns, ["---"] * len(self.columns)]
        lines += [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class tensorboard(TensorBoardLogger):
    """TensorBoard, the default.

    Args:
        save_dir: Folder of all runs; each is a folder in it.
        name: Folder between them.
        version: Name or number of the run's folder; the next free number by default.
    """

    def __init__(self, save_dir: str = "runs", name: str = "", version: int | str | None = None):
        super().__init__(save_dir, name, version)


class csv(CSVLogger):
    """A table, `metrics.csv`, and the answers as files in `answers/`; those of a run that went on are kept beside it.

    Args:
        save_dir: Folder of all runs; each is a folder in it.
        name: Folder between them.
        version: Name or number of the run's folder; the next free number by default.
        flush_logs_every_n_steps: Steps between two writes of the table.
    """

    def __init__(
        self,
        save_dir: str = "runs",
        name: str = "",
        version: int | str | None = None,
        flush_logs_every_n_steps: int = 10,
    ):
        super().__init__(save_dir, name, version, flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        table = Path(self.log_dir) / "metrics.csv"
        if self._experiment is None and table.exists():  # Lightning's writer would remove it
            table.rename(next(p for n in range(1, 10_000) if not (p := table.with_name(f"metrics-{n}.csv")).exists()))
        return super().experiment

    @rank_zero_only
    def log_answers(self, table: Table, picture: Image | None, step: int) -> None:
        """Write a panel of answers and their table."""
        folder = Path(self.log_dir) / table.name
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"step-{step:06d}.md", table.markdown() + "\n")
        if picture is not None:
            picture.save(folder / f"step-{step:06d}.png")

    @property
    def viewer(self) -> str:
        """Command that shows the run."""
        return f"column -s, -t {Path(self.log_dir) / 'metrics.csv'}"


class Tracked(TensorBoardLogger):
    """A run's folder with TensorBoard's files, whose figures, options and answers go to a tracker, too."""

    package: ClassVar[str]

    def __init__(self, save_dir: str, name: str, version: int | str | None, project: str, run_name: str | None):
        word = type(self).__name__
        if find_spec(self.package) is None:
            raise UserError(
                f"--trainer.logger {word}: expected the package {self.package}, which is not installed; "
                f'pip install "ivl[{word}]", or leave the option out for TensorBoard'
            )
        super().__init__(save_dir, name, version)
        self.project, self.run_name = project, run_name
        self._tracker: Logger | None = None

    @abstractmethod
    def connect(self, identity: str | None, run_name: str) -> tuple[Logger, str]:
        """Begin a run of the tracker, or go on with that of an identity. Returns the identity, too."""

    @abstractmethod
    def log_answers(self, table: Table, picture: Image | None, step: int) -> None:
        """Show a panel of answers and their table."""

    @property
    @abstractmethod
    def viewer(self) -> str:
        """Command that shows the run."""

    @property
    def tracker(self) -> Any:
        """Lightning's logger of the tracker, of the first process only."""
        if self._tracker is None:
            path = Path(self.log_dir) / IDENTITY
            record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            word = type(self).__name__
            self._tracker, identity = self.connect(record.get(word), self.run_name or Path(self.log_dir).name)
            if record.get(word) != identity:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(record | {word: identity}) + "\n")
        return self._tracker

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        _ = self.tracker.experiment  # a tracker that cannot be reached is known before training begins
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.tracker.log_metrics(metrics, step)

    @rank_zero_only
    def log_options(self, options: dict[str, Any]) -> None:
        """Show the options of the run."""
        self.tracker.log_hyperparams(options)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Checkpoints stay in the run's folder."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._tracker is not None:
            self._tracker.finalize(status)
            self.disconnect(status)
            self._tracker = None

    def disconnect(self, status: str) -> None:
        """End the tracker's run, where its logger does not."""


class wandb(Tracked):
    """Weights & Biases. Its own environment variables count, WANDB_MODE=offline among them.

    Args:
        save_dir: Folder of all runs; each is a folder in it.
        name: Folder between them.
        version: Name or number of the run's folder; the next free number by default.
        project: Name of the project there.
        run_name: Name of the run there; that of its folder by default.
        offline: Write the run's files only; `wandb sync` sends them later.
    """

    package = "wandb"

    def __init__(
        self,
        save_dir: str = "runs",
        name: str = "",
        version: int | str | None = None,
        project: str = "ivl",
        run_name: str | None = None,
        offline: bool = False,
    ):
        super().__init__(save_dir, name, version, project, run_name)
        self.offline = offline

    def connect(self, identity: str | None, run_name: str) -> tuple[Logger, str]:
        import wandb as library

        identity = identity or secrets.token_hex(4)
        Path(self.log_dir).mkdir(parents=True, exist_ok=True)  # it writes elsewhere where there is none
        logger = WandbLogger(run_name, self.log_dir, identity, offline=self.offline, project=self.project)
        try:
            _ = logger.experiment
        except (library.Error, OSError) as error:
            raise UserError(
                f"--trainer.logger wandb: {' '.join(str(error).split())[:200]}; run `wandb login`, or write files only "
                "with --trainer.logger.offline true"
            ) from error
        return logger, identity

    @rank_zero_only
    def log_answers(self, table: Table, picture: Image | None, step: int) -> None:
        self.tracker.log_table(f"{table.name}/table", columns=list(table.columns), data=table.rows, step=step)
        if picture is not None:
            self.tracker.log_image(f"{table.name}/panel", [picture], step=step)

    def disconnect(self, status: str) -> None:
        import wandb as library

        library.finish(0 if status == "success" else 1)

    @property
    def viewer(self) -> str:
        return f"wandb sync {Path(self.log_dir) / 'wandb'}/offline-run-*" if self.offline else f"wandb: {self.project}"


class mlflow(Tracked):
    """MLflow: a server, or a data base in the folder of all runs.

    Args:
        save_dir: Folder of all runs; each is a folder in it.
        name: Folder between them.
        version: Name or number of the run's folder; the next free number by default.
        project: Name of the experiment there.
        run_name: Name of the run there; that of its folder by default.
        tracking_uri: Address of the server; MLFLOW_TRACKING_URI, else `SAVE_DIR/mlflow.db`, by default.
    """

    package = "mlflow"

    def __init__(
        self,
        save_dir: str = "runs",
        name: str = "",
        version: int | str | None = None,
        project: str = "ivl",
        run_name: str | None = None,
        tracking_uri: str | None = None,
    ):
        super().__init__(save_dir, name, version, project, run_name)
        folder = Path(save_dir).resolve()
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.artifacts = None if uri else str(folder / "mlflow")
        self.tracking_uri = uri or f"sqlite:///{folder / 'mlflow.db'}"

    def connect(self, identity: str | None, run_name: str) -> tuple[Logger, str]:
        from mlflow.exceptions import MlflowException

        self.goes_on = identity is not None
        Path(self.save_dir or ".").mkdir(parents=True, exist_ok=True)
        logger = MLFlowLogger(
            self.project, run_name, self.tracking_uri, artifact_location=self.artifacts, run_id=identity
        )
        try:
            return logger, str(logger.run_id)  # begins the run
        except (MlflowException, OSError) as error:
            raise UserError(
                f"--trainer.logger mlflow: {self.tracking_uri}: {' '.join(str(error).split())[:200]}; give another "
                "--trainer.logger.tracking_uri"
            ) from error

    @rank_zero_only
    def log_options(self, options: dict[str, Any]) -> None:
        self.tracker.experiment.log_dict(self.tracker.run_id, options, "config.yaml")
        if not self.goes_on:  # parameters of a run cannot change there
            super().log_options(options)

    @rank_zero_only
    def log_answers(self, table: Table, picture: Image | None, step: int) -> None:
        client, run = self.tracker.experiment, self.tracker.run_id
        client.log_text(run, table.markdown(), f"{table.name}/step-{step:06d}.md")
        if picture is not None:
            client.log_image(run, picture, f"{table.name}/step-{step:06d}.png")

    @property
    def viewer(self) -> str:
        return f"mlflow ui --backend-store-uri {self.tracking_uri}"


class swanlab(Tracked):
    """SwanLab.

    Args:
        save_dir: Folder of all runs; each is a folder in it.
        name: Folder between them.
        version: Name or number of the run's folder; the next free number by default.
        project: Name of the project there.
        run_name: Name of the run there; that of its folder by default.
        offline: Write the run's files only.
    """

    package = "swanlab"

    def __init__(
        self,
        save_dir: str = "runs",
        name: str = "",
        version: int | str | None = None,
        project: str = "ivl",
        run_name: str | None = None,
        offline: bool = False,
    ):
        super().__init__(save_dir, name, version, project, run_name)
        self.offline = offline

    def connect(self, identity: str | None, run_name: str) -> tuple[Logger, str]:
        from swanlab.integration.pytorch_lightning import SwanLabLogger

        identity = identity or secrets.token_hex(11)[:21]  # its ids have so many letters
        folder = Path(self.log_dir) / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        run = {"project": self.project, "experiment_name": run_name, "logdir": str(folder), "id": identity}
        logger = SwanLabLogger(**run, mode="offline" if self.offline else None, resume="allow")
        try:
            _ = logger.experiment
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--trainer.logger swanlab: {' '.join(str(error).split())[:200]}; run `swanlab login`, or write files "
                "only with --trainer.logger.offline true"
            ) from error
        return logger, identity

    @rank_zero_only
    def log_answers(self, table: Table, picture: Image | None, step: int) -> None:
        self.tracker.log_text(f"{table.name}/table", [table.markdown()], step=step)
        if picture is not None:
            self.tracker.log_image(f"{table.name}/panel", [picture], step=step)

    def disconnect(self, status: str) -> None:
        import swanlab as library

        library.finish()

    @property
    def viewer(self) -> str:
        return f"swanlab sync {Path(self.log_dir) / 'swanlab'}/*" if self.offline else f"swanlab: {self.project}"
