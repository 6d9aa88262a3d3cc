"""Scores of any answers with references: whose fields are read, what is scored, compared and shown."""

import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from ivl.__main__ import run_command
from ivl.eval import own
from ivl.eval.report import PAGE
from ivl.types import UserError

main = partial(run_command, "score")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


PREDICTED = [
    {
        "id": "a",
        "source": "signs",
        "response": "Stop",
        "reference": "stop",
        "prompt": "<img><IMG_CONTEXT></img>\nWhat?",
    },
    {"id": "b", "source": "signs", "response": "a red car", "reference": "the red car"},
    {"id": "c", "source": "boxes", "response": "<box>[[0, 0, 500, 500]]</box>", "reference": "[[0, 0, 500, 1000]]"},
    {"id": "d", "source": "boxes", "response": "nothing", "reference": "[[0, 0, 500, 1000], [1, 1, 2, 2]]"},
]


def scores(path: Path, number: int = 0) -> dict:
    return json.loads(path.read_text())["files"][number]["scores"]


def test_a_file_of_predict_is_scored_per_source(tmp_path, capsys):
    assert main([write(tmp_path / "p.jsonl", PREDICTED)]) == 0
    found = scores(tmp_path / "p.scores.json")
    assert found["signs"]["exact"]["value"] == 50 and found["signs"]["rows"] == 2 and "iou" not in found["signs"]
    assert found["signs"]["f1"]["value"] == pytest.approx(100 * (1 + 2 * 2 / 6) / 2, abs=1e-5)
    assert found["boxes"]["iou"]["value"] == 25 and found["all"]["rows"] == 4
    assert found["all"]["exact"] | {"low": 0, "high": 0} == {"value": 25, "low": 0, "high": 0}
    assert 0 <= found["all"]["exact"]["low"] < 25 < found["all"]["exact"]["high"] <= 100
    out = capsys.readouterr().out
    head, *lines = [line.split() for line in out.splitlines()[:4]]
    assert head == ["p.jsonl", "rows", "exact", "ANLS", "F1", "IoU"]
    assert [line[0] for line in lines] == ["boxes", "signs", "all"] and lines[1][-1] == "-"
    assert "times 100, with 95 % intervals" in out


FOREIGN = {
    "ms-swift": [
        {
            "response": "Stop",
            "labels": "stop",
            "logprobs": None,
            "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Stop"}],
            "images": [{"bytes": None, "path": "a.jpg"}],
        }
    ],
    "LLaMA-Factory": [{"prompt": "What?", "predict": "Stop", "label": "stop"}],
    "several references": [{"prediction": "Stop", "answers": ["halt", "stop"]}],
    "messages alone": [
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "Stop"}]}], "gold": "stop"}
    ],
    "a thought": [{"response": "<think>stop</think>Stop", "solution": "<think>x</think>stop"}],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_are_read(tmp_path, name):
    assert main([write(tmp_path / "p.jsonl", FOREIGN[name])]) == 0
    assert scores(tmp_path / "p.scores.json")["all"]["exact"]["value"] == 100


def test_other_names_are_given_for_all_files_or_one(tmp_path, capsys):
    ours = write(tmp_path / "ours.jsonl", [{"response": "x", "reference": t} for t in ("x", "y", "z", "x")])
    theirs = write(tmp_path / "theirs.jsonl", [{"said": t, "truth": t} for t in ("x", "y", "z", "x")])
    with pytest.raises(UserError, match=r"theirs.jsonl:1: response: expected a text, found none"):
        main([ours, theirs])
    fields = ["--field", "2:response=said", "--field", "2:reference=truth"]
    assert main([ours, theirs, *fields, "--html", str(tmp_path / "r.html")]) == 0
    (gap,) = json.loads((tmp_path / "ours.scores.json").read_text())["comparison"]
    assert gap["less"] == "ours.jsonl" and gap["scores"]["exact"]["value"] == 50
    assert gap["scores"]["exact"]["mcnemar"] == 0.5
    assert "theirs.jsonl less ours.jsonl" in capsys.readouterr().out
    (row, *_) = rows_of(tmp_path / "r.html")
    assert row["other"] == "x" and row["gap"] == 0
    page = (tmp_path / "r.html").read_text()
    assert '["ours.jsonl","theirs.jsonl"]' in page and "other answer" not in page
    facts = page.partition('<p class="quiet">')[2].partition("</p>")[0]
    assert facts.startswith("ours.jsonl: exact 50.0 [") and "; theirs.jsonl: exact 100.0 [" in facts


def test_files_are_matched_by_source_and_id_or_by_place(tmp_path):
    first = [{"id": "1", "source": s, "response": "x", "reference": s} for s in "ab"]
    other = [{"id": "1", "source": s, "response": s, "reference": s} for s in "ba"]
    assert main([write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", other)]) == 0
    assert json.loads((tmp_path / "a.scores.json").read_text())["comparison"][0]["scores"]["exact"]["value"] == 100
    by_place = [{"response": "x", "reference": s} for s in "ab"]
    assert main([write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", by_place)]) == 0
    with pytest.raises(UserError, match="not the same questions as the first file, neither by id"):
        main([write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", by_place[::-1])])


def test_references_are_joined_from_rows(tmp_path):
    answers = write(tmp_path / "p.jsonl", [{"id": "1", "response": "x"}, {"id": "2", "response": "y"}])
    with pytest.raises(UserError, match=r"p.jsonl:1: no reference, as 2 of 2 rows; --field reference=NAME"):
        main([answers])
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "y"}]
    truth = write(
        tmp_path / "rows.jsonl", [{"id": "1", "query": "?", "response": "x"}, {"id": "2", "messages": messages}]
    )
    assert main([answers, "--rows", truth]) == 0
    assert scores(tmp_path / "p.scores.json")["all"]["exact"]["value"] == 100
    with pytest.raises(UserError, match="expected a file of rows; a folder of official files takes --task"):
        main([answers, "--rows", str(tmp_path)])


def rows_of(page: Path) -> list[dict]:
    text = page.read_text(encoding="utf-8")
    return json.loads(text.partition('id="rows">')[2].partition("</script>")[0])


def test_the_page_shows_pictures_boxes_and_nothing_that_runs(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.jpg")
    evil = "</script><script>alert(1)</script>"
    pictured = {"images": ["gone.jpg", "a.jpg"]} | PREDICTED[2] | {"prompt": evil, "id": evil}
    assert main([write(tmp_path / "p.jsonl", [*PREDICTED[:2], pictured]), "--html", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert text.count("<script") == PAGE.read_text().count("<script") and evil not in text
    assert "http://" not in text and text.count("data:image/jpeg;base64,") == 1  # relative to the file of answers
    row = rows_of(tmp_path / "r.html")[2]
    assert row["wanted"] == [[0, 0, 0.5, 1]] and row["found"] == [[0, 0, 0.5, 0.5]] and row["score"] == 0.5
    assert row["pictures"] == [0, 1] and "IoU 0.50" in row["parsed"]
    assert "3 rows" in text and "exact 33.3 [" in text


@pytest.mark.parametrize(
    ("response", "reference", "f1"),
    [
        ("The red car.", "the red car", 1),
        ("红色的车", "红车", 2 * 2 / 6),
        ("", "", 1),
        ("!", "a", 0),
        ("a a", "a", 2 / 3),
    ],
)
def test_words_are_counted(response, reference, f1):
    assert own.word_f1(response, reference) == pytest.approx(f1)


def test_numbers_that_are_no_box_are_left_out():
    assert own.boxes_in("[1, 2, 3, 4] [9, 2, 3, 4] [1,2,3] [1.2.3, 2, 3, 4] [0,0,1001,5] [[1.5,2,3,4]]") == [
        [0.001, 0.002, 0.003, 0.004],
        [0.0015, 0.002, 0.003, 0.004],
    ]
    assert own.mean_iou("[0, 0, 10, 10]", "no box") is None
    assert own.mean_iou("[0, 0, 10, 10], [0, 0, 10, 10]", "[0, 0, 10, 10]") == 0.5


def test_captions_are_scored_where_the_package_is_installed(tmp_path):
    pytest.importorskip("pycocoevalcap")
    texts = ["a man rides a brown horse", "two dogs play in the snow", "a plate of food on a table"]
    rows = [{"source": "captions", "response": t, "reference": t} for t in texts]
    rows += [{"source": "signs", "response": "stop", "reference": "stop"}]
    assert main([write(tmp_path / "p.jsonl", rows)]) == 0
    found = scores(tmp_path / "p.scores.json")
    assert found["captions"]["cider"]["value"] > 500 and "cider" not in found["signs"]
