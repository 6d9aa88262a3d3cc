"""What a data option accepts: files, meta files, shares of a file; names are in test_named."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from huggingface_hub import constants

import ivl.hub
from ivl.data.sets.dataset import Mixture
from ivl.data.sets.sources import is_meta, open_rows, open_sources
from ivl.hub.dataset_files import dataset_files, files_of
from ivl.options import Source
from ivl.types import UserError
from tests.data.sets.test_dataset import Stub, query, write
from tests.hub_server import Hub, serve


def test_a_meta_file_stands_for_its_sources(tmp_path):
    write(tmp_path, "a.jsonl", 4)
    write(tmp_path, "b.jsonl", 10)
    meta = tmp_path / "meta.json"
    sources = {
        "ants": {"root": "images", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 2, "length": 4},
        "bees": {"root": "", "annotation": "b.jsonl", "repeat_time": 0.5, "max_dynamic_patch": 6, "length": 10},
    }
    meta.write_text(json.dumps(sources, indent=1))
    options = {"root": "given", "seed": 3}
    parts = open_sources(
        [str(meta), Source(str(tmp_path / "a.jsonl"), "own", repeat=3, max_tiles=2)], Stub(), **options
    )
    mixture = Mixture(parts)
    assert [part.name for part in parts] == ["ants", "bees", "own"] and mixture.counts == [8, 5, 12]
    assert [part.rows.max_tiles for part in parts] == [None, 6, 2] and {part.rows.seed for part in parts} == {3}
    assert [part.rows.conversation(0).id for part in parts] == ["images", "given", "given"]
    assert [part.rows.conversation(0).source for part in parts] == ["ants", "bees", "own"]
    assert len(parts[1].rows[0].tiles) == 6
    with pytest.raises(UserError, match="leave repeat and ratio out"):
        open_sources(Source(str(meta), ratio=2.0), Stub())


@pytest.mark.parametrize(
    "text", ['[{"annotation": "x"}]', '{"query": "q"}\n{"query": "r"}', "{", "", '{"a": {"b": 1}}']
)
def test_rows_are_no_meta_file(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert not is_meta(path)


def test_some_rows_of_a_file(tmp_path):
    path = write(tmp_path, "a.jsonl", 50)
    (part,) = open_sources(f"{path}#20", Stub())
    (again,) = open_sources(f"{path}#20", Stub())
    (other,) = open_sources(f"{path}#20", Stub(), seed=1)
    numbers = part.rows.numbers.tolist()
    assert len(set(numbers)) == 20 and numbers == again.rows.numbers.tolist() != other.rows.numbers.tolist()
    assert part.rows.where(0) == f"{path}:{numbers[0] + 1}"
    with pytest.raises(UserError, match="asked for 51 rows of 50"):
        open_sources(f"{path}#51", Stub())
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        open_sources(str(tmp_path / "gone.jsonl"), Stub())
    with pytest.raises(UserError, match="no files"):
        open_sources([], Stub())


def test_some_rows_of_several_names_in_order(tmp_path):
    a, b = write(tmp_path / "d", "a.jsonl", 50), write(tmp_path, "b.jsonl", 5)
    rows = open_rows([f"{a}#3", str(b), f"{tmp_path}/d/*.jsonl#2"], Stub())
    texts = [query(rows, n) for n in range(len(rows))]
    assert len(texts) == 10 and texts[3:8] == [f"b.jsonl {n}" for n in range(5)]
    (trained,) = open_sources(f"{a}#3", Stub())
    assert texts[:3] == [query(trained.rows, n) for n in range(3)]  # as in training and in `check`
    assert len(open_rows(str(tmp_path / "d") + "#4", Stub())) == 4 and len(open_rows(a, Stub())) == 50
    with pytest.raises(UserError, match=r"b\.jsonl#6: asked for 6 rows of 5"):
        open_rows([str(a), f"{b}#6"], Stub())
    odd = tmp_path / "b.jsonl#2"
    odd.write_bytes(a.read_bytes())
    assert len(open_rows(str(odd), Stub())) == 50  # a name with a # of its own


def test_some_rows_of_a_table_and_of_a_meta_file(tmp_path):
    (tmp_path / "a.csv").write_text("query,response\n" + "q,r\n" * 9)
    assert len(open_rows(f"{tmp_path / 'a.csv'}#4", Stub())) == 4
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"a": {"annotation": str(tmp_path / "a.csv")}}))
    with pytest.raises(UserError, match=r"meta\.json#2: a meta file says by repeat_time how much of its sources"):
        open_sources(f"{meta}#2", Stub())


def test_a_folder_and_a_pattern_stand_for_their_files(tmp_path):
    write(tmp_path / "data", "b.jsonl", 2)
    write(tmp_path / "data" / "deep", "a.jsonl", 3)
    (tmp_path / "data" / "notes.txt").write_text("not rows")
    (part,) = open_sources(str(tmp_path / "data"), Stub())
    assert [query(part.rows, n) for n in (0, 2)] == ["b.jsonl 0", "a.jsonl 0"] and part.name == "data"
    (part,) = open_sources(f"{tmp_path}/data/**/a*.jsonl#2", Stub())
    assert len(part.rows) == 2
    with pytest.raises(UserError, match=r"\*\.csv: no file fits this pattern"):
        open_sources(f"{tmp_path}/data/*.csv", Stub())
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="a folder without rows; expected files named"):
        open_sources(str(tmp_path / "none"), Stub())


@pytest.mark.parametrize("given", ["shard.tar", "more.shards.tar.gz", "folder"])
def test_the_command_that_converts_tar_files(tmp_path, monkeypatch, given):
    """It is Python, adds the question that such files lack, and names a file that is no tar file."""
    (tmp_path / "folder").mkdir()
    for name in ("shard.tar", "more.shards.tar.gz", "folder/0.tar"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"a tar file \(webdataset\)") as refused:
        open_sources(str(tmp_path / given), Stub())
    rows = MagicMock(__len__=lambda _: 3)
    load = MagicMock(return_value=rows)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    exec(str(refused.value).partition('python -c "')[2].partition('"')[0], {})
    files = f"{tmp_path / given}/*.tar*" if given == "folder" else str(tmp_path / given)
    load.assert_called_once_with("webdataset", data_files=files, split="train")
    rows.add_column.assert_called_once_with("query", ["Describe it."] * 3)
    name = {"shard.tar": "shard", "more.shards.tar.gz": "more.shards", "folder": "folder"}[given]
    rows.add_column().to_parquet.assert_called_once_with(f"{name}.parquet")
    with pytest.raises(UserError, match="no such file"):
        open_sources(str(tmp_path / "a.tar.parquet"), Stub())


def test_columns_of_a_source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "what?", "answer": "this"}\n')
    (part,) = open_sources(Source(str(path), columns={"query": "question", "response": "answer"}), Stub())
    assert query(part.rows, 0) == "what?"


LISTING = [
    "README.md",
    "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet",
    "data/test-00000-of-00001.parquet",
    "fr/train.jsonl",
    "retrain.txt",
]


@pytest.mark.parametrize(
    ("listing", "card", "subset", "split", "files"),
    [
        (LISTING[:4], {}, "", "train", LISTING[1:3]),
        (LISTING[:4], {}, "", "test", LISTING[3:4]),
        (LISTING, {}, "fr", "train", ["fr/train.jsonl"]),
        (["a.jsonl", "b.parquet"], {}, "", "train", ["a.jsonl", "b.parquet"]),
        (
            LISTING,
            {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]},
            "",
            "train",
            LISTING[1:3],
        ),
        (LISTING, {"configs": [{"config_name": "fr", "data_files": "fr/*.jsonl"}]}, "", "train", ["fr/train.jsonl"]),
    ],
)
def test_files_of_a_subset_and_split(listing, card, subset, split, files):
    assert files_of(listing, card, subset, split, "me/set") == files


@pytest.mark.parametrize(
    ("card", "subset", "split", "said"),
    [
        ({}, "", "dev", r"no rows for subset \(none\) and split dev; it has data/test"),
        ({"configs": [{"config_name": "a"}, {"config_name": "b"}]}, "", "train", "several subsets; name one .*: a, b"),
        ({"configs": [{"config_name": "a"}]}, "c", "train", "no subset c; name one"),
        (
            {"configs": [{"config_name": "a", "data_files": "x.csv"}]},
            "a",
            "test",
            "no split test; name one as me/set:a:",
        ),
    ],
)
def test_a_subset_or_split_that_is_not_there(card, subset, split, said):
    with pytest.raises(UserError, match=said):
        files_of(LISTING, card, subset, split, "me/set")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/t*.jsonl\n---\n"
    row = b'{"query": "what?", "response": "r"}\n'
    files = {"README.md": card, "data/t1.jsonl": row, "data/t2.jsonl": row * 2, "code.py": b"raise SystemExit"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve(Hub("me/set", files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_data_set_of_the_hub_by_name(hub, tmp_path, monkeypatch):
    (part,) = open_sources("me/set#2", Stub())
    assert len(part.rows) == 2 and query(part.rows, 0) == "what?"
    assert not hub.downloads("code.py") and len(hub.downloads("t1.jsonl")) == 1
    hub.log.clear()
    assert [path.name for path in dataset_files("me/set")] == ["t1.jsonl", "t2.jsonl"]
    assert not hub.downloads("t1.jsonl")  # its content is in the cache
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    assert [path.name for path in dataset_files("me/set")] == ["t1.jsonl", "t2.jsonl"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert [path.name for path in dataset_files("me/set")] == ["t1.jsonl", "t2.jsonl"] and not hub.log
    with pytest.raises(UserError, match="me/other: not in the cache, and offline; go online once"):
        dataset_files("me/other")


def test_the_token_of_the_command_opens_a_data_set(hub, monkeypatch):
    monkeypatch.setattr(ivl.hub, "_settings", ivl.hub._HubSettings())
    monkeypatch.setattr(hub, "token", "secret")
    with pytest.raises(UserError, match="me/set: huggingface says that it does not exist or that you may not have it"):
        dataset_files("me/set")
    ivl.hub.choose(token="secret")
    assert len(dataset_files("me/set")) == 2


def test_a_data_set_that_is_not_there(hub):
    with pytest.raises(UserError, match=r"me/gone: huggingface says that it does not exist .*datasets/me/gone and"):
        open_sources("me/gone", Stub())
    with pytest.raises(UserError, match=r"me/set:: no split dev; name one as me/set:default:SPLIT: train"):
        open_sources("me/set::dev", Stub())
