"""Learning-rate finder: `fit --trainer.callbacks+=RateFinder`."""

import csv
from itertools import pairwise

import pytest

from ivl.__main__ import main
from ivl.lit.callbacks.rate_finder import TABLE, RateFinder
from ivl.types import UserError
from tests.lit.test_runs import config

KEEPS = {"checkpoint__monitor": "val/loss", "checkpoint__every_n_train_steps": 1, "trainer__num_sanity_val_steps": 2}
LORA = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 2}}


def test_one_option_finds_a_rate(base, tmp_path, caplog):
    """Rates grow by the same factor, parts keep their proportion, and nothing is kept of the weights."""
    path = config(base, tmp_path, model__tune=LORA, data__batch_size=2, trainer__logger=True, **KEEPS)
    more = ["--trainer.logger", "csv", "--trainer.logger.save_dir", str(tmp_path / "rates")]
    finder = ["--trainer.callbacks+=RateFinder", "--trainer.callbacks.steps", "8", "--trainer.callbacks.highest", "10"]
    with caplog.at_level("INFO"):
        assert main(["fit", "--config", str(path), *more, "--trainer.max_epochs", "9", *finder]) == 0
    run = tmp_path / "rates/version_0"
    rows = list(csv.DictReader((run / TABLE).open()))
    rates = [float(row["rate"]) for row in rows]
    assert len(rates) == 8 and rates[0] == pytest.approx(1e-7) and rates[-1] == pytest.approx(10)
    factors = [b / a for a, b in pairwise(rates)]
    assert factors == pytest.approx([factors[0]] * 7, rel=1e-4)
    logged = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train/loss"]]
    assert [float(row["train/loss"]) for row in logged] == pytest.approx([float(row["loss"]) for row in rows], rel=1e-4)
    shown = [float(value) for row in logged for name, value in row.items() if name.startswith("lr") and value]
    assert shown[-1] > 0.1 > 1e-3 > shown[0], "the optimizer had these rates"
    assert not list(run.glob("**/*.ckpt")) and not (run / "adapter").exists()
    assert "learning rates: 1e-07 to 10 in 8 steps" in caplog.text


def test_the_rate_at_which_the_loss_falls_fastest():
    finder = RateFinder(lowest=1e-5, highest=1.0, steps=6, smoothing=0.0)
    finder._taken = 6
    for step, loss in enumerate((4.0, 3.9, 3.0, 1.0, 0.9, 9.0)):
        finder.add(finder.rate(step), loss)
    assert finder.suggestion() == pytest.approx(1e-3), "3.9 to 1.0 over two steps"
    rising = RateFinder()
    for step in range(5):
        rising.add(1e-4 * 2**step, 1.0 + step)
    assert rising.suggestion() is None


@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder"])
def test_finders_that_take_our_callbacks_away_are_refused(base, tmp_path, name, capsys):
    path = config(base, tmp_path)
    assert main(["fit", "--config", str(path), f"--trainer.callbacks+={name}"]) == 2
    error = capsys.readouterr().err
    assert name in error and ("RateFinder" if name[0] == "L" else "plan") in error and "Traceback" not in error


@pytest.mark.parametrize("options", [{"lowest": 1.0, "highest": 0.1}, {"steps": 1}, {"stop_at": 1.0}])
def test_options_that_make_no_search(options):
    with pytest.raises(UserError, match="RateFinder: "):
        RateFinder(**options)
