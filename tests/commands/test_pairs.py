"""Pairs from answers: which are taken, what is written, and what is refused."""

import json

import pytest

from ivl.__main__ import main
from ivl.commands.pairs import pairs
from ivl.data.rows.formats import parse
from ivl.options import PairRule
from ivl.types import UserError

ROWS = [
    {"query": "<image>How many?", "response": "4", "images": ["a.png"], "id": "one", "system": "Count."},
    {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "cat"}], "image": "b.png"},
    {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "What is in the clip?"},
            {"role": "assistant", "content": "a dog"},
        ],
        "videos": [{"path": "c.mp4", "start": 1, "end": 2}],
    },
]
ANSWERS = [["4", "5", "4", "6"], ["dog", "cat"], ["a dog", "A DOG", "a cat"]]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(texts, **extra):
    rows = []
    for n, responses in enumerate(texts):
        lines = [one if isinstance(one, dict) else {"response": one, "finish_reason": "stop"} for one in responses]
        rows.append({"index": n, "responses": lines, **extra})
    return rows


def run(tmp_path, texts, rows=ROWS, **rule):
    file = write(tmp_path / "answers.jsonl", answers(texts))
    return list(pairs(file, [write(tmp_path / "data/rows.jsonl", rows)], PairRule(**rule), tmp_path))


def test_a_right_answer_against_a_wrong_one_of_every_format(tmp_path):
    made = run(tmp_path, ANSWERS)
    assert [(row["messages"][-1]["content"], row["rejected_response"]) for row in made[1:]] in (
        [("cat", "dog"), ("a dog", "a cat")],
        [("cat", "dog"), ("A DOG", "a cat")],
    )
    assert made[0]["messages"][-1]["content"] == "4" and made[0]["rejected_response"] in ("5", "6")
    assert (made[0]["id"], made[0]["system"], made[0]["images"]) == ("one", "Count.", ["data/a.png"])
    assert made[2]["videos"] == [{"path": "data/c.mp4", "start": 1.0, "end": 2.0}]


def test_a_pair_asks_what_the_row_asked(tmp_path):
    """Texts and media of the prompt, in their order, are those of the row, whatever its format."""
    for row, pair in zip(ROWS, run(tmp_path, ANSWERS)):
        del pair["rejected_response"]
        before, after = parse(row, root=tmp_path / "data").as_prompt(), parse(pair, root=tmp_path).as_prompt()
        assert before.messages == after.messages
        assert before.system == after.system


def test_several_pairs_of_a_row(tmp_path):
    (row,) = ROWS[:1]
    made = run(tmp_path, [["4", " 4", "5", "6", "7"]], [row], per_row=3)
    assert len({(p["messages"][-1]["content"], p["rejected_response"]) for p in made}) == 3
    assert made == run(tmp_path, [["4", " 4", "5", "6", "7"]], [row], per_row=3)
    assert len(run(tmp_path, [["4", "5"]], [row], per_row=9)) == 1


def test_the_reference_in_place_of_a_right_answer(tmp_path):
    assert run(tmp_path, [["5", "6"]], ROWS[:1]) == []
    (pair,) = run(tmp_path, [["5", "6"]], ROWS[:1], reference=True)
    assert pair["messages"][-1]["content"] == "4"


def test_thoughts_are_kept_and_answers_cut_off_are_not(tmp_path):
    texts = [
        {"response": "4", "reasoning": "two and two", "finish_reason": "stop"},
        {"response": "5", "reasoning": None, "finish_reason": "length"},
        {"response": "6", "reasoning": None, "finish_reason": "stop"},
    ]
    (pair,) = run(tmp_path, [texts], ROWS[:1])
    assert pair["messages"][-1]["content"] == "<think>\ntwo and two\n</think>\n\n4"
    assert pair["rejected_response"] == "6"


def test_boxes_by_their_overlap(tmp_path):
    row = {"query": "Find <ref>cat</ref>", "response": "<box>[[0, 0, 100, 100]]</box>"}
    near, far = "<box>[[0, 0, 100, 95]]</box>", "<box>[[800, 800, 900, 900]]</box>"
    (pair,) = run(tmp_path, [[near, far]], [row], metric="iou", right=0.9, wrong=0.3)
    assert (pair["messages"][-1]["content"], pair["rejected_response"]) == (near, far)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"index": 0, "response": "4"}], r"answers\.jsonl:1: one answer alone; .*num_answers 8"),
        ([{"index": 7, "responses": []}], r"answers\.jsonl:1: index: expected a number below 3, found 7"),
        ([{"index": 0, "responses": [], "reference": "9"}], r"reference '9', but .*rows\.jsonl:1 has '4'"),
    ],
)
def test_answers_that_are_not_of_these_rows(tmp_path, lines, said):
    file, rows = write(tmp_path / "answers.jsonl", lines), write(tmp_path / "data/rows.jsonl", ROWS)
    with pytest.raises(UserError, match=said):
        list(pairs(file, [rows], PairRule(), tmp_path))


def test_the_command(tmp_path, capsys):
    file, rows = write(tmp_path / "answers.jsonl", answers(ANSWERS)), write(tmp_path / "data/rows.jsonl", ROWS)
    out = tmp_path / "pairs.jsonl"
    argv = ["pairs", str(file), "--rows", str(rows), "--out", str(out)]
    assert main(argv) == 0
    assert "3 rows, 8 different answers: 50.0% right, 50.0% wrong; 3 pairs" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 3
    assert main(argv) == 2 and "exists already" in capsys.readouterr().err
    out.unlink()
    assert main([*argv, "--wrong", "2"]) == 2 and "expected --wrong below --right" in capsys.readouterr().err
    write(file, answers([["4", "4"]]))
    assert main(argv) == 2 and "no row has a right and a wrong answer" in capsys.readouterr().err
    assert not out.exists()
