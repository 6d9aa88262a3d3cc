"""Fixtures of runs."""

from pathlib import Path

import pytest

from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Folder with a tiny checkpoint, and rows to train on and to hold out."""
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_rows(folder / "data")
    write_rows(folder / "data", 5, "val.jsonl")
    return folder
