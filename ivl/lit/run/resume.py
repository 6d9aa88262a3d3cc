"""Resume: the checkpoint of `--ckpt_path last`, and a folder free of other runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from ivl.checkpoint.newest import furthest, newest_checkpoint, read_head, read_heads
from ivl.finetune.tune import trainable_state
from ivl.lit.run.experiment import BATCHES, COUNTED, LENGTHS, ROWS, WEIGHTS, Experiment, check_same, differences
from ivl.types import UserError, first_few

if TYPE_CHECKING:
    from ivl.model.internvl import InternVL

ALL = (*WEIGHTS, *ROWS, *LENGTHS, *BATCHES, *COUNTED)


# -- --ckpt_path last ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folders:
    """Folders of the runs of a config, by its logger or by `checkpoint.dirpath`."""

    settings: Namespace
    """Options of the logger; empty without them"""
    runs: Path
    dirpath: Path | None

    @classmethod
    def of(cls, config: Namespace) -> Folders:
        logger = config.trainer.logger[0] if isinstance(config.trainer.logger, list) else config.trainer.logger
        settings = logger.init_args if isinstance(logger, Namespace) and "init_args" in logger else Namespace()
        runs = Path(settings.get("save_dir") or config.trainer.default_root_dir or ".") / (settings.get("name") or "")
        return cls(settings, runs, Path(config.checkpoint.dirpath) if config.checkpoint.dirpath else None)

    @property
    def version(self) -> str | None:
        """Name of the run's folder, if the config has one."""
        version = self.settings.get("version")
        return version if version is None or isinstance(version, str) else f"version_{version}"

    @property
    def pattern(self) -> str:
        return str(self.dirpath or self.runs / (self.version or "*") / "checkpoints")

    def all(self) -> list[Path]:
        if self.dirpath is not None:
            return [self.dirpath]
        names = [self.version, *(f"{self.version}-{n}" for n in range(1, 100))] if self.version else ["*"]
        return [folder for name in names for folder in sorted(self.runs.glob(f"{name}/checkpoints"))]


def resolve_last(config: Namespace, resume: bool, experiment: Experiment | None = None) -> None:
    """Replace `--ckpt_path last` by an undamaged checkpoint; a fit without one begins anew.

    A fit takes the one of the highest step among those of the same experiment, and goes on in its folder. Raises
    UserError where all checkpoints are damaged, or another command finds none.
    """
    folders = Folders.of(config)
    if not resume or experiment is None:
        newest = newest_checkpoint(folders.all(), rank_zero_warn)
        if newest is None:
            raise UserError(f"--ckpt_path last: no whole checkpoint in {folders.pattern}; give the file of one")
        rank_zero_info(f"--ckpt_path last: {newest}")
        config.ckpt_path = str(newest)
        return
    paths = [path for folder in folders.all() for path in sorted(folder.glob("*.ckpt"))]
    heads = read_heads(paths, rank_zero_warn)
    same = [head for head in heads if head.experiment is None or not differences(head.experiment, experiment, ALL)]
    head = furthest(same, rank_zero_warn)
    if head is None and paths and len(same) == len(heads):
        raise UserError(f"--ckpt_path last: no whole checkpoint in {folders.pattern}; give the file of one")
    if head is not None:
        rank_zero_info(f"--ckpt_path last: {head.path} (step {head.step})")
        if folders.dirpath is None and "version" in folders.settings:
            folders.settings.version = head.path.parent.parent.name
    elif heads:
        other = max(heads, key=lambda head: head.path.stat().st_mtime_ns)
        lines = first_few(differences(other.experiment or {}, experiment, ALL), 3)
        rank_zero_info(
            f"--ckpt_path last: nothing of this experiment in {folders.pattern} yet, the run begins "
            f"({other.path.parent.parent}: {lines})"
        )
    else:
        rank_zero_info(f"--ckpt_path last: nothing in {folders.pattern} yet, the run begins")
    config.ckpt_path = None if head is None else str(head.path)


def use_free_folder(config: Namespace) -> None:
    """Give a run a new folder where the config's folder holds checkpoints of another run.

    Raises UserError where that is `checkpoint.dirpath`.
    """
    folders = Folders.of(config)
    checkpoint = Path(config.ckpt_path).resolve() if config.ckpt_path else None
    if folders.dirpath is not None:
        if checkpoint is None and any(folders.dirpath.glob("*.ckpt")):
            raise UserError(
                f"--checkpoint.dirpath {folders.dirpath}: another run's checkpoints stand there; give another folder, "
                "or go on with that run by --ckpt_path"
            )
        return
    version = folders.version
    if version is None:
        here = folders.runs / "checkpoints"
        goes_on = checkpoint is not None and here.resolve() in checkpoint.parents
        if not folders.settings and not goes_on and any(here.glob("*.ckpt")):
            raise UserError(
                f"{here}: another run's checkpoints stand there, and without a logger a run has no folder of its own; "
                "give --trainer.default_root_dir or --checkpoint.dirpath, or go on with that run by --ckpt_path"
            )
        return

    def taken(name: str) -> bool:
        folder = folders.runs / name / "checkpoints"
        within = checkpoint is not None and folder.resolve() in checkpoint.parents
        return not within and any(folder.glob("*.ckpt"))

    if taken(version):
        name = next(name for n in range(1, 10_000) if not taken(name := f"{version}-{n}"))
        rank_zero_info(f"{folders.runs / version} holds another run, so this one goes to {folders.runs / name}")
        folders.settings.version = name


def check_tensors(model: InternVL, state: Mapping[str, Tensor]) -> None:
    """Raise UserError where a checkpoint does not hold exactly what trains here, by names and shapes."""
    expected = {f"model.{n}": p for n, p in trainable_state(model).items()}
    names, saved = set(expected), set(state)
    if names != saved:
        different = sorted(names ^ saved)
        raise UserError(
            f"--ckpt_path: the checkpoint does not hold what model.tune trains: {len(names - saved)} tensors are "
            f"missing and {len(saved - names)} unexpected, {different[0]} among them; use the run's own config.yaml"
        )
    for name, tensor in state.items():
        if expected[name].shape != tensor.shape:
            raise UserError(
                f"--ckpt_path: {name}: shape {tuple(tensor.shape)} in the checkpoint, {tuple(expected[name].shape)} by "
                "model.tune and model.pretrained; use the run's own config.yaml"
            )


def check_checkpoint(path: str, experiment: Experiment) -> list[str]:
    """Describe the options that a fit from this checkpoint changes; see `check_same`."""
    head = read_head(Path(path))
    if head is None or head.experiment is None:  # an error is raised when it is read, or by `check_tensors`
        return []
    return check_same(path, head.experiment, experiment, head.epoch_ended)
