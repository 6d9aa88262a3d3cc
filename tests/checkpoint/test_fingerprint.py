"""A digest of weights: equal for equal ones, another for any other byte, name, type or shape."""

import hashlib

import pytest
import torch

from ivl.checkpoint import fingerprint as printing
from ivl.checkpoint.fingerprint import fingerprint


@pytest.fixture
def weights():
    draw = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, generator=draw),
        "b.weight": torch.randn(4, 6, generator=draw).bfloat16(),
        "b.SCB": torch.randint(-128, 128, (9,), generator=draw, dtype=torch.int8),
    }


def test_equal_weights_are_equal_in_any_order_and_layout(weights):
    here = fingerprint(weights.items())
    assert here == fingerprint(reversed(list(weights.items())))
    assert here == fingerprint({**weights, "a.weight": weights["a.weight"].t().contiguous().t()}.items())
    assert here == fingerprint((name, tensor.clone()) for name, tensor in weights.items())
    assert len(here) == 16


def test_every_byte_counts(weights, monkeypatch):
    monkeypatch.setattr(printing, "BLOCK", 16)
    seen = {fingerprint(weights.items())}
    for name, tensor in weights.items():
        for n in range(tensor.numel() * tensor.element_size()):
            changed = tensor.clone()
            changed.flatten().view(torch.uint8)[n] ^= 1
            seen.add(fingerprint({**weights, name: changed}.items()))
    assert len(seen) == 1 + 7 * 5 * 4 + 4 * 6 * 2 + 9


def test_exchanged_values_names_types_and_shapes_count(weights):
    a, b, c = weights.values()
    others = [
        {"a.weight": a.flip(0), "b.weight": b, "b.SCB": c},
        {"a.bias": a, "b.weight": b, "b.SCB": c},
        {"a.weight": a.view(5, 7), "b.weight": b, "b.SCB": c},
        {"a.weight": a.view(torch.int32), "b.weight": b, "b.SCB": c},
        {"a.weight": a, "b.weight": b},
    ]
    assert len({fingerprint(one.items()) for one in [weights, *others]}) == 1 + len(others)


def test_shared_weights_are_read_once(weights, monkeypatch):
    read, digest = [], printing._digest
    monkeypatch.setattr(
        printing, "_digest", lambda tensor, threads: read.append(len(tensor)) or digest(tensor, threads)
    )
    shared = fingerprint({**weights, "head.weight": weights["a.weight"]}.items())
    assert read == [7, 4, 9]
    assert shared == fingerprint({**weights, "head.weight": weights["a.weight"].clone()}.items())


def test_it_is_sha256():
    tensor = torch.arange(3, dtype=torch.uint8)
    blocks = hashlib.sha256(hashlib.sha256(bytes([0, 1, 2])).digest()).hexdigest()
    assert fingerprint([("x", tensor)]) == hashlib.sha256(f"x torch.uint8 (3,) {blocks}".encode()).hexdigest()[:16]
