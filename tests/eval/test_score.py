"""The command: what it prints and writes."""

import json
from functools import partial

import pytest

from ivl.__main__ import run_command
from ivl.eval.benchmarks.tasks import TASKS
from ivl.types import UserError

main = partial(run_command, "score")
PROMPT = "<img></img>\nWhat? Answer the question using a single word or phrase."


@pytest.fixture
def file(tmp_path):
    def write(name, said):
        rows = [
            {
                "id": f"q{n}",
                "prompt": PROMPT,
                "response": text,
                "answers": ["blue", "dark blue"],
                "model": "m",
                "max_tiles": 18,
            }
            for n, text in enumerate(said)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def test_a_score_is_printed_and_written(file, tmp_path, capsys):
    path = file("p.jsonl", ["blue"] * 6 + ["red"] * 4)
    assert main([path, "--task", "docvqa"]) == 0
    out = capsys.readouterr().out
    assert "DocVQA val · compat · 10 rows of 5349: a part of the benchmark" in out
    assert "p.jsonl         60.00  [30.00, 90.00]" in out
    found = json.loads((tmp_path / "p.scores.json").read_text())
    assert found["files"][0]["score"] == 60
    assert found["files"][0]["run"] == {"model": "m", "max_tiles": 18, "frames": None, "decoding": None}
    assert found["files"][0]["asked_as_published"] == 10
    assert found["files"][0]["prompt"].startswith("<image>\nWhat? Answer")
    assert found["published"]["max_tiles"] == 18
    assert found["post_processing"] == "lower case, white space collapsed"
    assert len(found["data"]["fingerprint"]) == 16


def test_the_same_file_gives_the_same_bytes(file, tmp_path):
    path = file("p.jsonl", ["blue", "red", "dark bleu"] * 9)
    written = []
    for n in range(2):
        out = tmp_path / f"{n}.json"
        main([path, "--task", "docvqa", "--out", str(out)])
        written.append(out.read_bytes())
    assert written[0] == written[1]
    main([path, "--task", "docvqa", "--out", str(out), "--seed", "1"])
    assert out.read_bytes() != written[0]


def test_the_fingerprint_is_of_the_questions_not_of_the_answers(file, tmp_path):
    prints = []
    for said in (["blue", "red"], ["red", "red"], ["red", "red", "red"]):
        main([file("p.jsonl", said), "--task", "docvqa"])
        prints.append(json.loads((tmp_path / "p.scores.json").read_text())["data"]["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_files_are_compared(file, tmp_path, capsys):
    a, b = file("a.jsonl", ["red"] * 30 + ["blue"] * 20), file("b.jsonl", ["blue"] * 50)
    assert main([a, b, "--task", "docvqa"]) == 0
    out = capsys.readouterr().out
    assert "b.jsonl less a.jsonl: +60.00" in out
    (gap,) = json.loads((tmp_path / "a.scores.json").read_text())["comparison"]
    assert gap["value"] == 60 and gap["p"] < 0.01 and gap["mcnemar"] < 1e-6


def test_prompts_worded_otherwise_are_counted(file, tmp_path, capsys):
    main([file("p.jsonl", ["x"]), "--task", "vizwiz", "--mode", "strict"])
    assert "note: 1 prompts of p.jsonl are not worded as published" in capsys.readouterr().out


def test_modes_differ(file, capsys):
    path = file("p.jsonl", ["dark blue" + " " * 9])
    main([path, "--task", "docvqa"])
    main([path, "--task", "gqa"])
    main([path, "--task", "gqa", "--mode", "strict"])
    out = capsys.readouterr().out
    assert "GQA testdev balanced · compat" in out and "GQA testdev balanced · strict" in out
    assert "0.00  [0.00, 0.00]" in out and "100.00  [100.00, 100.00]" in out


def test_mistakes_are_explained(file):
    path = file("p.jsonl", ["blue"])
    with pytest.raises(UserError, match=r"--task nope: no such benchmark; expected one of vqav2, okvqa"):
        main([path, "--task", "nope"])
    with pytest.raises(UserError, match=r"--html: expected one file of answers, found 2"):
        main([path, path, "--task", "docvqa", "--html", "x.html"])
    with pytest.raises(UserError, match=r"--field: expected OURS=THEIRS, found 'response'"):
        main([path, "--task", "docvqa", "--field", "response"])


def test_another_tools_file_with_the_ground_truth_beside_it(tmp_path):
    said = tmp_path / "docvqa_val.json"
    said.write_text(json.dumps([{"questionId": 1, "answer": "Blue"}, {"questionId": 2, "answer": "red"}]))
    truth = tmp_path / "rows.jsonl"
    truth.write_text("".join(json.dumps({"id": str(n), "query": "q", "answers": ["blue"]}) + "\n" for n in (1, 2)))
    fields = ["--field", "id=questionId", "--field", "response=answer"]
    assert main([str(said), "--task", "docvqa", "--rows", str(truth), *fields]) == 0
    assert json.loads((tmp_path / "docvqa_val.scores.json").read_text())["files"][0]["score"] == 50


@pytest.mark.parametrize("name", TASKS)
def test_every_task_names_a_rule_and_its_files(name):
    from ivl.eval.rules import RULES

    task = TASKS[name]
    assert task.rule in RULES
    assert task.files and task.source and task.title
    assert "{question}" in task.prompt or task.rule == "captions"


def test_a_runs_folder_stands_for_its_answers(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no predictions.jsonl"):
        run_command("score", [str(tmp_path)])
    line = {"id": "1", "response": "yes", "reference": "yes"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    assert run_command("score", [str(tmp_path)]) == 0
    assert (tmp_path / "predictions.scores.json").is_file()
