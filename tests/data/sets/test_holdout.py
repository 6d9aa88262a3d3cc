"""A split that is remembered is found again, whatever happened to the files' order."""

import json

import pytest

from ivl.data.sets.dataset import RowDataset, split
from ivl.data.sets.holdout import load_split, open_split, remember, remembered, save_split
from ivl.types import UserError
from tests.data.sets.test_dataset import Stub, query, write


def texts(rows):
    return sorted(query(rows, i) for i in range(len(rows)))


def test_a_split_is_found_again(tmp_path):
    path = write(tmp_path, "a.jsonl", 60)
    path.write_text(path.read_text() + path.read_text().splitlines()[0] * 1 + "\n")  # one row twice
    train, held = split(RowDataset(path, Stub()), 0.2, seed=5)
    save_split(tmp_path / "run" / "split.json", held, seed=5)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["split.json"]
    assert texts(open_split(tmp_path / "run" / "split.json", Stub())) == texts(held)
    again = load_split(tmp_path / "run" / "split.json", RowDataset(path, Stub()))
    assert again[0].numbers.tolist() == train.numbers.tolist() and again[1].numbers.tolist() == held.numbers.tolist()

    lines = path.read_text().splitlines()
    moved = tmp_path / "b.jsonl"
    moved.write_text("\n".join([*reversed(lines), '{"query": "new", "response": "r"}']))
    train, again = load_split(tmp_path / "run" / "split.json", RowDataset(moved, Stub()))
    assert texts(again) == texts(held) and len(train) == 61 - len(held) + 1 and "new" in texts(train)


def test_a_split_keeps_the_names_of_its_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": "r"}) + "\n" for n in range(20)))
    _, held = split(RowDataset(path, Stub(), columns={"query": "question", "response": "answer"}), 0.2)
    save_split(tmp_path / "split.json", held)
    assert texts(open_split(tmp_path / "split.json", Stub())) == texts(held)


def test_what_is_held_out_of_rows_that_are_alike(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "response": "r"}\n' * 10)
    train, held = split(RowDataset(path, Stub()), 0.3)
    save_split(tmp_path / "split.json", held)
    again = load_split(tmp_path / "split.json", RowDataset(path, Stub()))
    assert [part.numbers.tolist() for part in again] == [train.numbers.tolist(), held.numbers.tolist()]


def test_a_split_of_other_files_is_refused(tmp_path):
    _, held = split(RowDataset(write(tmp_path, "a.jsonl", 20), Stub()), 0.2)
    save_split(tmp_path / "split.json", held)
    with pytest.raises(UserError, match=r"split\.json: 4 of its 4 held-out rows are not in .*b\.jsonl"):
        load_split(tmp_path / "split.json", RowDataset(write(tmp_path, "b.jsonl", 20), Stub()))
    for text in (
        "",
        "[]",
        "{}",
        json.dumps({"files": [], "seed": 0, "rows": ["xyz"]}),
        '{"files":1,"seed":0,"rows":[]}',
    ):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(UserError, match=r"split\.json: "):
            open_split(tmp_path / "split.json", Stub())


def test_a_run_that_goes_on_keeps_what_it_remembered(tmp_path):
    rows = RowDataset(write(tmp_path, "a.jsonl", 20), Stub(), root=tmp_path / "media", source="name", max_tiles=3)
    assert remembered(tmp_path / "run") is None
    (tmp_path / "run").mkdir()
    paths = [remember(tmp_path / "run", split(rows, share, seed=1)[1], seed=1).name for share in (0.2, 0.2, 0.3)]
    assert paths == ["validation-split.json", "validation-split.json", "validation-split-1.json"]
    held = open_split(remembered(tmp_path / "run"), Stub())
    assert len(held) == 6 and len(list((tmp_path / "run").iterdir())) == 2
    assert (held.root, held.source, held.max_tiles) == (str(tmp_path / "media"), "name", 3)
