"""Rows over files, held-out rows, mixtures; the processor is a stub that needs no checkpoint."""

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ivl.data.sets.dataset import Mixture, MixtureSource, RowDataset, split
from ivl.data.sets.meta_file import read_meta
from ivl.types import Conversation, Example, Message, UserError


class Stub:
    """As many tokens as the query has letters; the first is drawn at random."""

    def parse(self, row, where="", root=None):
        if "query" not in row:
            raise UserError(f"{where}: no query")
        messages = [Message("user", (row["query"],)), Message("assistant", (row["response"],))]
        return Conversation(tuple(messages), id=str(root), where=where, source=row.get("source", ""))

    def __call__(self, row, where="", root=None, max_tiles=None, generator=None):
        text = row.messages[0].text
        if text == "damaged":
            raise UserError(f"{row.where}: a.jpg: a damaged image")
        ids = torch.tensor([int(torch.randint(1000, (), generator=generator))] + [1] * (len(text) - 1))
        return Example(ids, ids, torch.zeros((max_tiles or 0, 3, 2, 2), dtype=torch.uint8), [1] * (max_tiles or 0), row)


def write(folder, name, count, **extra):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps({"query": f"{name} {n}", "response": "r"} | extra) + "\n" for n in range(count)))
    return path


def query(rows, i):
    return rows.conversation(i).messages[0].text


def test_rows_of_several_files(tmp_path):
    a, b = write(tmp_path, "a.jsonl", 3), write(tmp_path / "sub", "b.jsonl", 2, source="own")
    rows = RowDataset([a, b], Stub(), source="mine")
    assert [query(rows, i) for i in range(len(rows))] == [
        "a.jsonl 0",
        "a.jsonl 1",
        "a.jsonl 2",
        "b.jsonl 0",
        "b.jsonl 1",
    ]
    assert rows.where(4) == f"{b}:2" and rows.row(4)["source"] == "own"
    assert [rows.conversation(i).source for i in (0, 4)] == ["mine", "own"]
    assert [rows.conversation(i).id for i in (0, 4)] == [str(tmp_path), str(tmp_path / "sub")]
    assert RowDataset(a, Stub(), root="media").conversation(0).id == "media"
    chosen = rows.select(np.array([4, 0, 2])).select(np.array([0, 2]))
    assert [query(chosen, i) for i in range(2)] == ["b.jsonl 1", "a.jsonl 2"] and chosen.numbers.tolist() == [4, 2]
    assert [len(part) for part in chosen.per_file()] == [3, 2] and query(chosen.per_file()[1], 0) == "b.jsonl 0"
    for i in (5, -1):
        with pytest.raises(IndexError):
            rows[i]
    prompt = RowDataset(a, Stub(), as_prompt=True).conversation(0)
    assert prompt.messages[-1].role == "user" and prompt.reference == "r"


def test_random_choices_belong_to_the_row(tmp_path):
    """Not to the worker, the order, or the selection."""
    rows = RowDataset(write(tmp_path, "a.jsonl", 12), Stub(), seed=3)
    first = [int(rows[i].input_ids[0]) for i in range(12)]
    assert len(set(first)) > 6
    for workers in (0, 1, 4):
        loader = DataLoader(rows, batch_sampler=[[7, 2], [0]], num_workers=workers, collate_fn=list)
        assert [[int(e.input_ids[0]) for e in batch] for batch in loader] == [[first[7], first[2]], [first[0]]]
    assert int(rows.select(np.array([5]))[0].input_ids[0]) == first[5]
    assert [int(rows[0, i].input_ids[0]) for i in range(12)] == first
    assert [int(rows[1, i].input_ids[0]) for i in range(12)] != first
    assert int(RowDataset(rows.files[0].path, Stub(), seed=4)[0].input_ids[0]) != first[0]
    again = pickle.loads(pickle.dumps(rows))
    assert [int(again[i].input_ids[0]) for i in range(12)] == first


def test_bad_rows_stop_or_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    queries = ["fine", "damaged", "fine", None]
    path.write_text("".join(json.dumps({"query": q, "response": "r"} if q else {}) + "\n" for q in queries))
    with pytest.raises(UserError, match=r"a\.jsonl:2: a\.jpg"):
        RowDataset(path, Stub()).__getitems__([0, 1])
    rows = RowDataset(path, Stub(), on_error="skip")
    skipped = []
    rows.on_skip = skipped.append
    for dataset, keys in ((rows, [0, 1, 2, 3]), (Mixture([rows]), [(0, 0), (0, 1), (0, 2), (0, 3)])):
        assert len(dataset.__getitems__(keys)) == 2
        assert [message.split(": ")[0] for message in skipped] == [f"{path}:2", f"{path}:4"]
        skipped.clear()
    with pytest.raises(UserError, match="no row of this batch of 2"):
        rows.__getitems__([1, 3])


def test_what_the_index_said_is_checked(tmp_path):
    rows = RowDataset(write(tmp_path, "a.jsonl", 3), Stub(), max_tiles=2)
    rows.lengths = np.array([[9, 2], [9, 2], [9, 3]])
    assert len(rows[1].tiles) == 2
    with pytest.raises(UserError, match=r"a\.jsonl:3: 9 tokens and 2 tiles, but its index says 9 and 3"):
        rows[2]
    with pytest.raises(UserError, match=r"a\.jsonl:3"):
        rows.select(np.array([2]))[0]


def test_split_is_exact_disjoint_and_does_not_depend_on_the_order(tmp_path):
    path = write(tmp_path, "a.jsonl", 200)
    train, val = split(RowDataset(path, Stub()), 0.1)
    names = [{query(part, i) for i in range(len(part))} for part in (train, val)]
    assert [len(train), len(val)] == [180, 20] == [len(name) for name in names]
    assert not names[0] & names[1]
    lines = path.read_text().splitlines()
    other = tmp_path / "b.jsonl"
    other.write_text("\n".join(reversed(lines)))
    _, again = split(RowDataset(other, Stub()), 0.1)
    assert {query(again, i) for i in range(20)} == names[1]
    _, seeded = split(RowDataset(path, Stub()), 0.1, seed=1)
    assert {query(seeded, i) for i in range(20)} != names[1]
    other.write_text("\n".join(lines[:100] + lines[:100]))
    train, val = split(RowDataset(other, Stub()), 0.1)
    assert not {query(train, i) for i in range(len(train))} & {query(val, i) for i in range(len(val))}
    for fraction in (0, 1, -1, 2):
        with pytest.raises(UserError, match="val_fraction"):
            split(RowDataset(path, Stub()), fraction)


def test_mixture_is_exact(tmp_path):
    a, b = (
        RowDataset(write(tmp_path, "a.jsonl", 10), Stub()),
        RowDataset(write(tmp_path, "b.jsonl", 7), Stub(), source="bees"),
    )
    mixture = Mixture([MixtureSource(a, "ants", repeat=2), MixtureSource(b, repeat=0.5)], seed=1)
    assert mixture.counts == [20, 4] and len(mixture) == 17
    assert "| bees | 7 | 4 | 0.571 | 16.7% |" in mixture.describe()
    seen = Counter()
    for epoch in range(7):
        order = mixture.order(epoch)
        assert (order == mixture.order(epoch)).all() and len(order) == 24
        counts = Counter(order.tolist())
        assert [counts[i] for i in range(10)] == [2] * 10
        assert sum(counts[i] for i in range(10, 17)) == 4
        seen += counts
    assert [seen[i] for i in range(10, 17)] == [4] * 7, "a fraction goes round all rows"
    sources = [(mixture.order(epoch) < 10).tolist() for epoch in range(2)]
    assert sources[0] != sources[1], "the sources follow one another in another order"
    assert [mixture[i].conversation.messages[0].text for i in (0, 9, 10, 16)] == [
        "a.jsonl 0",
        "a.jsonl 9",
        "b.jsonl 0",
        "b.jsonl 6",
    ]
    assert int(mixture[3, 12].input_ids[0]) == int(b[3, 2].input_ids[0])


def test_mixture_by_ratio(tmp_path):
    parts = [RowDataset(write(tmp_path, f"{n}.jsonl", n), Stub()) for n in (10, 20, 30)]
    mixture = Mixture([MixtureSource(rows, ratio=1) for rows in parts])
    assert mixture.counts == [20, 20, 20]
    mixture = Mixture([MixtureSource(rows, ratio=r) for rows, r in zip(parts, (1, 1, 5))], epoch_rows=100)
    assert sum(mixture.counts) == 100 and mixture.counts == [14, 14, 72]
    assert Mixture(parts).counts == [10, 20, 30]


def test_mixture_refusals(tmp_path):
    rows = RowDataset(write(tmp_path, "a.jsonl", 10), Stub())
    for parts, words in (
        ([], "no sources"),
        ([MixtureSource(rows, repeat=0)], "above 0"),
        ([MixtureSource(rows, repeat=1, ratio=1)], "repeat or ratio"),
        ([MixtureSource(rows, ratio=1), MixtureSource(rows)], "some have none"),
        ([MixtureSource(rows, repeat=0.01)], "less than one row"),
    ):
        with pytest.raises(UserError, match=words):
            Mixture(parts)
    with pytest.raises(UserError, match="no files"):
        RowDataset([], Stub())


def test_meta_file(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", 4)
    write(tmp_path, "b.jsonl", 10)
    meta = {
        "ants": {"root": "images", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 2, "length": 4},
        "bees": {"root": "", "annotation": "b.jsonl", "repeat_time": 0.5, "max_dynamic_patch": 6, "length": 10},
    }
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta))
    mixture = Mixture(read_meta(path, Stub()))
    assert mixture.counts == [8, 5]
    assert mixture.parts[0].rows.conversation(0).source == "ants"
    assert mixture.parts[0].rows.conversation(0).id == "images" and mixture.parts[1].rows.max_tiles == 6
    for change, words in (
        ({"data_augment": True}, "ants: data_augment"),
        ({"repeat_time": 0}, "ants: expected a repeat_time"),
        ({"annotation": "gone.jsonl"}, "no such file"),
        ({"annotation": ["a.jsonl", 3]}, "ants: annotation: expected a file of rows or a list"),
        ({"annotation": []}, "ants: annotation: expected"),
        ({"root": 3}, "ants: root: expected a folder"),
        ({"max_dynamic_patch": "6"}, "ants: max_dynamic_patch: expected at least 1"),
        ({"repeat_tme": 2}, "ants: repeat_tme is not read; expected root, annotation"),
    ):
        path.write_text(json.dumps({"ants": meta["ants"] | change}))
        with pytest.raises(UserError, match=words):
            read_meta(path, Stub())
    path.write_text(json.dumps({"both": meta["ants"] | {"annotation": ["a.jsonl", "b.jsonl"]}}))
    (part,) = read_meta(path, Stub())
    assert part.rows.root == Path("images")
    for folder in (tmp_path / "images", tmp_path / "elsewhere/images"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (beside,) = read_meta(path, Stub())
    assert beside.rows.root == tmp_path / "images", "where the annotations are"
    assert len(part.rows) == 14 and part.rows.where(4) == f"{tmp_path}/b.jsonl:1"
    for text in ("[]", "{", '{"a": 1}', '{"a":' * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"meta\.json"):
            read_meta(path, Stub())
