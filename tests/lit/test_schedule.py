"""Warm-up and decay, step by step."""

import math

import pytest
import torch

from ivl.lit.schedule import Warmup


def rates(total: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Warmup(optimizer, total, **settings)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warm_up_rises_to_the_peak_in_the_given_number_of_steps():
    assert rates(10, warmup=4, decay="constant") == pytest.approx([0.4, 0.8, 1.2, 1.6] + [2.0] * 6)


def test_cosine_falls_to_the_floor():
    seen = rates(11, warmup=0.1, floor=0.1)  # one step of warm-up, ten of decay
    assert seen[1] == pytest.approx(2.0)
    assert seen[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert seen[-1] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.9))))


def test_linear_falls_by_equal_steps():
    assert rates(5, warmup=0, decay="linear") == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
