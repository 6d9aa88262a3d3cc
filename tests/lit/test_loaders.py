import os
import time

import pytest
from torch.utils.data import Dataset, get_worker_info

from ivl.data.packing.samplers import GroupedBatches
from ivl.lit.loaders import Pace, PacedLoader


def told(pace: Pace, waited: float, busy: float, batches: int) -> list[int]:
    """The workers after each batch."""
    return [(pace.add(waited, busy), pace.workers)[1] for _ in range(batches)]


def test_workers_follow_from_waiting():
    # two make a batch in 0.4 s between them, and it is used in 0.1: eight are needed
    pace = Pace(2, most=15, window=4)
    assert told(pace, 0.3, 0.1, 8) == [2] * 7 + [8]
    assert told(pace, 0.0, 0.1, 50) == [8] * 50


def test_workers_have_a_limit():
    assert told(Pace(2, most=5, window=4), 0.3, 0.1, 8)[-1] == 5
    assert told(Pace(2, most=5, window=4), 0.3, 0.0, 8)[-1] == 5


def test_a_little_waiting_is_no_reason():
    assert set(told(Pace(2, most=15, window=4), 0.004, 0.1, 60)) == {2}


def test_the_first_batches_say_nothing():
    pace = Pace(2, most=15, window=4)
    told(pace, 5.0, 0.1, 4)
    assert set(told(pace, 0.0, 0.1, 60)) == {2}


def test_default_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32), raising=False)
    assert Pace.of(None, 1) == Pace(4, 31)
    assert Pace.of(None, 8) == Pace(3, 3)
    assert Pace.of(6, 1) == Pace(6, 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert Pace.of(None, 1) == Pace(0, 0)


class Slow(Dataset):
    """Items that take a while, and say who made them."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, int], int]:
        time.sleep(0.03)
        return key, get_worker_info().id


@pytest.fixture
def loader() -> PacedLoader:
    batches = GroupedBatches([1] * 48, [0] * 48, 2, seed=1, window=1)
    made = PacedLoader(
        Slow(), Pace(1, most=3, window=4), batch_sampler=batches, collate_fn=list, persistent_workers=True
    )
    made.used = lambda: (0, 5)
    return made


def test_more_workers_make_the_same_batches(loader):
    batches = loader.batch_sampler
    for epoch in range(3):
        batches.set_epoch(epoch)
        expected = [[(epoch, row) for row in rows] for rows in batches.batches(epoch)]
        got = list(loader)
        assert [[key for key, _ in batch] for batch in got] == expected
        makers = [batch[0][1] for batch in got]
        assert set(makers) == {0, 1, 2}
        # until the sixth batch there is one; those in store then are its own
        assert set(makers[:6]) == {0} if epoch == 0 else set(makers[:3]) == {0, 1, 2}


def test_an_epoch_left_in_the_middle(loader):
    it = iter(loader)
    for _ in range(10):
        next(it)
    del it
    loader.batch_sampler.set_epoch(1)
    expected = [[(1, row) for row in rows] for rows in loader.batch_sampler.batches(1)]
    assert [[key for key, _ in batch] for batch in loader] == expected
    loader.load_state_dict(loader.state_dict() | {"epoch": 1})
    assert [[key for key, _ in batch] for batch in loader] == expected[5:]
