"""Screen of a run: needless remarks are left out, others are not, and messages stand on lines of their own."""

import io
import logging
import warnings

from tqdm import tqdm

from ivl.lit.screen import clear_screen

NEEDLESS = (
    "Total length of `list` across ranks is zero. Please make sure this was your intention.",
    "The number of training batches (3) is smaller than the logging interval Trainer(log_every_n_steps=10).",
    "Checkpoint directory /tmp/run/checkpoints exists and is not empty.",
    "Found 12 module(s) in eval mode at the start of training.",
)


def test_needless_warnings_are_left_out_and_others_are_not():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with clear_screen():
            for text in (*NEEDLESS, "the loss is not finite"):
                warnings.warn(text, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["the loss is not finite"]


def test_remarks_of_lightning_are_left_out_and_others_are_not(caplog):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with clear_screen(), caplog.at_level("INFO"):
        logger.info("try litlogger")
        logger.info("TPU available: False, using: 0 TPU cores")
        logger.info("GPU available")
    assert caplog.messages == ["GPU available"]


def test_a_message_does_not_run_into_the_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    logger = logging.getLogger("lightning.pytorch")
    handler = logging.StreamHandler(screen)
    logger.addHandler(handler)
    try:
        with clear_screen(), tqdm(total=2, desc="Epoch 0", file=screen) as bar:
            bar.update()
            logger.warning("adapter in runs/version_0/adapter")
    finally:
        logger.removeHandler(handler)
    (line,) = [line for line in screen.getvalue().split("\n") if "adapter in" in line]
    assert line.split("\r")[-1] == "adapter in runs/version_0/adapter"
