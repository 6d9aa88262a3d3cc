"""Files of answers that are whole, and every way in which they are not."""

import json

import pytest

from ivl.eval.benchmarks.tasks import TASKS
from ivl.eval.predictions import align, join, read
from ivl.types import UserError


@pytest.fixture
def answers(tmp_path):
    def write(*rows, name="p.jsonl", end="\n"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows) + end, encoding="utf-8")
        return path

    return write


def row(n, **more):
    return {"id": n, "response": f"answer {n}", "reference": "x", **more}


def test_rows_get_a_place_and_a_name(answers):
    rows = read(answers(row(7), row("b")))
    assert [(r["id"], r["where"]) for r in rows] == [("7", "p.jsonl:1"), ("b", "p.jsonl:2")]


def test_a_json_list_of_another_tool(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"questionId": 3, "answer": "yes", "annotation": ["yes"]}]))
    names = {"id": "questionId", "response": "answer", "answers": "annotation"}
    (found,) = read(path, names)
    assert (found["id"], found["response"], found["answers"]) == ("3", "yes", ["yes"])
    with pytest.raises(UserError, match=r"response: expected a text, found none; .*annotation, answer, questionId"):
        read(path)


def test_a_row_without_id_is_named_by_where_it_was_asked(answers):
    (found,) = read(answers({"id": None, "where": "val.jsonl:9", "response": "x"}))
    assert (found["id"], found["where"]) == ("val.jsonl:9", "p.jsonl:1")


def test_a_file_cut_in_a_row_is_refused(answers):
    path = answers(row(1), row(2), row(3))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"p\.jsonl:3: not valid JSON .*begins '\{\"id\": 3"):
        read(path)


def test_a_list_cut_off_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('[{"id": 1, "response": "x"}, {"id"')
    with pytest.raises(UserError, match="cut off or broken"):
        read(path)


def test_a_file_cut_between_rows_is_refused(answers):
    rows = [row(n, index=n, of=9) for n in range(9)]
    assert len(read(answers(*rows))) == 9
    with pytest.raises(UserError, match=r"2 rows of a run of 9; missing are rows 1, 3, 4, 5, 6, 7, 8 "):
        read(answers(rows[0], rows[2]))
    with pytest.raises(UserError, match=r"rows of runs of 9, 10 rows are mixed"):
        read(answers(rows[0], row(1, index=1, of=10)))


def test_answers_that_come_twice_are_refused(answers):
    with pytest.raises(UserError, match=r"2 ids come more than once: 1 \(rows 1, 3\), 2 \(rows 2, 4, 5\)"):
        read(answers(row(1), row(2), row(1), row(2), row(2)))
    assert len(read(answers(row(1, source="a"), row(1, source="b")))) == 2


def test_answers_of_two_models_are_refused(answers):
    with pytest.raises(UserError, match=r"p\.jsonl:2: model is 'b' but 'a' in p\.jsonl:1"):
        read(answers(row(1, model="a"), row(2, model="b")))


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_an_empty_file_is_refused(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="no rows"):
        read(path)


def test_rows_that_are_no_objects_are_named(answers):
    with pytest.raises(UserError, match=r"p\.jsonl:2: expected a JSON object, found str"):
        read(answers(row(1), "x"))


def test_ground_truth_is_joined_by_id(answers):
    truth = answers(
        {"id": 1, "query": "q", "response": "gold", "answers": ["a"]}, {"id": 2, "query": "q"}, name="t.jsonl"
    )
    path = answers({"id": 2, "response": "y", "reference": "kept"}, {"id": 1, "response": "x"})
    found = join(path, read(path), truth, TASKS["docvqa"])
    assert [(r["response"], r["reference"], r.get("answers")) for r in found] == [
        ("y", "kept", None),
        ("x", "gold", ["a"]),
    ]


def test_questions_without_answer_are_named(answers):
    truth = answers(*({"id": n, "query": "q"} for n in range(3)), name="t.jsonl")
    path = answers(row(1))
    with pytest.raises(
        UserError, match=r"2 of 3 questions of .*t\.jsonl have no answer: 0, 2; predict again, or --partial"
    ):
        join(path, read(path), truth, TASKS["docvqa"])
    assert len(join(path, read(path), truth, TASKS["docvqa"], partial=True)) == 1
    path = answers(row(1), row(5))
    with pytest.raises(UserError, match=r"1 answers to no question of .*t\.jsonl: 5"):
        join(path, read(path), truth, TASKS["docvqa"], partial=True)


def test_two_files_are_put_in_one_order(answers):
    first = read(answers(row(1), row(2)))
    other = answers(row(2), row(1), name="q.jsonl")
    assert [r["id"] for r in align(first, other, read(other))] == ["1", "2"]
    other = answers(row(2), row(3), name="q.jsonl")
    with pytest.raises(UserError, match=r"not the same questions as the first file; only one of them has 1, 3"):
        align(first, other, read(other))
