"""What a data option accepts: files, meta files, shares of a file; names are in test_named."""

import json

import pytest

from ivl.data.sets.dataset import Mixture
from ivl.data.sets.sources import Source, is_meta, open_sources
from ivl.types import UserError
from tests.data.sets.test_dataset import Stub, write


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
