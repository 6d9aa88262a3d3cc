"""The index tells the truth about rows of every kind, is never older than its file, and stops what is too bad."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ivl.data.index import index_build as indexing
from ivl.data.index.index import RECORD, Index, concat, drop_unusable, reasons
from ivl.data.index.index_build import build_index, fingerprint
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.data.truncation import changes
from ivl.types import UserError
from tests.tiny import write_checkpoint

WORDS = ["describe", "the", "four", "sheep", "on", "grass,", "a", "small", "cat", "请描述", "100", "<ref>cat</ref>"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a loader worker; on a busy machine threads wait for one another at each small copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture="InternLM2ForCausalLM")


def pictures(folder, rng):
    """Pictures of many shapes, one of them turned by EXIF, and a clip."""
    names = []
    for n in range(12):
        size = (int(rng.integers(10, 300)), int(rng.integers(10, 300)))
        exif = Image.Exif()
        exif[0x0112] = 6 if n % 4 == 3 else 1
        names.append(f"{n}.{'jpg' if n % 2 else 'png'}")
        Image.new("RGB", size, (n * 20, 0, 0)).save(folder / names[-1], exif=exif)
    frames = [Image.new("RGB", (60, 40), (n * 20, 0, 0)) for n in range(5)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    return names


def random_row(rng, names):
    def text(least=1):
        return " ".join(rng.choice(WORDS, int(rng.integers(least, 40))))

    kind = int(rng.integers(6))
    images = [str(name) for name in rng.choice(names, int(rng.integers(1, 4)))]
    if kind == 0:
        return {"query": text(), "response": text()}
    if kind == 1:
        return {"query": text(), "response": text(), "history": [[text(), text()]] * 2, "images": images}
    if kind == 2:
        marked = [{"from": "human", "value": "<image>\n" * len(images) + text()}, {"from": "gpt", "value": text()}]
        return {"conversations": marked, "image": images}
    if kind == 3:
        return {"query": text(), "response": text(), "videos": ["clip.gif"]}
    if kind == 4:
        box = {"caption": "cat", "bbox": [1, 1, 5, 6], "bbox_type": "real", "image": 0}
        return {"query": "Find <ref-object>", "response": "<bbox>", "images": images[:1], "objects": [box]}
    return {"messages": [{"role": r, "content": text()} for r in ("system", "user", "assistant")]}


@pytest.mark.parametrize(
    "options", [{}, {"max_length": 560}, {"max_length": 450, "on_too_long": "drop", "max_tiles": 6}]
)
def test_lengths_equal_those_of_1000_examples(checkpoint, tmp_path, options):
    rng = np.random.default_rng(len(options))
    names = pictures(tmp_path, rng)
    path = tmp_path / "a.jsonl"
    count = 1000 if not options else 300
    path.write_text("".join(json.dumps(random_row(rng, names)) + "\n" for _ in range(count)))
    rows = RowDataset(path, Processor.from_pretrained(checkpoint, **options))
    index = build_index(rows, workers=0, cache_dir=tmp_path / "cache")
    assert bool(index.dropped) == ("on_too_long" in options) and index.tiles.max() > 3
    kept, part = drop_unusable(rows, index)
    assert len(kept) == len(part) == count - len(index.dropped)
    changed = 0
    for i in range(len(kept)):
        example = kept[i]
        found = len(example), len(example.tiles), example.num_supervised
        assert found == (part.tokens[i], part.tiles[i], part.supervised[i]), kept.where(i)
        assert part.records["changes"][i] == changes(example.notes)
        changed += bool(example.notes)
    said = [int(word) for word in re.findall(r"\d+", index.describe_changes())]
    if "on_too_long" in options:
        assert index.describe_changes() == f"left out {len(index.dropped)}"
    else:
        assert (changed > 0) == bool(options) and changed <= sum(said) <= 2 * changed


@pytest.fixture
def small(checkpoint, tmp_path):
    """Rows of three pictures, written twice, over two files."""
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.new("RGB", (100 + 100 * n, 100)).save(tmp_path / f"{n}.png")
    for name in ("a.jsonl", "b.jsonl"):
        lines = [
            {
                "query": f"{name} {n} " + " ".join(rng.choice(WORDS, n + 1)),
                "response": "a cat",
                "images": [f"{n % 3}.png"],
            }
            for n in range(6)
        ]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    processor = Processor.from_pretrained(checkpoint)

    def make(*names, **options):
        return RowDataset([tmp_path / name for name in names or ("a.jsonl", "b.jsonl")], processor, **options)

    return make


def test_made_once_for_each_file(small, tmp_path, monkeypatch):
    probed = []
    real = indexing._Probe._record

    def record(self, number):
        probed.append(self.rows.where(number))
        return real(self, number)

    monkeypatch.setattr(indexing._Probe, "_record", record)
    options = {"workers": 0, "cache_dir": tmp_path / "cache"}

    def probes(rows, **more):
        probed.clear()
        return build_index(rows, **options | more), len(probed)

    index, count = probes(small())
    assert count == 12
    again, count = probes(small())
    assert count == 0 and (again.records == index.records).all()
    assert probes(small("b.jsonl"))[1] == 0
    part, count = probes(small().select(np.array([7, 2])))
    assert count == 0 and (part.records == index.records[[7, 2]]).all()
    # All that decides lengths makes another index
    assert probes(small("a.jsonl", max_tiles=1))[1] == 6
    assert probes(small("a.jsonl", as_prompt=True))[1] == 6
    assert probes(small("a.jsonl", root=tmp_path / "x"))[1] == 6
    assert probes(small("a.jsonl"), media="decode")[1] == 6
    rows = small("a.jsonl")
    rows.processor.max_length = 30
    assert probes(rows)[1] == 6
    # The content of the file does, whatever its time and size say
    path = tmp_path / "b.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("a cat", "a dog"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and probes(small("b.jsonl"))[1] == 6


def test_a_damaged_cache_is_made_again(small, tmp_path):
    options = {"workers": 0, "cache_dir": tmp_path / "cache"}
    index = build_index(small("a.jsonl"), **options)
    for pattern in ("*.npy", "*.json"):
        for name, content in [(n, c) for n in (tmp_path / "cache").rglob(pattern) for c in (b"", b"x", None)]:
            name.unlink()  # another file: one that is mapped is never cut, or its reader ends with a bus error
            if content is not None:
                name.write_bytes(content)
            assert (build_index(small("a.jsonl"), **options).records == index.records).all()
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_picture_that_came_back_and_one_that_changed(small, tmp_path):
    options = {"workers": 0, "cache_dir": tmp_path / "cache"}
    picture = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").unlink()
    index = build_index(small("a.jsonl"), **options)
    assert sorted(index.problems) == [1, 4] and index.tokens[1] == 0
    assert index.problems[4].startswith(f"{tmp_path}/a.jsonl:5: {tmp_path}/1.png: no such file")
    assert build_index(small("a.jsonl"), **options).problems == index.problems
    (tmp_path / "1.png").write_bytes(picture)
    mended = build_index(small("a.jsonl"), **options)
    assert not mended.problems and mended.tokens.min() > 0
    assert not build_index(small("a.jsonl"), **options).problems
    rows, _ = drop_unusable(small("a.jsonl"), build_index(small("a.jsonl"), **options))
    Image.new("RGB", (500, 100)).save(tmp_path / "1.png")
    assert len(rows[0].tiles) == mended.tiles[0]
    with pytest.raises(UserError, match=r"a\.jsonl:2: .* its index says .* start again"):
        rows[1]
    rows, _ = drop_unusable(small("a.jsonl"), build_index(small("a.jsonl"), **options))
    assert len(rows[1].tiles) != mended.tiles[1]


def test_workers_and_the_generator_of_the_run(small, tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    path = tmp_path / "long.jsonl"
    path.write_text((tmp_path / "a.jsonl").read_text() * 800)
    torch.manual_seed(0)
    seen = []
    two = build_index(small("long.jsonl"), workers=2, cache_dir=tmp_path / "c2", progress=seen.append)
    assert torch.equal(torch.rand(3), expected)
    none = build_index(small("long.jsonl"), workers=0, cache_dir=tmp_path / "c0")
    assert (two.records == none.records).all() and len(two) == 4800
    assert seen == sorted(seen) and seen[-1] == 4800


def test_bad_rows_stop_or_are_left_out(small, tmp_path):
    (tmp_path / "1.png").write_bytes(b"<html>")
    with open(tmp_path / "b.jsonl", "a") as out:
        out.write("not json\n")
    index = build_index(small(), workers=0, cache_dir=tmp_path / "cache")
    assert sorted(index.problems) == [1, 4, 7, 10, 12]
    with pytest.raises(UserError) as caught:
        drop_unusable(small(), index)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/a.jsonl:2: ") and "\n5 of 13 rows cannot be used (on_error is error)" in text
    assert f"{tmp_path}/b.jsonl:7: not JSON" in text
    assert "4 … expected an image" in text
    report = tmp_path / "out" / "report.txt"
    with pytest.raises(UserError, match=r"more than max_bad = 5\.0%.*report\.txt"):
        drop_unusable(small(on_error="skip"), index, report=report)
    rows, part = drop_unusable(small(on_error="skip"), index, max_bad=0.5, report=report)
    assert len(rows) == len(part) == 8 and not part.problems
    assert [rows.where(i).split("/")[-1] for i in range(3)] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    lines = report.read_text().splitlines()
    assert lines[0] == "# problem: 5 of 13 rows" and lines[3].startswith(f"{tmp_path}/a.jsonl:2: ")
    # A picture that fails later, when it is decoded, is left out of its batch and added to the report
    data = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(data[: len(data) // 2])
    assert len(rows.__getitems__([0, 1, 2])) == 2
    assert report.read_text().splitlines()[-1].startswith(f"{tmp_path}/a.jsonl:3: ")
    decoded = build_index(small("a.jsonl"), workers=0, media="decode", cache_dir=tmp_path / "cache")
    assert sorted(decoded.problems) == [1, 2, 4, 5]


def test_nothing_left(small, tmp_path):
    rows = small("a.jsonl")
    rows.processor.max_length, rows.processor.on_too_long = 5, "drop"
    index = build_index(rows, workers=0, cache_dir=tmp_path / "cache")
    assert len(index.dropped) == 6 and not index.problems
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*\nnone of the 6 rows can be used"):
        drop_unusable(rows, index)
    (tmp_path / "bad.jsonl").write_text('{"query": "no answer", "response": ""}\n')
    rows = small("bad.jsonl", on_error="skip")
    with pytest.raises(UserError, match=r"bad\.jsonl:1: .*\nnone of the 1 rows can be used"):
        drop_unusable(rows, build_index(rows, workers=0, cache_dir=tmp_path / "cache"), max_bad=1.0)


def test_urls_are_not_asked(checkpoint, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"query": "a", "response": "b", "images": ["http://nowhere.invalid/a.png"]}) + "\n")
    rows = RowDataset(path, Processor.from_pretrained(checkpoint))
    index = build_index(rows, workers=0, cache_dir=tmp_path / "cache")
    assert not index.problems and index.tiles[0] == 13 and not index.records["exact"][0]
    kept, _ = drop_unusable(rows, index)
    assert kept.lengths.tolist() == [[-1, -1]]


def test_select_and_join_keep_problems():
    records = np.zeros(4, RECORD)
    records["tokens"] = [1, 2, 3, 4]
    index = Index(records, {1: "bad"}, {3: "long"})
    part = index.select(np.array([3, 0, 1]))
    assert part.tokens.tolist() == [4, 1, 2] and part.problems == {2: "bad"} and part.dropped == {0: "long"}
    both = concat([part, index])
    assert both.tokens.tolist() == [4, 1, 2, 1, 2, 3, 4]
    assert both.problems == {2: "bad", 4: "bad"} and both.dropped == {0: "long", 6: "long"}


def test_fingerprint_is_the_same_in_every_process(checkpoint):
    here = fingerprint(Processor.from_pretrained(checkpoint))
    code = (
        "import sys; from ivl.data.processor import Processor; from ivl.data.index.index_build import fingerprint;"
        "p = Processor.from_pretrained(sys.argv[1]); p.tokenizer.encode('a cat <img>'); print(fingerprint(p))"
    )
    for seed in "12":
        run = subprocess.run(
            [sys.executable, "-c", code, str(checkpoint)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert run.stdout.strip() == here, run.stderr
    for change in (
        {"max_length": 5},
        {"max_tiles": 3},
        {"exif": False},
        {"system_message": "x"},
        {"compact_boxes": True},
    ):
        assert fingerprint(Processor.from_pretrained(checkpoint, **change)) != here
    other = Processor.from_pretrained(checkpoint)
    del other.tokenizer.added["<quad>"]
    assert fingerprint(other) != here


def test_problems_are_counted_by_reason():
    found = reasons(
        [
            "train.jsonl:8: /data/a.jpg: no such file; expected an absolute path",
            "train.jsonl:9: /data/b.jpg: no such file; expected an absolute path",
            "t.jsonl:10: 2 <image> marks but 1 image; add one",
            "t.jsonl:11: 3 <image> marks but 1 image; add one",
        ]
    )
    assert found.most_common() == [("… no such file", 2), ("N <image> marks but N image", 2)]


def test_a_picture_that_changed_is_looked_at_again(small, tmp_path, monkeypatch):
    """Replaced (with its time of change kept), cut, deleted and back: the rows of that picture, and no others."""
    probed = []
    real = indexing._Probe._record

    def record(self, number):
        probed.append(number)
        return real(self, number)

    monkeypatch.setattr(indexing._Probe, "_record", record)

    def build(media="header"):
        probed.clear()
        index = build_index(small("a.jsonl"), workers=0, media=media, cache_dir=tmp_path / "cache")
        return index, len(probed)

    first, count = build()
    assert count == 6 and build()[1] == 0
    path = tmp_path / "1.png"
    before, data = os.stat(path), path.read_bytes()
    Image.new("RGB", (500, 100)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    index, count = build()
    assert count == 2 and not index.problems
    changed = np.flatnonzero(index.tiles != first.tiles).tolist()
    assert changed == [1, 4] and build()[1] == 0
    path.write_bytes(data[:20])
    assert sorted(build()[0].problems) == [1, 4]
    path.unlink()
    assert "no such file" in build()[0].problems[4]
    path.write_bytes(data)
    index, _ = build()
    assert not index.problems and (index.records == first.records).all() and build()[1] == 0
    path.write_bytes(data[: len(data) // 2])  # its header is whole
    assert not build()[0].problems
    for _ in range(2):
        assert sorted(build("decode")[0].problems) == [1, 4] and len(probed) == 6, "decoded each time"


def test_frames_in_a_folder_and_in_a_list(checkpoint, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for n in range(2):
        Image.new("RGB", (60, 60)).save(folder / f"{n}.png")
    lines = [
        {"query": "a", "response": "b", "videos": ["frames"]},
        {"query": "a", "response": "b", "videos": [["frames/0.png", "frames/1.png"]]},
    ]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = RowDataset(tmp_path / "v.jsonl", Processor.from_pretrained(checkpoint))
    index = build_index(rows, workers=0, cache_dir=tmp_path / "cache")
    assert not len(index.media.changed()) and index.media.rows.tolist() == [0, 1, 1]
    (folder / "1.png").write_bytes(b"")
    assert index.media.changed().tolist() == [0, 1]
    index = build_index(rows, workers=0, cache_dir=tmp_path / "cache")
    assert not len(index.media.changed())


def test_pictures_of_one_colour_are_counted_where_they_are_decoded(checkpoint, tmp_path):
    Image.new("RGB", (300, 100)).save(tmp_path / "black.jpg")
    Image.effect_noise((100, 100), 90).save(tmp_path / "noise.png")
    row = {"query": "a", "response": "b", "images": ["black.jpg", "noise.png", "black.jpg"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    rows = RowDataset(tmp_path / "a.jsonl", Processor.from_pretrained(checkpoint))
    for media, count in (("decode", 2), ("header", 0)):
        index = build_index(rows, workers=0, media=media, cache_dir=tmp_path / "cache")
        assert index.records["plain"].tolist() == [count]


def test_facts_of_rows(checkpoint, tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    boxes = {"query": "Where?", "response": "<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", "images": ["a.png", "a.png"]}
    talk = {"query": "c", "response": "d", "history": [["a", "b"]]}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (boxes, talk, boxes | {"id": "again"}, {"query": ""})))
    records = build_index(
        RowDataset(path, Processor.from_pretrained(checkpoint)), workers=0, cache_dir=tmp_path / "cache"
    ).records
    assert records[["turns", "media", "boxes"]].tolist() == [(1, 2, 2), (2, 0, 0), (1, 2, 2), (0, 0, 0)]
    assert records["same"][0] == records["same"][2] != records["same"][1] and not records["same"][3]
