"""Devices by their names; rates beside those of Lightning's table where both are dense tensor-core rates."""

import pytest
import torch
from lightning.fabric.utilities import throughput

from ivl.estimate.hardware import DEVICES, find_device


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("h100", "H100-80GB"),
        ("a100-40gb", "A100-40GB"),
    ],
)
def test_a_device_is_found_by_what_its_driver_says(name: str, row: str):
    assert find_device(name) is DEVICES[row]


@pytest.mark.parametrize("name", ["", "NVIDIA GeForce GTX 1080", "cpu"])
def test_an_unknown_device_is_none(name: str):
    assert find_device(name) is None


@pytest.mark.parametrize(
    ("row", "driver", "dtype"),
    [
        ("H100-80GB", "NVIDIA H100 80GB HBM3", torch.bfloat16),
        ("H100-PCIe", "NVIDIA H100 PCIe", torch.bfloat16),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", torch.bfloat16),
        ("L4", "NVIDIA L4", torch.bfloat16),
        ("T4", "Tesla T4", torch.float16),
        ("V100-32GB", "Tesla V100-SXM2-32GB", torch.float16),
    ],
)
def test_rates_are_those_of_lightnings_table_where_it_has_dense_ones(row, driver, dtype, monkeypatch):
    """Its other rows are of another kind: H200 with sparsity, RTX 4090, 3090, A6000 and A40 without tensor cores."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: driver)
    assert throughput.get_available_flops(torch.device("cuda"), dtype) == pytest.approx(DEVICES[row].flops)
