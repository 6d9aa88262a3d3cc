"""Command line of fit, validate, test and predict, by LightningCLI."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, dict_to_namespace, set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ivl.cli.help import PURPOSES
from ivl.hub import resolve_adapter, with_revision
from ivl.hub.hints import check_adapter_folder
from ivl.lit.arguments import run_config, value_of, with_lists, with_todays_classes
from ivl.lit.callbacks.checkpoint import AtomicCheckpointIO, Checkpoints
from ivl.lit.callbacks.held_out_report import PAGE, HeldOutReport
from ivl.lit.callbacks.monitor import Progress, Watch
from ivl.lit.callbacks.prediction_writer import PredictionWriter
from ivl.lit.callbacks.rate_finder import check_tuners
from ivl.lit.callbacks.sample_answers import Pictures
from ivl.lit.callbacks.score_lines import ScoreLines
from ivl.lit.datamodule import IvlData
from ivl.lit.metrics import scores_table
from ivl.lit.module import LitInternVL
from ivl.lit.prediction import benchmark
from ivl.lit.ranges import check_ranges
from ivl.lit.run.experiment import Experiment, experiment_of, tune_settings
from ivl.lit.run.lock import run_lock
from ivl.lit.run.record import add_scores, record_of, save_record
from ivl.lit.run.resume import check_checkpoint, resolve_last, use_free_folder
from ivl.lit.run.signals import STOP
from ivl.lit.screen import clear_screen
from ivl.lit.strategies.deepspeed import check_installed, weights_beside
from ivl.lit.strategies.peers import Peers
from ivl.lit.strategies.precision import choose_precision, device_has_bf16
from ivl.lit.trackers import Tracked, csv
from ivl.lit.types import IvlTrainer, as_data, as_lit
from ivl.options import DataOptions, Tune
from ivl.run import Run
from ivl.storage.files import atomic_path
from ivl.types import UserError


class SaveConfig(SaveConfigCallback):
    """Config, versions and digests of the data beside each fit; under new names where a run goes on in its folder."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage == "fit" and not as_lit(module).adapter:
            self._save(trainer, module)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if as_lit(module).adapter:  # what trains is known once it has been read
            self.config.model.tune = dict_to_namespace(tune_settings(as_lit(module).tune))
            self._save(trainer, module)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        folder = trainer.log_dir  # asks all ranks
        if folder is None or not trainer.is_global_zero or self.already_saved:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        endings = itertools.chain([""], (f"-{n}" for n in itertools.count(1)))
        ending = next(ending for ending in endings if not (Path(folder) / f"config{ending}.yaml").exists())
        with atomic_path(Path(folder) / f"config{ending}.yaml") as path:
            self.parser.save(self.config, path, skip_none=False)
        for logger in trainer.loggers:
            if isinstance(logger, Tracked):
                logger.log_options(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        record = record_of(trainer, as_data(trainer), as_lit(module).pretrained, self.config.seed_everything)
        save_record(Path(folder) / f"versions{ending}.json", record)
        self.already_saved = True


class IvlCLI(LightningCLI):
    """LightningCLI with one link (`model.pretrained` → `data.pretrained`) and the callbacks every run has.

    `prepare_demo` makes the embedded demo in a folder; it is passed in, since commands stand above this floor.
    """

    model: LitInternVL
    trainer: IvlTrainer
    datamodule: IvlData
    peers: Peers
    prepare_demo: Callable[[Path], None]
    experiment: Experiment | None = None
    """Identity of the run; of a fit only"""
    changed_options: tuple[str, ...] = ()
    """Options of a resumed fit that differ from those of its checkpoint's run"""
    only: str
    """Name of the command; only its options are read, as those of all four take seconds more"""

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Return the typed command alone, with the arguments that Lightning leaves out of it."""
        return {cls.only: LightningCLI.subcommands()[cls.only]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--demo",
            type=str | None,
            default=None,
            help="Make the embedded demo (data and a tiny model) in this folder first, where it is missing.",
        )
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="Threads of torch on a CPU; null: one a core. A tiny model leaves cores to the loader.",
        )
        parser.link_arguments("model.pretrained", "data.pretrained")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_top_k": 1})
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(HeldOutReport, "report")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_ranges(config)
        config.weights_only = True  # a checkpoint is never unpickled
        if (name := with_revision(str(config.model.pretrained))) != config.model.pretrained:
            config.model.pretrained = config.data.pretrained = name
            sys.argv += ["--model.pretrained", name]  # for the processes that Lightning starts
        self._settle_tune(config)
        check_installed(config.trainer.strategy)
        self._set_threads(config.threads)
        if config.demo:
            self.prepare_demo(Path(config.demo))
        if config.model.adapter:  # before the base is downloaded
            check_adapter_folder(resolve_adapter(config.model.adapter))
        if self.subcommand == "fit":
            self._place_run(config)
        elif config.get("ckpt_path") == "last":
            resolve_last(config, resume=False)
        if config.data.split == "run-validation":
            if (run := Run.of(config.get("ckpt_path"))) is None:
                raise UserError(
                    "--data.split run-validation: expected --ckpt_path with a checkpoint in the folder of its run"
                )
            config.data.split = str(run.folder)
        if self.subcommand == "predict" and config.data.task:
            for line in benchmark.apply(config, sys.argv):
                self._say(f"{config.data.task}: {line}")
        if self.subcommand == "predict":
            if value_of(sys.argv, "--data.max_length") and config.data.max_prompt_length is None:
                config.data.max_prompt_length = config.data.max_length  # a config's is of training
            config.return_predictions = False  # they are written as they come
        self._settle_screen(config)
        self._choose_precision(config)

    def _set_threads(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)

    def _settle_screen(self, config: Namespace) -> None:
        """One table of scores, and no folder of a logger that holds nothing else."""
        if self.subcommand in ("validate", "test"):
            config.verbose = False  # `_report` prints the table
        holds_answers = self.subcommand == "predict" and not config.predictions.file
        writes_files = str(getattr(config.trainer.logger, "class_path", "")).endswith(
            ("TensorBoardLogger", "CSVLogger")
        )
        typed = any(word.startswith("--trainer.logger") for word in sys.argv)
        if self.subcommand != "fit" and writes_files and not holds_answers and not typed:
            config.trainer.logger = False

    def _settle_tune(self, config: Namespace) -> None:
        """Fill in the defaults of model.tune; a checkpoint replaces the adapter that its run began with."""
        if config.model.tune is None:
            config.model.tune = dict_to_namespace(asdict(Tune()))
        if self.subcommand != "fit" and config.get("ckpt_path") and config.model.adapter:
            if value_of(sys.argv, "--model.adapter"):
                raise UserError("--ckpt_path and --model.adapter: expected one of them, found both")
            if self.subcommand == "predict" or config.model.objective == "sft":
                config.model.adapter = None  # else rewards are measured from it

    def _place_run(self, config: Namespace) -> None:
        """Choose the folder and checkpoint of a fit. Other experiments' runs are never overwritten."""
        self.experiment = experiment_of(config)
        if config.ckpt_path == "last":
            resolve_last(config, resume=True, experiment=self.experiment)
        elif config.ckpt_path:
            self.changed_options = tuple(check_checkpoint(config.ckpt_path, self.experiment))
        use_free_folder(config)

    def after_instantiate_classes(self) -> None:
        self.model.experiment, self.model.changed_options = self.experiment, self.changed_options

    def _parse_ckpt_path(self) -> None:
        """Skip Lightning's reading of the file: its hyperparameters are not in our checkpoints."""

    def before_predict(self) -> None:
        self._writer().checkpoint = self.config.predict.ckpt_path

    def _writer(self) -> PredictionWriter:
        return next(c for c in self.trainer.callbacks if isinstance(c, PredictionWriter))

    def _choose_precision(self, config: Namespace) -> None:
        trainer = config.trainer
        if self.subcommand == "predict" or trainer.get("precision") is None:
            return
        accelerator = trainer.accelerator if isinstance(trainer.accelerator, str) else "auto"
        trainer.precision, notice = choose_precision(str(trainer.precision), device_has_bf16(accelerator))
        if notice:
            rank_zero_info(notice)
        if trainer.precision == "16-mixed" and config.get("model.optimizer.init_args.fused"):
            config["model.optimizer.init_args.fused"] = False
            rank_zero_info("model.optimizer: not fused, as 16-mixed's loss scale would be taken out too late")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init[self.subcommand].trainer
        check_tuners(options.callbacks or [])
        if options.enable_progress_bar is not False and not any(
            isinstance(c, ProgressBar) for c in options.callbacks or []
        ):
            kwargs["callbacks"] = [*(options.callbacks or []), Progress()]
        self.peers = Peers()
        kwargs["callbacks"] = [*kwargs.get("callbacks", options.callbacks or []), self.peers]
        kwargs["callbacks"] += [ScoreLines()] if self.subcommand == "fit" else []
        plugins = options.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            if isinstance(error, UserError) or "class_path" not in str(error):
                raise
            class_path = str(error).partition("class_path '")[2].partition("'")[0]
            raise UserError(f"{class_path}: {_cause(error)}; install what it needs, or choose another class") from error

    def _run_subcommand(self, subcommand: str) -> None:
        folder = self.trainer.log_dir
        locks = subcommand == "fit" and folder is not None and self.trainer.is_global_zero
        lock = (
            run_lock(Path(self._checkpoints().dirpath or Path(str(folder)) / "checkpoints")) if locks else nullcontext()
        )
        with lock:
            try:
                super()._run_subcommand(subcommand)
            except Exception as error:
                if (explained := self.peers.explained(error)) is error:
                    raise
                raise explained from error

    def _checkpoints(self) -> Checkpoints:
        return next(c for c in self.trainer.callbacks if isinstance(c, Checkpoints))

    def after_fit(self) -> None:
        self._report()
        folder = self.trainer.log_dir  # asks all ranks
        if folder and self.model.scores and self.trainer.is_global_zero:
            add_scores(Path(folder), self.model.scored_at, self.model.scores)
        checkpoints = self._checkpoints()
        lines = [
            f"  {logger.viewer}" if isinstance(logger, csv | Tracked) else f"  tensorboard --logdir {logger.log_dir}"
            for logger in self.trainer.loggers
            if isinstance(logger, csv | TensorBoardLogger)
        ]
        if folder and (Path(folder) / PAGE).is_file():
            lines.append(f"  open {Path(folder) / PAGE}  # answers to held-out rows, in a browser")
        for path, description in checkpoints.next_checkpoints(self.trainer):
            command = f"python -m ivl predict --ckpt_path {weights_beside(path)} --data.predict FILE.jsonl"
            lines.append(f"  {command}  # {description}")
        self._say("\n".join(["\nNext:", *lines]))

    def after_validate(self) -> None:
        self._report()

    after_test = after_validate

    def after_predict(self) -> None:
        if name := self.datamodule.options.task:
            self._say(f"\nNext:\n  python -m ivl score {self._writer().path} --task {name} --html report.html")

    @rank_zero_only
    def _report(self) -> None:
        step, data, last = self.model.scored_at, self.datamodule, self.trainer.global_step
        if self.model.scores:
            when = f" (after step {step} of {last})" if self.subcommand == "fit" and step != last else ""
            print(f"\n{scores_table(self.model.scores, with_loss=self.subcommand != 'fit')}{when}")
            self._report_measures()
        elif self.subcommand == "fit" and data.options.holds_out:
            print(
                f"\nheld-out rows: no validation fell into the run's {last} steps; `python -m ivl validate` scores them"
            )

    def _report_measures(self) -> None:
        """Print the numbers of a validation or test that are not scores of kinds of rows, such as rewards of pairs."""
        known = {f"{kind}/{name}".strip("/") for kind, values in self.model.scores.items() for name in values}
        for name, value in self.trainer.callback_metrics.items() if self.subcommand != "fit" else ():
            stage, _, short = name.partition("/")
            if stage in ("val", "test") and short not in known:
                print(f"{short}  {float(value):.4g}")

    @rank_zero_only
    def _say(self, text: str) -> None:
        print(text, flush=True)


class OptionReader(IvlCLI):
    """Command line that reads and checks the options, and instantiates nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    instantiate_classes = after_instantiate_classes = _set_seed = before_instantiate_classes

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _cause(error: BaseException) -> str:
    """Return the innermost error of a chain, in one line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return " ".join(str(error).split())[:300]


def read(argv: list[str]) -> Namespace:
    """Return all options of `fit`: configs merged, defaults filled in; nothing is instantiated or run."""
    argv_before = sys.argv
    try:
        return _cli(OptionReader, ["fit", *argv]).config["fit"]
    finally:
        sys.argv = argv_before


def data_options(fit: Namespace) -> DataOptions:
    """Return the options of data among those of `fit`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataOptions, "data")
    data = fit.data.clone()
    data.pop("pretrained")
    return parser.instantiate(Namespace(data=data)).data


def main(argv: list[str], prepare_demo: Callable[[Path], None]) -> int:
    """Run one of Lightning's commands. Errors are raised: `ivl.__main__` prints them."""
    IvlCLI.prepare_demo = staticmethod(prepare_demo)
    with STOP, clear_screen():
        _cli(IvlCLI, argv)
    return 0


def _cli(kind: type[IvlCLI], argv: list[str]) -> IvlCLI:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    sys.argv = [
        "ivl",
        *with_todays_classes(run_config(with_lists(argv))),
    ]  # Lightning reads it again when it starts further processes
    kind.only = name = argv[0]
    usage = f"python -m ivl {name} --config FILE [--config FILE ...] [--OPTION VALUE ...]"
    common = {"exit_on_error": False}
    return kind(
        LitInternVL,
        IvlData,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        trainer_defaults={
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": ""}},
            "callbacks": [Watch(), Pictures()],
            "enable_model_summary": False,  # ivl.finetune.tune.table says more
            "log_every_n_steps": 10,
            "use_distributed_sampler": False,  # the data module gives every rank its rows
        },
        parser_kwargs=common | {name: common | {"usage": usage, "description": PURPOSES[name]}},
    )
