"""Device of the tests of this folder: a GPU; `IVL_GPU_TESTS=cpu pytest tests/gpu` tries them without one."""

import os

import pytest
import torch

ON_CPU = os.environ.get("IVL_GPU_TESTS") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU. Products in float32 are exact there, so that it can be compared with the CPU."""
    if ON_CPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU (IVL_GPU_TESTS=cpu tries these tests on the CPU)")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)
