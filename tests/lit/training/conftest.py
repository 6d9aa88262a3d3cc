"""Fixtures of preference tuning; modules on other rows have a `base` of their own."""

from pathlib import Path

import pytest

from tests.lit.rows import write_pairs
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Folder with a tiny checkpoint, and pairs to train on and to hold out."""
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_pairs(folder / "data", 8, "train.jsonl")
    write_pairs(folder / "data", 5, "val.jsonl")
    return folder
