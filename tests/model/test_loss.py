"""The loss of supervised tokens: its weights, its smoothing, and that logits never exist all at once."""

import pytest
import torch
import torch.nn.functional as F

from ivl.model.loss import loss_weights, losses
from ivl.types import IGNORE

D, V = 8, 50


def batch(lengths=(9, 5, 7), packed=False, seed=0):
    """Head, hidden states, labels and row numbers of rows with unequally many supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(D, V)
    rows = [torch.randn(n, D, generator=generator) for n in lengths]
    labels = [torch.randint(0, V, (n,), generator=generator) for n in lengths]
    for n, row in enumerate(labels):
        row[: n + 1] = IGNORE
    if packed:
        ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
        return head, torch.cat(rows)[None], torch.cat(labels)[None], ids, rows, labels
    hidden = torch.zeros(len(rows), max(lengths), D)
    padded = torch.full((len(rows), max(lengths)), IGNORE)
    for n, (row, label) in enumerate(zip(rows, labels)):
        hidden[n, : len(row)], padded[n, : len(row)] = row, label
    return head, hidden, padded, None, rows, labels


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_reductions_are_the_published_ones(reduction, smoothing, packed):
    head, hidden, labels, ids, rows, each = batch(packed=packed)
    weights = loss_weights(labels, ids, 3, reduction)
    out = losses(head, hidden, labels, ids, 3, weights, chunk=4, smoothing=smoothing)
    total = count = 0.0
    for n, (row, label) in enumerate(zip(rows, each)):
        nll = F.cross_entropy(
            head(row[:-1]), label[1:], reduction="sum", label_smoothing=smoothing, ignore_index=IGNORE
        )
        tokens = int((label[1:] != IGNORE).sum())
        assert out.row_losses[n].item() == pytest.approx(nll.item(), rel=1e-5)
        assert out.row_tokens[n] == tokens
        weight = {"token": 1, "sample": 1 / tokens, "square": tokens**-0.5}[reduction]
        total, count = total + weight * nll, count + weight * tokens
    assert out.loss_sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert out.weight_sum.item() == pytest.approx(count, rel=1e-5)
    assert out.loss.item() == pytest.approx(total.item() / count, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_weights_of_rows_multiply_losses_and_count_in_the_denominator(reduction, packed):
    head, hidden, labels, ids, rows, each = batch(packed=packed)
    of_row = torch.tensor([0.25, 1.0, 3.0])
    out = losses(head, hidden, labels, ids, 3, loss_weights(labels, ids, 3, reduction), chunk=4, row_weights_R=of_row)
    total = count = 0.0
    for row, label, factor in zip(rows, each, of_row.tolist()):
        nll = F.cross_entropy(head(row[:-1]), label[1:], reduction="sum", ignore_index=IGNORE)
        tokens = int((label[1:] != IGNORE).sum())
        weight = factor * {"token": 1, "sample": 1 / tokens, "square": tokens**-0.5}[reduction]
        total, count = total + weight * nll, count + weight * tokens
    assert out.loss_sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert out.weight_sum.item() == pytest.approx(count, rel=1e-5)
    assert out.loss.item() == pytest.approx(total.item() / count, rel=1e-5)
    plain = losses(head, hidden, labels, ids, 3)
    assert torch.equal(out.row_losses, plain.row_losses) and torch.equal(out.row_tokens, plain.row_tokens)


def test_nothing_supervised_is_a_loss_of_zero_with_a_gradient():
    head, hidden, labels, ids, *_ = batch()
    hidden.requires_grad_()
    out = losses(head, hidden, torch.full_like(labels, IGNORE), ids, 3)
    out.loss.backward()
    assert out.loss == 0 and hidden.grad.abs().max() == 0


def peak(tokens: int, vocabulary: int, chunk: int) -> tuple[int, int]:
    """The most numbers in one tensor that is made, and all that is kept for backward."""
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (out if isinstance(out, (list, tuple)) else [out]) if torch.is_tensor(t))
            return out

    head = torch.nn.Linear(D, vocabulary).requires_grad_(False)
    hidden = torch.randn(1, tokens, D, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with Watch():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = losses(head, hidden, labels, None, 1, chunk=chunk)
        out.loss_sum.backward()
    return max(made), sum(kept.values())


def test_memory_does_not_grow_with_vocabulary_times_length():
    chunk = 16
    for vocabulary in (1000, 4000):
        for tokens in (64, 256):
            largest, kept = peak(tokens, vocabulary, chunk)
            assert largest <= max(chunk * vocabulary, tokens * D, D * vocabulary)
            # the head's weight, the last chunk of logits, the hidden states, and lists of tokens
            assert kept <= (D + chunk) * vocabulary + 60 * tokens
    assert peak(256, 4000, 256)[0] == 255 * 4000  # one chunk: what the others are spared
