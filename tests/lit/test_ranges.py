"""Numbers and names that cannot be meant: one line, before a step and before a file."""

import pytest

from ivl.__main__ import main
from ivl.lit.ranges import OF_PARTS, RANGES
from tests.lit.test_runs import config


@pytest.mark.parametrize("option", RANGES)
def test_an_option_outside_of_its_range_is_refused(base, tmp_path, capsys, option):
    path = config(base, tmp_path)
    assert main(["fit", "--config", str(path), f"--{option}", str(RANGES[option][0] - 1)]) == 2
    assert f"--{option}: expected" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("option", OF_PARTS)
def test_an_option_of_a_part_outside_of_its_range_is_refused(base, tmp_path, capsys, option):
    option, least = option.replace("PART", "language_model"), OF_PARTS[option][0]
    path = config(base, tmp_path, model__tune={"language_model": {"rank": 2}})
    assert main(["fit", "--config", str(path), f"--{option}", str(least - 1)]) == 2
    assert f"--{option}: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--trainer.val_check_interval", "1000", "must be less than or equal to the number of the training batches"),
        ("--ckpt_path", "best", "is not configured to save the best model"),
        ("--ckpt_path", "hpc", "no HPC checkpoint was found"),
    ],
)
def test_settings_that_lightning_refuses_are_told_in_one_line(base, tmp_path, capsys, option, value, words):
    assert main(["fit", "--config", str(config(base, tmp_path)), option, value]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not list(tmp_path.rglob("*.ckpt"))
