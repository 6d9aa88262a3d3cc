"""`python -m ivl check` on rows with mistakes: each is found, named by file and line, and nothing else is."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from PIL import Image

from ivl.__main__ import main
from ivl.commands.check import _lengths, read_options
from ivl.commands.rendered import rendered
from ivl.data.index.index import RECORD, Index
from ivl.data.processor import Processor
from ivl.options import CheckOptions, DataOptions
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    write_checkpoint(folder / "model", architecture="InternLM2ForCausalLM")
    Image.new("RGB", (120, 60), (200, 220, 255)).save(folder / "a.png")
    Image.effect_noise((150, 100), 90).convert("RGB").save(folder / "b.jpg")
    (folder / "cut.jpg").write_bytes((folder / "b.jpg").read_bytes()[:2000])
    (folder / "page.jpg").write_text("<html>404</html>")
    return folder


def found(caption="it", bbox=(10, 10, 50, 50), image="a.png"):
    objects = [{"caption": caption, "bbox": list(bbox), "bbox_type": "real", "image": 0}]
    return {"query": "Find <ref-object>", "response": "<bbox>", "images": [image], "objects": objects}


GOOD = [
    found(),
    {"query": "Compare", "response": "They differ", "images": ["a.png", "b.jpg"], "history": [["Hello", "Hi"]]},
    {"query": "text only", "response": "four sheep on the grass"},
    {"query": "How many?", "response": "four", "images": ["b.jpg"]},
    {"query": "How many?", "response": "four", "images": ["b.jpg"]},
]
BAD = [
    ({"query": "<image><image>", "response": "x", "images": ["a.png"]}, "2 <image> marks but 1 image"),
    ({"query": "q", "response": "x", "images": ["gone.jpg"]}, "gone.jpg: no such file"),
    (found(bbox=(50, 10, 10, 50)), "expected x_min <= x_max"),
    (found(bbox=(10, 10, 500, 50)), "reaches outside of 120 x 60"),
    ("{broken", "not JSON"),
    ({"query": "q", "response": ""}, "the last answer is empty"),
    ({"question": "q", "answer": "x"}, "expected one of query, conversations or messages"),
    ({"query": "q", "response": "x", "images": ["page.jpg"]}, "found text that begins with '<html>"),
    ({"query": "q", "images": ["a.png"]}, "no answer to learn from"),
    (found() | {"objects": []}, "1 <ref-object> mark but 0 objects"),
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def check(base, tmp_path, *argv):
    options = ("--out", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--workers", "0")
    return main(["check", "--model.pretrained", str(base / "model"), "--data.media_root", str(base), *options, *argv])


def test_every_mistake_is_named_and_nothing_else(base, tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", [row for row, _ in BAD] + GOOD)
    assert check(base, tmp_path, "--data.train", path, "--show", "4") == 2
    out, report = capsys.readouterr().out, (tmp_path / "out" / "report.txt").read_text()
    lines = [line for line in report.splitlines() if re.match(rf"{re.escape(path)}:\d+: (?!as )", line)]
    assert len(lines) == len(BAD)
    for n, (_, words) in enumerate(BAD, start=1):
        (line,) = (line for line in lines if line.startswith(f"{path}:{n}: "))
        assert words in line
    assert out.count(f"{path}:") < report.count(f"{path}:"), "what is printed is capped, the report is not"
    assert "… and 6 more in the report" in out and "15 rows, 10 with a problem" in out
    assert f"{path}:15: as {path}:14" in out and "\n10 problems; all of it is in" in out
    sheet = Image.open(tmp_path / "out" / "sheet.png").convert("RGB")
    assert sheet.width > 1000 and (30, 150, 60) in {colour for _, colour in sheet.getcolors(1 << 24)}


def test_numbers_of_good_rows(base, tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", GOOD)
    assert check(base, tmp_path, "--data.train", path) == 0
    out = capsys.readouterr().out
    examples = [Processor.from_pretrained(base / "model")(row, root=base) for row in GOOD]
    table = {
        line[:20].strip(): line[20:].split() for line in out.splitlines() if re.match(r"\D{20}( +[\d.]+){5}$", line)
    }
    tokens = sorted(map(len, examples))
    assert table["tokens"] == [str(n) for n in (tokens[0], tokens[2], tokens[-1], tokens[-1], sum(tokens))]
    assert table["tiles"][-1] == str(sum(len(e.tiles) for e in examples))
    assert table["turns"] == ["1", "1", "2", "2", "6"] and table["boxes"] == ["0", "0", "1", "1", "1"]
    share = 100 * sum(e.num_supervised for e in examples) / sum(tokens)
    assert table["trained on, %"][-1] == f"{share:.1f}"
    assert "no problems" in out and "[+<box>" in out and "\x1b[" not in out
    longest = out.split("longest rows:\n")[1].splitlines()[0]
    assert longest.endswith(f"{path}:{1 + max(range(5), key=lambda n: len(examples[n]))}")


def test_no_row_of_equal_ones_is_the_longest(base, tmp_path, capsys):
    assert check(base, tmp_path, "--data.train", write(tmp_path / "rows.jsonl", [GOOD[0]] * 3)) == 0
    assert "longest rows" not in capsys.readouterr().out


def test_lengths_in_words():
    index = Index(np.zeros(3, RECORD))
    index.records["tokens"], index.records["tiles"] = (7, 9, 9), (1, 0, 2)
    assert [_lengths(index, n) for n in range(3)] == ["7 tokens, 1 tile", "9 tokens, 0 tiles", "9 tokens, 2 tiles"]


def test_damage_that_only_decoding_finds(base, tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", [*GOOD, {"query": "q", "response": "x", "images": ["cut.jpg"]}])
    assert check(base, tmp_path, "--data.train", path) == 0
    assert check(base, tmp_path, "--data.train", path, "--media") == 2
    assert f"{path}:6: {base / 'cut.jpg'}: a damaged image" in capsys.readouterr().out.split("1 with a problem")[1]


def test_a_second_run_reads_no_row(base, tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl", GOOD)
    assert check(base, tmp_path, "--data.train", path) == 0
    read = []
    own = Processor.parse
    monkeypatch.setattr(
        Processor, "parse", lambda self, row, *a: read.append(isinstance(row, dict)) or own(self, row, *a)
    )
    assert check(base, tmp_path, "--data.train", path) == 0
    assert sum(read) == len(GOOD), "those of the contact sheet"


def test_held_out_rows_that_are_trained_on_and_prompts(base, tmp_path, capsys):
    train, val = write(tmp_path / "train.jsonl", GOOD[:3]), write(tmp_path / "val.jsonl", GOOD[2:4])
    ask = write(tmp_path / "ask.jsonl", [{"query": "q", "images": ["a.png"]}])
    assert check(base, tmp_path, "--data.train", train, "--data.val", val, "--data.predict", ask) == 2
    out = capsys.readouterr().out
    assert f"data.val that are in data.train as well: 1\n{val}:1: trained on as {train}:3; take it out" in out
    assert "# data.predict: 1 row, 0 with" in out and "\n1 problem; all of it is in" in out
    assert check(base, tmp_path, "--data.train", train, "--data.val", write(tmp_path / "v.jsonl", GOOD[3:4])) == 0


def test_limits_of_files_are_options(base, tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", [*GOOD, {"query": "q" * 500, "response": "r"}])
    assert check(base, tmp_path, "--data.train", path, "--data.file_limits.max_row_bytes", "400") == 2
    assert re.search(rf"{path}:6: a row of \d+ bytes, but the limit is 400", capsys.readouterr().out)
    assert check(base, tmp_path, "--data.train", path) == 0


def test_keys_that_are_not_read_are_listed(base, tmp_path, capsys):
    path = write(tmp_path / "train.jsonl", [GOOD[0], GOOD[1] | {"score": 1}, GOOD[2] | {"score": 2, "width": 3}])
    assert check(base, tmp_path, "--data.train", path) == 0
    out = capsys.readouterr().out
    assert f"keys that are not read:\n       2 score ({path}:2)\n       1 width ({path}:3)\n" in out
    assert "keys that are not read" in (tmp_path / "out" / "report.txt").read_text()


def test_one_row(base, tmp_path, capsys):
    assert check(base, tmp_path, "--data.train", write(tmp_path / "train.jsonl", GOOD[:1])) == 0
    out = capsys.readouterr().out
    assert "# data.train: 1 row, 0 with" in out and "contact sheet of 1 row: " in out


def test_a_config_of_fit(base, tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", GOOD)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"two": {"annotation": train, "repeat_time": 2, "max_dynamic_patch": 1}}))
    config = tmp_path / "fit.yaml"
    text = f"trainer: {{max_steps: 3}}\nmodel: {{pretrained: {base / 'model'}, tune: {{}}}}\n"
    config.write_text(text + f"data: {{train: [{meta}], media_root: {base}, batch_size: 2, video: {{fps: 2.0}}}}\n")
    options = ["--out", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    assert main(["check", "--config", str(config), *options]) == 0
    out = capsys.readouterr().out
    assert "| two | 5 | 10 | 2 | 100.0% |" in out and re.search(r"\ntiles +0 +1 +2 ", out), "its own limit of tiles"
    assert (
        main(["check", "--config", str(config), "--data.max_length", "20", *options, "--data.on_too_long", "error"])
        == 2
    )
    assert "but max_length is 20" in capsys.readouterr().out
    config.write_text(text + f"data: {{trian: {train}}}\n")
    assert main(["check", "--config", str(config), *options]) == 2
    assert "data.trian: no such option" in capsys.readouterr().err


def test_the_config_that_a_run_left(base, tmp_path, capsys):
    """Every option of the data module is in it, most of them none of check's; a mixture instead of files."""
    train, given = write(tmp_path / "train.jsonl", GOOD), asdict(DataOptions())
    sources = [{"path": train, "name": "a", "ratio": 1.0, "repeat": None}, {"path": train, "name": "b", "ratio": 3.0}]
    given |= {"pretrained": str(base / "model"), "mixture": sources, "media_root": str(base), "max_length": 205}
    run = {"seed_everything": 3, "trainer": {"devices": 1}, "ckpt_path": None, "data": given}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run | {"model": {"pretrained": str(base / "model")}}))
    options = ["--out", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    status = main(["check", "--config", str(tmp_path / "config.yaml"), *options])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "| a | 5 | 3 |" in out and "| b | 5 | 7 |" in out
    assert re.search(r"rows that max_length changes: fewer tiles \d", out), out


def test_the_data_of_a_run(base, tmp_path, capsys):
    """By its folder or a file in it; what is typed counts more."""
    train = write(tmp_path / "train.jsonl", GOOD)
    folder = tmp_path / "runs/version_0"
    (folder / "checkpoints").mkdir(parents=True)
    data = {"train": train, "media_root": str(base), "max_length": 205}
    config = {"model": {"pretrained": str(base / "model")}, "data": data, "trainer": {"max_steps": 3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    argv = ["--out", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--workers", "0"]
    for path in (folder, folder / "checkpoints/last.ckpt"):
        assert main(["check", "--run", str(path), *argv]) == 0
        assert "# data.train: 5 rows, 0 with a problem" in capsys.readouterr().out
    limit = ["--data.on_too_long", "error"]
    assert main(["check", "--run", str(folder), *argv, *limit]) == 2
    assert "but max_length is 205" in capsys.readouterr().out
    assert main(["check", "--run", str(folder), *argv, *limit, "--data.max_length", "null"]) == 0
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"data": data | {"max_length": None}}))
    assert read_options(CheckOptions(run=str(folder)))[1].max_length is None, "no limit, and not the default one"
    capsys.readouterr()
    assert main(["check", "--run", str(tmp_path / "nowhere"), *argv]) == 2
    assert "nowhere: no config.yaml in it; expected the folder of a run" in capsys.readouterr().err


def test_mistakes_of_the_command_line(base, tmp_path, capsys):
    gone, rows = str(tmp_path / "gone.jsonl"), write(tmp_path / "train.jsonl", GOOD)
    for argv, words in (
        ((), "nothing to check"),
        (("--data.train", rows, "--model.pretrained", ""), "--model.pretrained: not given"),
        (("--data.trian", rows), "trian"),
        (("--config", gone), "gone.jsonl: cannot be read"),
    ):
        assert check(base, tmp_path, *argv) == 2
        assert words in capsys.readouterr().err
    assert check(base, tmp_path, "--data.train", rows, "--data.val", gone) == 2
    out = capsys.readouterr().out
    assert f"data.val: {gone}: no such file" in out and "# data.train: 5 rows, 0 with a problem" in out


def test_the_mask_is_shown_as_it_is(base, monkeypatch):
    processor = Processor.from_pretrained(base / "model")
    example = processor(GOOD[3], root=base)
    count = len(example.tiles) * processor.config.tokens_per_tile
    plain = rendered(example, processor, colour=False)
    assert plain.endswith("[+four<|im_end|>+]") and f"<img><IMG_CONTEXT>×{count}</img>" in plain
    assert plain.count("[+") == 1
    coloured = rendered(example, processor, colour=True)
    assert "\x1b[32mfour<|im_end|>\x1b[0m" in coloured and coloured.count("\x1b[32m") == 1
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain.replace("[+", "").replace("+]", "")


def test_turned_boxes_and_pictures_of_one_colour_are_listed(base, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (120, 60), (9, 9, 9)).save(tmp_path / "turned.png", exif=exif)
    path = write(tmp_path / "train.jsonl", [found(), found(image=str(tmp_path / "turned.png"))])
    assert check(base, tmp_path, "--data.train", path) == 0
    out = capsys.readouterr().out
    assert f"rows whose boxes turn with their pictures, as EXIF says: 1\n{path}:2\n" in out
    assert "one colour" not in out
    assert check(base, tmp_path, "--data.train", path, "--media") == 0
    assert f"rows with pictures or frames of one colour (2 of them): 2\n{path}:1\n{path}:2\n" in capsys.readouterr().out
    assert check(base, tmp_path, "--data.train", path, "--data.media.boxes", "upright") == 0
    assert "boxes turn" not in capsys.readouterr().out


def test_a_picture_that_was_cut_after_a_check_is_found(base, tmp_path, capsys):
    Image.effect_noise((100, 80), 90).save(tmp_path / "a.png")
    path = write(tmp_path / "train.jsonl", [{"query": "q", "response": "x", "images": [str(tmp_path / "a.png")]}])
    for argv in ((), ("--media",)):
        assert check(base, tmp_path, "--data.train", path, *argv) == 0
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    assert check(base, tmp_path, "--data.train", path) == 0, "its header is whole"
    assert check(base, tmp_path, "--data.train", path, "--media") == 2
    (tmp_path / "a.png").unlink()
    assert check(base, tmp_path, "--data.train", path) == 2
    assert "no such file" in capsys.readouterr().out


def test_pairs_of_answers_are_shown_and_the_bad_ones_named(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model")
    rows = [
        {"query": "What is it?", "response": "a cat", "rejected_response": "a dog"},
        {"query": "What is it?", "response": "a cat", "rejected_response": "a cat "},
        {"query": "What is it?", "response": "a cow"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "dpo.yaml"
    config.write_text(f"model: {{pretrained: {folder}, objective: {{dpo: {{}}}}}}\n")
    argv = ["check", "--config", str(config), "--data.train", str(path), "--out", str(tmp_path / "check")]
    assert main([*argv, "--workers", "0"]) == 2
    printed = capsys.readouterr().out
    assert "pairs.jsonl:2: the chosen and the rejected answer are the same" in printed
    assert "pairs.jsonl:3: no rejected answer to compare with" in printed
    assert "its rejected answer:" in printed and "[+a dog" in printed
