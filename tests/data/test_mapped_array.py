"""Mapped arrays: read as others are, sent to workers as a path."""

import pickle

import numpy as np
import pytest

from ivl.data import mapped_array
from ivl.data.mapped_array import MappedArray, load_mapped, spooled

RECORD = np.dtype([("a", "<i4"), ("b", "u1")])


@pytest.fixture
def records(tmp_path):
    records = np.zeros(100_000, RECORD)
    records["a"] = np.arange(len(records))
    np.save(tmp_path / "a.npy", records)
    return load_mapped(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "view", [lambda r: r, lambda r: r["a"], lambda r: r[10:-10], lambda r: r["a"][::-3], lambda r: r[:0]]
)
def test_views_are_sent_as_a_place_in_the_file(records, view):
    part = view(records)
    data = pickle.dumps(pickle.loads(pickle.dumps(part)))
    again = pickle.loads(data)
    assert len(data) < 500 and np.array_equal(again, part) and again.dtype == part.dtype
    assert not len(part) or not again.flags.writeable


def test_results_are_arrays_of_their_own(records):
    values = [records["a"] + 1, records[[3, 4]], records["a"][records["a"] > 5], records["a"] == 3]
    assert all(type(value) is np.ndarray for value in values)
    assert type(records["a"].sum()) is np.int64 and records["a"].sum() == 99_999 * 50_000
    chosen = records[[3, 4]]
    assert pickle.loads(pickle.dumps(chosen)).tolist() == [(3, 0), (4, 0)]


def test_large_arrays_are_kept_once(tmp_path, monkeypatch, records):
    monkeypatch.setattr(mapped_array, "SPOOLED_BYTES", 1000)
    array = np.arange(1000)
    first, second = spooled(array, tmp_path), spooled(array.copy(), tmp_path)
    assert isinstance(first, MappedArray) and first.filename == second.filename and np.array_equal(first, array)
    assert spooled(array.astype(np.uint32), tmp_path).filename != first.filename
    assert spooled(first, tmp_path) is first and spooled(records["a"], tmp_path).base is not None
    small = np.arange(3)
    assert spooled(small, tmp_path) is small
