"""The same rows as jsonl and as parquet: ids, lengths, packs, losses and resume are the same, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ivl.data.index.index_build import build_index
from ivl.data.packing.samplers import PackedBatches
from ivl.data.processor import Processor
from ivl.data.sets.dataset import Mixture, RowDataset
from tests.lit.rows import write_rows
from tests.lit.test_runs import fit, losses
from tests.tiny import write_checkpoint

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint, rows as jsonl with paths of pictures, and the same as parquet with their bytes in cells."""
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    path = write_rows(folder / "data")
    rows = [json.loads(line) | {"weight": 1.0 + n % 2} for n, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        names = row.pop("images", [])
        row["images"] = [{"bytes": (folder / "data" / name).read_bytes(), "path": name} for name in names]
        row["objects"] = json.dumps(row["objects"]) if "objects" in row else None  # as ms-swift writes them
    columns = {key for row in rows for key in row}  # a table takes its columns from its first row
    rows = [{key: row.get(key) for key in sorted(columns)} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/train.parquet", row_group_size=5)
    return folder


def test_examples_lengths_and_packs(base, tmp_path):
    processor = Processor.from_pretrained(base / "model")
    lines, table = (RowDataset(base / f"data/train.{kind}", processor, seed=3) for kind in ("jsonl", "parquet"))
    assert len(lines) == len(table) == 12
    for a, b in zip(lines, table):
        assert a.input_ids.equal(b.input_ids) and a.labels.equal(b.labels) and a.tiles.equal(b.tiles)
        assert (a.conversation.id, a.conversation.weight) == (b.conversation.id, b.conversation.weight)
    indexes = [build_index(rows, workers=0, cache_dir=tmp_path) for rows in (lines, table)]
    for name in set(indexes[0].records.dtype.names) - {"same"}:  # of the text and the names of media
        assert np.array_equal(indexes[0].records[name], indexes[1].records[name]), name
    packs = []
    for rows, index in zip((lines, table), indexes):
        batches = PackedBatches(index.tokens, index.tiles, 400, order=Mixture([rows], 3).order, seed=3)
        packs.append([list(batch) for batch in batches])
    assert packs[0] == packs[1] and len(packs[0]) > 1


def test_losses_weights_and_resume(base, tmp_path):
    common = {"data__val": None, "data__batch_size": None, "data__packing": True, "data__pack_tokens": 400}
    common |= {"model__tune": {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 2}}}
    saves = {"checkpoint__every_n_train_steps": 1, "checkpoint__save_top_k": -1}
    lines = fit(base, tmp_path / "lines", **common)
    table = {"data__train": str(base / "data/train.parquet")}
    whole = fit(base, tmp_path / "table", **common, **table, **saves)
    assert losses(tmp_path / "lines") == losses(tmp_path / "table") and len(losses(tmp_path / "lines")) > 2
    (saved,) = (tmp_path / "table/run/checkpoints").glob("epoch=0-step=1*.ckpt")
    resumed = fit(base, tmp_path / "again", "--ckpt_path", str(saved), **common, **table)
    for name, tensor in lines.items():
        assert torch.equal(whole[name], tensor) and torch.equal(resumed[name], tensor)
