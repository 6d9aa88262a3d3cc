"""Run: the folder that a fit leaves, with its config, checkpoints, adapter and held-out rows.

    runs/version_0/
      config.yaml              options of the fit
      checkpoints/last.ckpt    state of the fit, and of other steps beside it
      adapter/                 the LoRA of the last step, in PEFT's form
      validation-split.json    rows that data.val_fraction held out
      versions.json            record of the fit: command, versions, rows, base, devices
      scores.json              scores of the held-out rows at the end of the fit

What needs torch is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ivl.errors import UserError, note
from ivl.options.tuning import Tune

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
RECORD, SCORES = "versions.json", "scores.json"
WEIGHTS = "weights.pt"
"""File of a run's trained weights, beside checkpoints that are folders (DeepSpeed's)"""

MOVED_CLASSES = {
    "ivl.lit.split.LayerSplit": "ivl.lit.strategies.layer_split.LayerSplit",
    "ivl.lit.sharded.Sharded": "ivl.lit.strategies.fsdp.Sharded",
    "ivl.lit.watch.Watch": "ivl.lit.callbacks.monitor.Watch",
    "ivl.lit.watch.Progress": "ivl.lit.callbacks.monitor.Progress",
    "ivl.lit.callbacks.Pictures": "ivl.lit.callbacks.sample_answers.Pictures",
}
"""Class path in configs of earlier versions → its place today"""


def todays_classes(text: str) -> tuple[str, list[str]]:
    """Replace class paths of earlier versions in a text. Returns the text, and a notice for each."""
    notices = []
    for before, now in MOVED_CLASSES.items():
        if before in text:
            text = text.replace(before, now)
            notices.append(f"{before} is {now} today, and read as that")
    return text, notices


@dataclass(frozen=True)
class Run:
    """Folder of a run. What is asked of it is read then, and a UserError says what is missing."""

    folder: Path

    @classmethod
    def of(cls, path: Path | str | None) -> Run | None:
        """Return the run that a checkpoint, or a folder, belongs to; None where there is no config beside it."""
        if path is None:
            return None
        folders = [Path(path), *Path(path).parents[:3]]
        return next((cls(folder) for folder in folders if (folder / CONFIG).is_file()), None)

    @classmethod
    def named(cls, path: Path | str, option: str = "") -> Run:
        """Return the run of a path, which an option may name. Raises UserError where there is none."""
        if (run := cls.of(path)) is None:
            where = f"{option} {path}".strip()
            raise UserError(f"{where}: no {CONFIG} in it; expected the folder of a run, such as runs/version_0")
        return run

    @cached_property
    def config(self) -> dict[str, Any]:
        """Options of the fit, by section."""
        path = self.folder / CONFIG
        if not path.is_file():
            raise UserError(f"{self.folder}: no {CONFIG} in it; expected the folder of a run")
        try:
            config = yaml.safe_load(todays_classes(path.read_text(encoding="utf-8"))[0])
            _ = config["model"]["pretrained"], Tune.from_dict(config["model"].get("tune") or {})
        except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the config of a run ({error!r}); expected it as `fit` left it") from error
        return config

    @property
    def model(self) -> dict[str, Any]:
        """Options of the model."""
        return self.config["model"]

    @property
    def data(self) -> dict[str, Any]:
        """Options of data."""
        return self.config.get("data") or {}

    @property
    def base(self) -> str:
        """Folder or name of the model that it began with."""
        return self.model["pretrained"]

    @property
    def tune(self) -> Tune:
        return Tune.from_dict(self.model.get("tune") or {})

    @property
    def adapter(self) -> Path | None:
        """PEFT folder of its LoRA; None where it has none."""
        folder = self.folder / "adapter"
        return folder if (folder / "adapter_config.json").is_file() else None

    @property
    def fits(self) -> list[tuple[Path, dict[str, Any]]]:
        """Config and record of each fit that wrote into the folder: the first, and those that went on with it.

        A record is empty where there is none, as in the runs of earlier versions.
        """
        configs = sorted(self.folder.glob("config*.yaml"), key=lambda path: (len(path.name), path.name))
        records = (path.with_name(path.name.replace("config", "versions")).with_suffix(".json") for path in configs)
        return [(path, _read(record) if record.is_file() else {}) for path, record in zip(configs, records)]

    @property
    def scores(self) -> list[dict[str, Any]]:
        """Step and scores of held-out rows at each end of a fit, the last step last; none where none are recorded."""
        path = self.folder / SCORES
        entries = _read(path).get("fits", []) if path.is_file() else []
        return sorted(entries, key=lambda entry: entry["step"])

    def last_checkpoint(self, warn: Callable[[str], None] = note) -> Path:
        """Return the undamaged checkpoint of the highest step. `warn` is told of damaged ones."""
        from ivl.checkpoint.newest import newest_checkpoint

        checkpoint = newest_checkpoint([self.folder / CHECKPOINTS], warn)
        if checkpoint is None:
            none = "no whole checkpoint" if any(self.folder.glob(f"{CHECKPOINTS}/*.ckpt")) else "no checkpoint"
            raise UserError(
                f"{self.folder}: {none} in {CHECKPOINTS}/; expected the folder of a run that saved one (*.ckpt)"
            )
        return checkpoint

    # -- held-out rows -------------------------------------------------------------------------------------------

    @property
    def split_file(self) -> Path | None:
        """Last file of rows that the run held out by val_fraction; None where there is none."""
        from ivl.data.sets.holdout import remembered

        return remembered(self.folder)

    @property
    def validation_files(self) -> str | list[str]:
        """Files of rows that the run held out by `data.val`."""
        if not (files := self.data.get("val")):
            raise UserError(
                f"--data.split: {self.folder} held out no rows by data.val or data.val_fraction; give --data.predict"
            )
        return files


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file that a fit wrote. Raises UserError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected it as `fit` left it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, as `fit` left it, found {type(value).__name__}")
    return value


def run_and_checkpoint(path: str | Path, option: str, adapter_option: str) -> tuple[Run, Path]:
    """Return a run and one of its checkpoints: the file that `path` is, or the last whole one of a run's folder.

    Raises UserError where there is none. `option`: of `path`; `adapter_option`: where an adapter's folder goes instead.
    """
    path = Path(path)
    if path.suffix != ".ckpt" and path.name != WEIGHTS:
        if not path.is_dir():
            raise UserError(
                f"{option} {path}: no such folder; expected a run, such as runs/version_0, or one of its .ckpt files"
            )
        if not (path / CONFIG).is_file() and (path / "adapter_config.json").is_file():
            raise UserError(f"{option} {path}: is an adapter, not a run; give it with {adapter_option}")
        path = Run(path).last_checkpoint()
    if not path.exists():
        raise UserError(
            f"{option} {path}: no such file; expected a checkpoint of a run, such as RUN/checkpoints/last.ckpt"
        )
    if (run := Run.of(path)) is None:
        raise UserError(f"{option} {path}: no config.yaml of its run beside it; expected the folder as the run left it")
    return run, path


def weights_of(checkpoint: Path) -> Path:
    """Return the one file with a checkpoint's weights: itself, or the one beside a folder of DeepSpeed's."""
    beside = checkpoint.with_name(WEIGHTS)
    return beside if checkpoint.is_dir() and beside.is_file() else checkpoint
