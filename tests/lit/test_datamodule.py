"""The batches of the real loader: the same with any number of workers, and after a restart in the middle."""

import json
from types import SimpleNamespace

import pytest
import torch

from ivl.lit.datamodule import IvlData
from ivl.options import FileLimits, VideoOptions
from ivl.types import UserError
from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint

WAYS = {
    "packed": {"packing": True, "pack_tokens": 700, "pack_tiles": 25},
    "grouped": {"group_by_length": True, "batch_size": 3},
    "padded": {"batch_size": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_rows(folder / "data", 24)
    frames = [[f"{n % 4}.png"] * 6 for n in range(4)]
    with (folder / "data/train.jsonl").open("a") as out:  # frames drawn at random, another each epoch
        out.writelines(json.dumps({"query": "Clip", "response": "moves", "videos": [f]}) + "\n" for f in frames)
    return folder


def loader(base, workers: int, epoch: int = 0, **options):
    data = IvlData(
        str(base / "model"),
        train=str(base / "data/train.jsonl"),
        num_workers=workers,
        seed=3,
        video=VideoOptions(num_segments=2, sample="random"),
        **options,
    )
    progress = SimpleNamespace(current=SimpleNamespace(processed=epoch))
    data.trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        log_dir=None,
        is_global_zero=True,
        strategy=None,
        max_epochs=2,
        max_steps=-1,
        num_devices=1,
        fit_loop=SimpleNamespace(epoch_progress=progress),
    )
    data.setup("fit")
    made = data.train_dataloader()
    made.batch_sampler.set_epoch(epoch)
    return made


def shown(batches) -> list[list]:
    return [[t.tolist() for t in (b.input_ids, b.labels, b.position_ids, b.tiles.sum((1, 2, 3)))] for b in batches]


@pytest.mark.parametrize("way", WAYS)
def test_same_batches_with_any_number_of_workers_and_after_a_restart(base, way):
    whole = {epoch: shown(loader(base, 0, epoch, **WAYS[way])) for epoch in (0, 1)}
    assert len(whole[0]) > 5 and whole[0] != whole[1]
    for workers in (1, 4):
        assert shown(loader(base, workers, 1, **WAYS[way])) == whole[1]
    before = loader(base, 1, **WAYS[way])
    before.batch_sampler.set_epoch(1)
    batches = iter(before)
    used = shown([next(batches) for _ in range(3)])  # the workers are further on by now
    before.used = lambda: (1, 3)
    state = json.loads(json.dumps(before.state_dict()))
    after = loader(base, 4, **WAYS[way])
    after.load_state_dict(state)
    assert used + shown(after) == whole[1]


def test_a_row_is_in_one_batch_of_an_epoch(base):
    batches = list(loader(base, 0, **WAYS["packed"]))
    assert sum(map(len, batches)) == 28
    assert all(batch.num_tokens <= 700 and len(batch.tiles) <= 25 for batch in batches)
    assert torch.cat([batch.tiles_per_row for batch in batches]).sum() == sum(len(batch.tiles) for batch in batches)


def test_what_is_left_out_is_counted_and_listed_for_all_sources(base, tmp_path, caplog):
    bad = [json.dumps({"query": f"q {n}", "response": "r", "images": ["gone.png"]}) + "\n" for n in range(2)]
    for name in ("a", "b"):
        good = (base / "data/train.jsonl").read_text().replace('{"query"', f'{{"{name}_key": 1, "query"', 3)
        (base / f"data/{name}.jsonl").write_text(good + "".join(bad))
    options = {"on_error": "skip", "max_bad": 0.2, "report": str(tmp_path / "report.txt")}
    data = IvlData(
        str(base / "model"), train=[str(base / "data/a.jsonl"), str(base / "data/b.jsonl")], num_workers=0, **options
    )
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, log_dir=None, is_global_zero=True)
    with caplog.at_level("INFO"):
        data.setup("fit")
    text = (tmp_path / "report.txt").read_text()
    assert text.startswith("# problem: 4 of 60 rows\n#        4 … no such file")
    assert all(f"{base}/data/{name}.jsonl:{line}: " in text for name in "ab" for line in (29, 30))
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("4 of 60 rows cannot be used and are left out, listed in") for line in said), said
    assert len(data.training[1]) == 56
    files = [f"{name}_key 3 ({base}/data/{name}.jsonl:1)" for name in "ab"]
    assert [line for line in said if "not read" in line] == [f"keys that are not read: {', '.join(files)}"]


@pytest.mark.parametrize(
    ("options", "packed", "batch"),
    [
        ({}, True, 8),
        ({"eval_batch_size": 3}, True, 3),
        ({"batch_size": 4}, False, 4),
        ({"group_by_length": True}, False, 8),
        ({"packing": True, "batch_size": 4}, True, 4),
        ({"packing": False}, False, 8),
    ],
)
def test_rows_are_packed_unless_it_is_said_how_to_pad(base, options, packed, batch):
    made = loader(base, 0, **options)
    first = next(iter(made))
    assert (first.row_ids is not None) == packed
    assert packed or len(first) == options.get("batch_size", 8)
    data = IvlData(str(base / "model"), **options)
    assert data.options.eval_rows_per_batch == batch


def test_limits_of_files_reach_all_rows(base, tmp_path):
    path = str(base / "data/train.jsonl")
    data = IvlData(str(base / "model"), train=path, val=path, num_workers=0, file_limits=FileLimits(max_row_bytes=20))
    assert data.rows("val").files[0].limits.max_row_bytes == 20
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, log_dir=None, is_global_zero=True)
    with pytest.raises(UserError, match=r"train\.jsonl:1: a row of \d+ bytes, but the limit is 20"):
        data.setup("fit")
