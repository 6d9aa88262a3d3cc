"""Steps that are not finite are skipped exactly and named."""

import logging

import pytest
import torch

from ivl.lit.callbacks.nonfinite import FiniteLoss
from ivl.types import Conversation, Message, UserError, row_names


def rows(*names: str) -> list[Conversation]:
    return [
        Conversation((Message("user", ("?",)),), id=name, where=f"train.jsonl:{n + 1}") for n, name in enumerate(names)
    ]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


def train(make, gradients: list[float], patience: int = 100) -> tuple[torch.Tensor, FiniteLoss]:
    """One weight, its gradients given; those that are not finite come with a loss that is not."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight])
    finite = FiniteLoss(patience, lag=3)
    for number, gradient in enumerate(gradients):
        loss = torch.tensor(gradient)
        finite.add(rows(f"a{number}", f"b{number}"), loss)
        weight.grad = torch.full((3,), gradient)
        finite.close(number, ~torch.isfinite(loss), optimizer)
        optimizer.step()
        finite.release(optimizer)
    finite.read()
    return weight.detach(), finite


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(name):
    nan, inf = float("nan"), float("inf")
    clean, _ = train(OPTIMIZERS[name], [1.0, -2.0, 0.5, 3.0])
    spoilt, _ = train(OPTIMIZERS[name], [1.0, nan, -2.0, inf, -inf, 0.5, 3.0])
    assert torch.equal(spoilt, clean)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_are_named_and_the_run_stops_after_so_many_in_a_row(name, caplog):
    nan = float("nan")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match=r"2 steps in a row, up to step 4; rows: .*\(a4\)"),
    ):
        train(OPTIMIZERS[name], [1.0, nan, 1.0, nan, nan, 1.0], patience=2)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["step 1", "step 3", "step 4"]
    assert "train.jsonl:1 (a1), train.jsonl:2 (b1)" in caplog.text


def test_an_optimizer_that_cannot_skip_is_not_said_to(caplog):
    finite = FiniteLoss(patience=2)
    finite.add(rows("a"), torch.tensor(float("nan")))
    with caplog.at_level(logging.WARNING):
        finite.close(1, torch.tensor(True), object())  # DeepSpeed's is no torch optimizer
    assert [r.getMessage() for r in caplog.records] == [
        "step 1: its loss or gradients are not finite; rows: train.jsonl:1 (a)"
    ]
    finite.add(rows("a"), torch.tensor(float("nan")))
    with pytest.raises(UserError, match="2 steps in a row"):
        finite.close(2, torch.tensor(True), object())


def test_only_the_micro_batch_that_was_not_finite_is_named(caplog):
    finite = FiniteLoss(patience=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    for name, loss in (("good", 1.0), ("bad", float("inf")), ("fine", 2.0)):
        finite.add(rows(name), torch.tensor(loss))
    finite.close(7, torch.tensor(True), optimizer)
    assert "(bad)" in caplog.text and "good" not in caplog.text and "fine" not in caplog.text


def test_many_rows_are_counted():
    assert row_names(rows(*"abcdefghij")).endswith("train.jsonl:8 (h) and 2 more")
