"""Official files to questions and back to scores."""

import base64
import importlib.util
import io
import json
import os

import pytest
from PIL import Image

from ivl.__main__ import run_command
from ivl.data.rows.formats import parse
from ivl.eval.benchmarks.tasks import TASKS, fingerprint, task
from ivl.types import UserError
from tests.eval import official

TABLES = importlib.util.find_spec("pyarrow") is not None
CAPTIONS = importlib.util.find_spec("pycocoevalcap") is not None
NEEDS = {"mmmu": TABLES, "videomme": TABLES, "coco": CAPTIONS, "flickr30k": CAPTIONS, "nocaps": CAPTIONS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    official.write(folder, TABLES)
    return folder


def rows_of(name, root):
    if not NEEDS.get(name, True):
        pytest.skip(f"{name} needs an optional package (pip install 'ivl[eval]')")
    return list(TASKS[name].rows(root))


SHORT = " Answer the question using a single word or phrase."
CHOOSE = "<image>\nLook.\nWhich?\nA. cat\nB. {}\n"
LETTER = "Answer with the option's letter from the given choices directly."
ASKED = {
    "vqav2": f"<image>\nHow many?{SHORT}",
    "vizwiz": "<image>\nHow many? When the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
    "ai2d": "<image>\nWhich?\nA. x\nB. y",
    "chartqa": f"<image>\nHow much?{SHORT}",
    "mme": f"<image>\nIs it a dog?{SHORT}",
    "pope": "<image>\nIs there a dog in the image?\nAnswer the question using a single word or phrase.",
    "mmbench_en": CHOOSE.format('a "hot" dog') + LETTER,
    "mmbench_cn": CHOOSE.format('a "hot" dog') + "请直接回答选项字母。",
    "scienceqa": CHOOSE.format("dog") + LETTER,
    "mmmu": f"<image>\nWhich <image 1>?\nA. cat\nB. dog\n{LETTER}",
    "mmstar": CHOOSE.format("dog") + LETTER,
    "hallusionbench": "<image>\nIs it? Please answer yes or no." + SHORT,
    "mathvista": "<image>\nHint: letter.",
    "seed": "<image>\nWhich?\nA. x\nB. y",
    "ocrbench": "<image>\nwhat is written?\nAnswer the question using a single word or phrase.",
    "coco": "<image>\nProvide a one-sentence caption for the provided image.",
    "refcoco": "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: "
    "<ref>the thing</ref>",
    "mvbench": "<video>\nCarefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, select the best option "
    "that accurately addresses the question.\n\n"
    "Question: What?\nOptions:\n(A) walk\n(B) run\nOnly give the best option.",
    "videomme": "<video>\n\nThese are the frames of a video. Select the best answer to the following multiple-choice "
    "question based on the video. Respond with only the letter (A, B, C, or D) of the correct option.\n"
    f"Question: What?\nA. walk.\nB. run.\nC. sit.\nD. lie. \n{LETTER}",
}


@pytest.mark.parametrize("name", ASKED)
def test_questions_are_asked_as_published(name, root):
    assert rows_of(name, root)[0]["query"] == ASKED[name]


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_rows_of_our_format(name, root):
    rows = rows_of(name, root)
    assert rows
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        conversation = parse(json.loads(json.dumps(row)))
        assert conversation.messages[-1].role == "assistant"
        assert [m.kind for m in conversation.media] == ["video"] if "videos" in row else ["image"] * len(row["images"])
        assert all(image.startswith("data:") or os.path.isfile(image) for image in row.get("images", []))


@pytest.mark.parametrize("name", TASKS)
def test_the_expected_answers_get_the_full_score(name, root, tmp_path):
    rows = rows_of(name, root)
    truth, said = tmp_path / "rows.jsonl", tmp_path / "said.jsonl"
    truth.write_text(official.lines(*rows), encoding="utf-8")
    best = [{"id": row["id"], "response": row["response"], "prompt": row["query"]} for row in rows]
    said.write_text(official.lines(*best), encoding="utf-8")
    assert run_command("score", [str(said), "--task", name, "--rows", str(truth), "--resamples", "20"]) == 0
    found = json.loads((tmp_path / "said.scores.json").read_text())
    best = {"mme": 14 * 200, "ocrbench": 2, "coco": 0, "flickr30k": 0, "nocaps": 0}  # one caption weighs no words
    assert found["files"][0]["score"] == pytest.approx(best.get(name, 100))
    assert found["files"][0]["asked_as_published"] == len(rows)


def test_tables_of_vlmevalkit(root):
    one, two, three = rows_of("blink", root)
    assert two["query"] == ("Image-1: <image>\nImage-2: <image>\n是什么?\nA. cat\nB. dog\n请直接回答选项字母。")
    assert three["query"] == f"<image>\nHow many?\nA. two\nB. nine\n{LETTER}"
    assert three["images"] == one["images"]  # its cell is the index of the first
    assert [row["group"] for row in rows_of("hallusionbench", root)] == ["illusion/0/0/0", "illusion/0/0/1"]
    assert [(row["response"], row.get("options")) for row in rows_of("mathvista", root)] == [
        ("B", {"A": "cat", "B": "dog"}),
        ("14", None),
    ]


@pytest.mark.parametrize(
    ("cell", "said"),
    [("9", "that of index 9, which has none"), ("['a" + "b" * 80, "image cell"), ("x" * 81, "image cell")],
)
def test_a_picture_that_cannot_be_read(cell, said, tmp_path):
    official.put(tmp_path / "LMUData/MMStar.tsv", f"index\tquestion\timage\n7\tWhich?\t{cell}\n")
    with pytest.raises(UserError, match=rf"MMStar.tsv: row with index 7: .*{said}"):
        list(TASKS["mmstar"].rows(tmp_path))


def test_ground_truth(root):
    (row,) = rows_of("vqav2", root)
    assert (row["id"], row["response"], row["answers"]) == ("420", "2", ["2"] * 9 + ["3"])
    assert [r["category"] for r in rows_of("chartqa", root)] == ["human", "augmented"]
    assert [r["id"] for r in rows_of("ocrvqa", root)] == ["01_0", "01_1"]
    assert [(r["group"], r["response"]) for r in rows_of("mmbench_en", root)] == [("3", "A"), ("3", "B")]
    assert rows_of("mmbench_en", root)[0]["options"] == {"A": "cat", "B": 'a "hot" dog'}
    assert [r["response"] for r in rows_of("pope", root)] == ["yes", "no"] * 3
    assert [r["id"] for r in rows_of("scienceqa", root)] == ["1"]
    (row, *_) = rows_of("refcoco+", root)
    assert (row["box"], row["size"], row["category"]) == ([4, 3, 20, 15.0], [40, 30], "val")
    assert row["response"] == "<ref>the thing</ref><box>[[100, 100, 500, 500]]</box>"


def test_only_some_videos_are_cut(root):
    rows = {row["category"]: row for row in rows_of("mvbench", root)}
    assert rows["Action Sequence"]["start"] == 1
    assert "start" not in rows["Action Count"]
    assert rows["Action Count"]["response"] == "(B) run "


def test_mmmu_doubles_the_first_picture(root):
    first, second = rows_of("mmmu", root)
    assert Image.open(io.BytesIO(base64.b64decode(first["images"][0].split(",")[1]))).size == (80, 60)
    assert second["query"].startswith("Image-1: <image>\nImage-2: <image>\nWhich <image 1>?\nAnswer the question using")
    assert second["answers"] == ["6.5", "six"]
    assert second["category"] == "Art_Theory"


def test_a_missing_file_is_named(tmp_path):
    words = r"^\S+val_v1\.0\.json: no such file; expected the benchmark's official download there$"
    with pytest.raises(UserError, match=words):
        list(task("docvqa").rows(tmp_path))
    (tmp_path / "docvqa/val").mkdir(parents=True)
    (tmp_path / "docvqa/val/val_v1.0.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"^\S+val_v1\.0\.json: cannot be read \(.*utf-8.*\); expected the"):
        list(task("docvqa").rows(tmp_path))
    with pytest.raises(UserError, match="no such benchmark"):
        task("nope")


def test_a_broken_download_is_named(tmp_path):
    official.put(tmp_path / "SEED/seed.jsonl", '{"question')
    with pytest.raises(UserError, match=r"seed\.jsonl:1: not valid JSON"):
        list(task("seed").rows(tmp_path))
    official.put(tmp_path / "SEED/seed.jsonl", '{"question_id": 1}')
    with pytest.raises(UserError, match=r"SEED-Bench, image: a record has no 'text'; expected the official SEED/seed"):
        list(task("seed").rows(tmp_path))
    official.put(tmp_path / "gqa/testdev_balanced_questions.json", "{")
    with pytest.raises(UserError, match=r"testdev_balanced_questions\.json: not valid JSON"):
        list(task("gqa").rows(tmp_path))


def test_pope_files_that_do_not_belong_together(root, tmp_path):
    for name in ("random", "popular", "adversarial"):
        official.put(tmp_path / f"pope/coco/coco_pope_{name}.json", official.lines({"text": "Is it?", "label": "no"}))
    row = {"question_id": 4, "image": "c.jpg", "text": "Is there a dog?", "category": "random"}
    official.put(tmp_path / "pope/llava_pope_test.jsonl", official.lines(row))
    with pytest.raises(UserError, match=r"question 4 \(random\) is not 'Is it\?'"):
        list(task("pope").rows(tmp_path))


def test_the_fingerprint_is_blind_to_order_and_folders(root):
    rows = rows_of("chartqa", root)
    elsewhere = [row | {"images": ["/elsewhere.png"]} for row in reversed(rows)]
    assert fingerprint(rows) == fingerprint(elsewhere)
    assert fingerprint(rows) != fingerprint([row | {"answers": ["13"]} for row in rows])
