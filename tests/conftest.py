"""Fixtures every test may use. Recorded references live outside the repository: tests that read them skip without."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("IVL_SHARED", REPO.parent / "shared"))

CACHE = tempfile.mkdtemp(prefix="ivl-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE  # the user's own is left as it is, by the processes of tests too

torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded references and media."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"{SHARED}/golden is missing: recorded references (set IVL_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Recorded inputs and outputs of the reference implementation."""
    return shared / "golden"
