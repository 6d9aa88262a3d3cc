"""Thought and answer of thinking models, apart wherever answers are judged."""

import json

import pytest

from ivl.__main__ import run_command
from ivl.data.rows.grounding import parse_boxes
from ivl.reasoning import ReasoningStream, split_reasoning

THOUGHT = "<think>\nWait, maybe A? The box [[1, 2, 3, 4]] is wrong. yes it is not.\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B ", (None, "B ")),
        ("<think>a</think>\n\nB\n", ("a", "B")),
        ("a\n</think>B", ("a", "B")),
        ("<think></think>B", ("", "B")),
        ("<think>a</think>b</think>C", ("a</think>b", "C")),
        ("<think>\na, then", ("a, then", "")),
        ("<think>a</think><think>b", ("a</think><think>b", "")),
        ("the tag <think> opens a thought", (None, "the tag <think> opens a thought")),
        ("", (None, "")),
    ],
)
def test_the_thought_and_the_answer(text, expected):
    assert split_reasoning(text) == expected


def test_boxes_of_a_thought_are_not_the_answers():
    assert parse_boxes(THOUGHT + "cat[[5, 6, 7, 8]]") == [("cat", [(5, 6, 7, 8)])]
    assert parse_boxes("<think>cat[[5, 6, 7, 8]]") == []


@pytest.mark.parametrize(
    ("task", "rows", "scores"),
    [
        ("ai2d", [{"response": THOUGHT + "B", "reference": "B"}, {"response": THOUGHT + "C", "reference": "C"}], 100),
        ("docvqa", [{"response": THOUGHT + "42", "answers": ["42"]}, {"response": "42", "answers": ["42"]}], 100),
        (
            "ocrbench",
            [
                {"response": "<think>Could it be STOP? no</think>\nGO", "answers": ["STOP"], "category": "Text"},
                {"response": "GO", "answers": ["GO"], "category": "Text"},
            ],
            1,
        ),
        (
            "pope",
            [
                {"response": THOUGHT + "No", "reference": "no", "category": "random"},
                {
                    "response": "<think>there is no cat... but wait</think>\nYes",
                    "reference": "yes",
                    "category": "random",
                },
            ],
            100,
        ),
        ("refcoco", [{"response": THOUGHT + "[[0, 0, 500, 500]]", "box": [0, 0, 50, 50], "size": [100, 100]}], 100),
        ("refcoco", [{"response": "<think>[[0, 0, 500, 500]]", "box": [0, 0, 50, 50], "size": [100, 100]}], 0),
        ("ai2d", [{"response": "B", "reference": THOUGHT + "B"}], 100),
    ],
)
@pytest.mark.parametrize("mode", ["compat", "strict"])
def test_what_stands_before_the_answer_is_not_scored(tmp_path, task, rows, scores, mode):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row | {"id": str(n)}) + "\n" for n, row in enumerate(rows)))
    page = tmp_path / "page.html"
    assert (
        run_command("score", [str(path), "--task", task, "--mode", mode, "--resamples", "10", "--html", str(page)]) == 0
    )
    found = json.loads((tmp_path / "p.scores.json").read_text())
    assert found["files"][0]["score"] == scores
    assert ("it is not." in page.read_text()) == any("it is not." in row["response"] for row in rows)


@pytest.mark.parametrize(
    ("text", "begun", "thought", "answer"),
    [
        ("B", False, "", "B"),
        ("<think>\na</think>\n\nB <think> c", False, "\na", "\n\nB <think> c"),
        ("a</think>B", True, "a", "B"),
        ("  <think>a</think> <think>b</think> C </think", False, "ab", " C </think"),
        ("<think>a </th", False, "a </th", ""),
        ("<thi", False, "", "<thi"),
        ("<thin> x", False, "", "<thin> x"),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_stream_is_split_as_it_comes(text, begun, thought, answer, step):
    stream, parts = ReasoningStream(begun), {True: "", False: ""}
    for at in range(0, len(text), step):
        for is_thought, piece in stream.add(text[at : at + step]):
            parts[is_thought] += piece
    for is_thought, piece in stream.rest():
        parts[is_thought] += piece
    assert (parts[True], parts[False].lstrip()) == (thought, answer.lstrip())
