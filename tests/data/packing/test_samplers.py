"""Packs and grouped batches: whole rows, within limits, the same everywhere, resumable, full."""

import hashlib
import json
import pickle
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ivl.data.packing.packing import fill_packs
from ivl.data.packing.samplers import GroupedBatches, PackedBatches
from ivl.data.sets.dataset import Mixture, MixtureSource, RowDataset
from ivl.types import UserError
from tests.data.sets.test_dataset import Stub


def mixed(count, seed=0):
    """Lengths of a mixed set: text only, pages of 1 to 13 tiles, videos of 8 and 16 frames."""
    rng = np.random.default_rng(seed)
    kinds = [np.zeros(count), rng.integers(1, 4, count), rng.choice([5, 7, 10, 13], count), rng.choice([8, 16], count)]
    tiles = np.choose(rng.choice(4, count, p=[0.3, 0.3, 0.3, 0.1]), kinds).astype(np.int64)
    text = np.clip(rng.lognormal(5, 1, count), 20, 2500).astype(np.int64)
    return tiles * 256 + text, tiles


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("max_tiles", [None, 28, 40])
@pytest.mark.parametrize("count", [1, 7, 100, 20_000])
def test_each_row_once_within_both_limits(count, max_tiles):
    tokens, tiles = mixed(count)
    packs = fill_packs(tokens, tiles, 8192, max_tiles, window=2048)
    assert sorted(row for pack in packs for row in pack) == list(range(count))
    assert all(pack == sorted(pack) for pack in packs)
    assert max(tokens[pack].sum() for pack in packs) <= 8192
    assert max(tiles[pack].sum() for pack in packs) <= (max_tiles or 10**9)


def test_by_hand():
    def packs(tokens, tiles, *limits):
        return sorted(fill_packs(np.array(tokens), np.array(tiles), *limits))

    assert packs([6, 4, 5, 5], [0] * 4, 10) == [[0, 1], [2, 3]]
    assert packs([10, 10, 10], [0] * 3, 10) == [[0], [1], [2]]
    assert packs([2, 2, 2, 2], [3, 3, 3, 0], 100, 6) == [[0, 1, 3], [2]]
    assert packs([1, 1, 1], [0, 0, 0], 10, 0) == [[0, 1, 2]]


def test_full_on_a_mixed_set():
    """Above 97 % of the tokens of all packs belong to rows, spread over 8 ranks and with a limit of tiles."""
    tokens, tiles = mixed(30_000)
    assert PackedBatches(tokens, tiles, 8192, ranks=8).efficiency() > 0.99
    assert PackedBatches(tokens, tiles, 8192, max_tiles=32, ranks=8).efficiency() > 0.97
    assert PackedBatches(tokens, tiles, 16384, ranks=8).efficiency() > 0.99
    assert GroupedBatches(tokens, tiles, 8, ranks=8).efficiency() > 0.95
    assert GroupedBatches(tokens, tiles, 8, window=1).efficiency() < 0.6


def test_time_is_linear():
    """Ten times the rows take about ten times as long, not a hundred times."""

    def seconds(count):
        tokens, tiles = mixed(count)
        times = []
        for _ in range(3):
            began = time.process_time()
            fill_packs(tokens, tiles, 8192, 32)
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(80_000) < 30 * seconds(8_000)


@pytest.mark.parametrize(
    "make", [lambda t, k, **o: PackedBatches(t, k, 8192, **o), lambda t, k, **o: GroupedBatches(t, k, 4, **o)]
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_the_epoch(make, ranks):
    tokens, tiles = mixed(500)
    samplers = [make(tokens, tiles, rank=rank, ranks=ranks, seed=5) for rank in range(ranks)]
    for epoch in range(3):
        shares = [epoch_of(sampler, epoch) for sampler in samplers]
        assert len({len(share) for share in shares}) == 1 and len(shares[0]) == len(samplers[0])
        keys = [key for share in shares for batch in share for key in batch]
        assert sorted(keys) == [(epoch, row) for row in range(500)]
    first, again = epoch_of(samplers[0], 1), epoch_of(make(tokens, tiles, ranks=ranks, seed=5), 1)
    assert first == again
    assert epoch_of(make(tokens, tiles, ranks=ranks, seed=6), 1) != first
    rows = [[row for _, row in batch] for batch in first]
    assert rows != [[row for _, row in batch] for batch in epoch_of(samplers[0], 2)]


def test_a_step_costs_all_ranks_about_the_same():
    tokens, tiles = mixed(20_000)
    batches = PackedBatches(tokens, tiles, 8192, ranks=4).batches(0)
    per_pack = np.array([tiles[pack].sum() for pack in batches])
    steps = per_pack.reshape(-1, 4)
    shuffled = np.random.default_rng(0).permutation(per_pack).reshape(-1, 4)
    assert steps.max(1).sum() < 0.95 * shuffled.max(1).sum()
    assert abs(steps.mean(0) - per_pack.mean()).max() < 0.5, "no rank is given the dear ones"
    early, late = np.array_split(steps.mean(1), 2)
    assert abs(early.mean() - late.mean()) < 1


def test_few_rows():
    ones, none = np.ones(3, np.int64), np.zeros(3, np.int64)
    samplers = [PackedBatches(ones, none, 10, rank=rank, ranks=3) for rank in range(3)]
    assert [len(list(sampler)) for sampler in samplers] == [1, 1, 1]
    with pytest.raises(UserError, match="3 rows cannot be spread over 4 batches"):
        len(PackedBatches(ones, none, 10, ranks=4))
    with pytest.raises(UserError, match="no rows"):
        PackedBatches(ones[:0], none[:0], 10)
    with pytest.raises(UserError, match="a row of 12 tokens is above the 10"):
        fill_packs(np.array([3, 12]), none[:2], 10)
    with pytest.raises(UserError, match="a row of 5 tiles is above the 4"):
        fill_packs(ones, np.array([0, 5, 1]), 10, 4)


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jsonl"
    lines = [{"query": "x" * int(rng.integers(1, 90)), "response": str(n)} for n in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RowDataset(path, Stub(), seed=1)


def lengths(rows):
    tokens = np.array([len(rows.row(i)["query"]) for i in range(len(rows))])
    return tokens, np.zeros_like(tokens)


def shown(batches):
    """What a batch holds, down to the random choice inside each row."""
    return [[(e.conversation.messages[1].text, int(e.input_ids[0])) for e in batch] for batch in batches]


def test_same_batches_with_any_number_of_workers_and_after_a_restart(rows):
    tokens, tiles = lengths(rows)

    def run(workers, epoch, done=0, context=None):
        sampler = PackedBatches(tokens, tiles, 256, seed=3)
        sampler.epoch, sampler.done = epoch, done
        return shown(
            DataLoader(
                rows, batch_sampler=sampler, num_workers=workers, collate_fn=list, multiprocessing_context=context
            )
        )

    for epoch in (0, 1):
        expected = run(0, epoch)
        assert len(expected) > 30
        assert run(1, epoch) == run(4, epoch) == expected
        for done in (1, len(expected) // 2, len(expected)):
            assert run(2, epoch, done) == expected[done:]
    assert run(0, 0) != run(0, 1)
    assert run(1, 0, context="spawn") == run(0, 0)


def test_resume_through_state(rows):
    tokens, tiles = lengths(rows)
    sampler = PackedBatches(tokens, tiles, 256, seed=3, ranks=2, rank=1)
    epochs = [epoch_of(sampler, epoch) for epoch in range(2)]
    sampler.set_epoch(0)
    iterator = iter(sampler)
    used = [next(iterator) for _ in range(5)][:3]  # a loader runs two batches ahead
    state = json.loads(json.dumps(sampler.state_dict(used=3)))
    fresh = PackedBatches(tokens, tiles, 256, seed=3, ranks=2, rank=1)
    fresh.load_state_dict(state)
    assert used + list(fresh) == epochs[0]
    fresh.set_epoch(1)
    assert list(fresh) == epochs[1], "the next epoch begins at its beginning"
    assert list(pickle.loads(pickle.dumps(fresh))) == epochs[1]
    for change, words in (
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"ranks": 4}, "ranks was 2 and is now 4"),
        ({"max_tokens": 300}, "max_tokens was 256 and is now 300"),
        ({"tokens": tokens + 1}, "lengths was"),
    ):
        options = {"tokens": tokens, "tiles": tiles, "max_tokens": 256, "seed": 3, "ranks": 2, "rank": 1} | change
        with pytest.raises(UserError, match=words):
            PackedBatches(**options).load_state_dict(state)


def test_a_mixture_is_packed_in_its_proportions(rows, tmp_path):
    half = rows.select(np.arange(100)), rows.select(np.arange(100, 200))
    mixture = Mixture([MixtureSource(half[0], "a", repeat=2), MixtureSource(half[1], "b", repeat=0.5)], seed=2)
    tokens, tiles = lengths(rows)
    sampler = PackedBatches(tokens, tiles, 256, order=mixture.order)
    for epoch in range(2):
        keys = [row for batch in epoch_of(sampler, epoch) for _, row in batch]
        assert sorted(keys) == sorted(mixture.order(epoch).tolist()) and len(keys) == 250
    loader = DataLoader(mixture, batch_sampler=sampler, collate_fn=list, num_workers=0)
    for batch in loader:
        assert sum(len(example) for example in batch) <= 256


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(PackedBatches(*mixed(100), 8192))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(
    ("make", "ranks", "digest"),
    [
        (PackedBatches, 1, "d0fee3a063b33fea"),
        (PackedBatches, 4, "9ff7ac44ef87b6c7"),
        (GroupedBatches, 1, "c5ca0f0231f58d76"),
        (GroupedBatches, 4, "9b08fdcf5abb9741"),
    ],
)
def test_batches_and_positions_are_those_of_earlier_versions(make, ranks, digest):
    """Recorded before long epochs were planned in sections, so that a run that was begun then goes on."""
    tokens, tiles = mixed(3000, 3)
    limits = {"max_tokens": 8192, "max_tiles": 32, "epochs": 2, "window": 1024}
    sampler = make(tokens, tiles, **(limits if make is PackedBatches else {"batch_size": 4}), ranks=ranks, seed=7)
    planned = json.dumps([[sampler.batches(epoch) for epoch in (0, 1)], sampler.state_dict(3)])
    assert hashlib.sha256(planned.encode()).hexdigest()[:16] == digest
