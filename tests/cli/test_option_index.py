"""The index that is read from source code has the options of the full parser."""

import pytest

from ivl.cli.option_index import closest, option_index


@pytest.fixture(scope="module")
def parsed() -> set[str]:
    """Names of the options of the full parser."""
    from lightning.pytorch.cli import LightningArgumentParser
    from lightning.pytorch.trainer import Trainer

    from ivl.lit.callbacks.checkpoint import Checkpoints
    from ivl.lit.callbacks.held_out_report import HeldOutReport
    from ivl.lit.callbacks.prediction_writer import PredictionWriter
    from ivl.lit.datamodule import IvlData
    from ivl.lit.module import LitInternVL

    parser = LightningArgumentParser()
    for kind, name in ((LitInternVL, "model"), (IvlData, "data"), (Trainer, "trainer"), (Checkpoints, "checkpoint")):
        parser.add_lightning_class_args(kind, name)
    parser.add_lightning_class_args(PredictionWriter, "predictions")
    parser.add_lightning_class_args(HeldOutReport, "report")
    names = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    return {name for name in names if not name.endswith((".help", "+"))} - {"h", "help", "print_shtab"}


def test_the_index_has_every_option_of_the_parser(parsed):
    assert not parsed - option_index().keys()
    extra = {"config", "help", "print_config", "seed_everything", "demo", "threads", "ckpt_path"}
    extra |= {"weights_only", "return_predictions"}
    parts = {name for name in option_index() if name.startswith("model.tune.")}
    assert option_index().keys() - parsed - extra <= parts, "settings of a LoRA are parts of its option to the parser"


def test_every_option_of_ours_has_a_type_and_help():
    for name, option in option_index().items():
        assert option.help, name
        assert option.type or name in ("help", "print_config"), name
    index = option_index()
    assert index["data.max_length"].default == "4096" and index["model.generation.max_new_tokens"].default == "128"
    assert index["data.video.sample"].type == "Literal['middle', 'random']"
    assert index["trainer.logger"].has_parts and not index["data.video"].has_parts


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data.max_tile", "data.max_tiles"),
        ("model.generation.temperture", "model.generation.temperature"),
        ("data.batchsize", "data.batch_size"),
        ("batch-size", "data.batch_size"),
        ("model.pretrain", "model.pretrained"),
        ("trainer.epochs", "trainer.max_epochs"),
    ],
)
def test_the_closest_option_is_named(typed, meant):
    assert "did you mean" in closest(typed) and f"--{meant}" in closest(typed)


def test_nothing_is_close_to_nonsense():
    assert closest("qqqqqq") == ""
