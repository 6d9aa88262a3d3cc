"""An index made by several processes is the file that one process makes, and none that ends leaves a half one."""

import json
import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from ivl.data.index import index_build as indexing
from ivl.data.index.index import RECORD
from ivl.data.index.index_build import build_index
from ivl.data.process_group import ProcessGroup, all_processes
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from tests.tiny import write_checkpoint

ROWS = 330


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows over two files with pictures, problems and keys that are not read."""
    folder = tmp_path_factory.mktemp("rows")
    write_checkpoint(folder / "model")
    for n in range(5):
        Image.new("RGB", (100 + 100 * n, 100)).save(folder / f"{n}.png")
    for name, count in (("a", ROWS - 10), ("b", 10)):
        rows = [{"query": f"{name} {n} " * (1 + n % 7), "response": "x", f"key{n // 40}": 1} for n in range(count)]
        for n, row in enumerate(rows):
            row |= {"images": [f"{n % 6}.png"]} if n % 3 else {}
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(indexing, "_CHUNK", 8)
    monkeypatch.setattr(indexing, "_BLOCK", 32)


def build(folder: Path, cache: Path, group: ProcessGroup | None = None):
    rows = RowDataset([folder / "a.jsonl", folder / "b.jsonl"], Processor.from_pretrained(folder / "model"))
    return build_index(rows, workers=0, cache_dir=cache, group=group)


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "index").rglob("*") if path.is_file()}


def rank_process(rank: int, folder: Path, caches: list[Path], dies_at: int | None) -> None:
    """A rank: builds the index once for each pair of caches; writes the numbers of the rows that it measured."""
    indexing._CHUNK, indexing._BLOCK = 8, 32
    torch.set_num_threads(1)
    measured, record = [], indexing._Probe._record

    def counting(self, number):
        measured.append(number)
        if len(measured) == dies_at and rank == 1:
            os._exit(9)
        return record(self, number)

    indexing._Probe._record = counting
    store = dist.FileStore(str(folder / f"store{len(caches)}-{dies_at}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    for cache in caches:
        place = cache / str(rank) if "apart" in cache.name else cache
        measured.clear()
        with all_processes() as group:
            index = build(folder, place, group)
        np.save(cache / f"tokens{rank}.npy", index.tokens)
        (cache / f"measured{rank}.json").write_text(json.dumps([len(measured), sorted(index.problems)]))
    dist.destroy_process_group()


def run(folder: Path, caches: list[Path], dies_at: int | None = None) -> list[int | None]:
    for cache in caches:
        cache.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ivl.lit.cli", "tests.lit.processes"])
    processes = [context.Process(target=rank_process, args=(rank, folder, caches, dies_at)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def test_two_processes_make_the_file_of_one(folder, tmp_path, small_blocks):
    one = build(folder, tmp_path / "one")
    expected = files(tmp_path / "one")
    assert len(one) == ROWS and len(one.problems) > 20 and len(one.unread) > 5
    shared, apart, again = tmp_path / "shared", tmp_path / "apart", tmp_path / "shared"
    assert run(folder, [shared, apart, again]) == [0, 0]
    assert files(shared) == expected
    for rank in range(2):
        assert files(apart / str(rank)) == expected, "folders that are not shared hold the same files"
    problems = len(one.problems)
    for cache in (apart, shared):
        counts = [json.loads((cache / f"measured{rank}.json").read_text()) for rank in range(2)]
        assert [listed for _, listed in counts] == [sorted(one.problems)] * 2
        for rank in range(2):
            assert (np.load(cache / f"tokens{rank}.npy") == one.tokens).all()
        total = sum(count for count, _ in counts)
        if cache == apart:
            assert total == ROWS and abs(counts[0][0] - counts[1][0]) <= 40, "each has measured its share"
        else:  # built before: only rows with a problem are looked at again, each of them once
            assert total == problems and abs(counts[0][0] - counts[1][0]) <= 2


def test_a_process_that_dies_leaves_no_half_index(folder, tmp_path, small_blocks, monkeypatch):
    cache = tmp_path / "shared"
    codes = run(folder, [cache], dies_at=100)
    assert codes[1] == 9 and codes[0] != 0
    assert not list(cache.rglob("*.json")) and not list(cache.rglob("*.part"))
    blocks = len(list(cache.rglob("*.npz")))
    assert blocks >= 5, "the measured blocks are there"
    measured, record = [], indexing._Probe._record
    monkeypatch.setattr(indexing._Probe, "_record", lambda self, n: (measured.append(n), record(self, n))[1])
    index = build(folder, cache)
    again = len(index.problems)  # and whether media changed since
    assert len(measured) <= ROWS - 32 * (blocks - 1) + again
    assert not list(cache.rglob("*.npz"))
    build(folder, tmp_path / "one")
    assert files(cache) == files(tmp_path / "one")


def test_a_block_that_is_damaged_is_measured_again(folder, tmp_path, small_blocks, monkeypatch):
    expected = build(folder, tmp_path / "one")
    real = indexing.IndexBlocks.write

    def damaged(self, block, data):
        real(self, block, data[: len(data) // 2] if block == 2 else data)
        if block == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(indexing.IndexBlocks, "write", damaged)
    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "two")
    monkeypatch.undo()
    monkeypatch.setattr(indexing, "_CHUNK", 8)
    monkeypatch.setattr(indexing, "_BLOCK", 32)
    assert (build(folder, tmp_path / "two").records == expected.records).all()
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_bytes_of_a_row(tmp_path):
    """At most 100 bytes a row on the disk and in memory, of rows with a picture of their own each."""
    count = 2000
    write_checkpoint(tmp_path / "model")
    pictures = tmp_path / "some_data_set/images/train"
    pictures.mkdir(parents=True)
    Image.new("RGB", (30, 30)).save(tmp_path / "0.png")
    names = [f"some_data_set/images/train/picture_{7919 * n % 1000003:07}.png" for n in range(count)]
    for name in names:
        os.link(tmp_path / "0.png", tmp_path / name)
    lines = [json.dumps({"query": "what", "response": "x", "images": [name]}) + "\n" for name in names]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    rows = RowDataset(tmp_path / "a.jsonl", Processor.from_pretrained(tmp_path / "model"))
    index = build_index(rows, workers=0, cache_dir=tmp_path / "cache")
    again = build_index(rows, workers=0, cache_dir=tmp_path / "cache")
    assert (again.records == index.records).all() and not again.problems
    media = index.media
    arrays = [index.records, media.uses, media.stamps, media.paths, rows.files[0]._starts, rows.files[0]._sizes]
    assert sum(array.nbytes for array in arrays) <= 100 * count
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.npy")) <= 90 * count
    assert all(isinstance(array, np.memmap) for array in (again.records, again.media.uses, again.media.stamps))
    assert RECORD.itemsize <= 35
