"""Answers that are learnt from: by `data.learn`, by what a row says, and for pairs."""

import json

import pytest

from ivl.data.index.index_build import build_index
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.types import IGNORE, UserError
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def row(*marks):
    """Dialogue of an answer for each mark: True or False as its `loss`, None for none."""
    messages = []
    for n, mark in enumerate(marks):
        answer = {"role": "assistant", "content": f"answer {n}"} | ({} if mark is None else {"loss": mark})
        messages += [{"role": "user", "content": f"question {n}"}, answer]
    return {"messages": messages}


def learnt(processor, row):
    example = processor(row)
    text = processor.tokenizer.decode(example.labels[example.labels != IGNORE])
    assert processor.lengths(row).supervised == example.num_supervised
    return [int(part.split()[-1]) for part in text.split("<|im_end|>") if part]


@pytest.mark.parametrize(
    ("learn", "marks", "expected"),
    [
        ("all", (None, None, None), [0, 1, 2]),
        ("all", (None, False, None), [0, 2]),
        ("last_answer", (None, None, None), [2]),
        ("last_answer", (True, None, None), [0, 2]),
        ("last_answer", (None, None, True), [2]),
        ("marked", (None, True, False), [1]),
        ("marked", (True, None, True), [0, 2]),
    ],
)
def test_the_answers_that_carry_loss(model, learn, marks, expected):
    assert learnt(Processor.from_pretrained(model, learn=learn), row(*marks)) == expected


def test_history_of_query_is_learnt_from_as_turns_are(model):
    history = {"query": "q", "response": "answer 1", "history": [["p", "answer 0"]]}
    for learn, expected in (("all", [0, 1]), ("last_answer", [1])):
        assert learnt(Processor.from_pretrained(model, learn=learn), history) == expected


@pytest.mark.parametrize(
    ("learn", "marks", "reason"),
    [
        ("last_answer", (None, False), "its turns say that none is learnt from"),
        ("marked", (None, None), "data.learn is marked, and no turn says that it is learnt from"),
        ("all", (False,), "its turns say that none is learnt from"),
    ],
)
def test_a_row_of_which_nothing_is_learnt_is_a_problem(model, learn, marks, reason):
    processor = Processor.from_pretrained(model, learn=learn)
    with pytest.raises(UserError, match=f"no token is left to train on: {reason}"):
        processor(row(*marks))


def test_a_prompt_is_the_same_for_every_choice(model):
    prompt = row(None, None)
    del prompt["messages"][-1]
    ids = [Processor.from_pretrained(model, learn=learn)(prompt).input_ids.tolist() for learn in ("all", "marked")]
    assert ids[0] == ids[1]


def test_the_cached_index_belongs_to_the_choice(model, tmp_path):

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row(None, None)) + "\n")
    counts = []
    for learn in ("all", "last_answer", "all"):
        rows = RowDataset(path, Processor.from_pretrained(model, learn=learn))
        counts.append(int(build_index(rows, cache_dir=tmp_path / "cache").supervised[0]))
    assert counts[0] == counts[2] > counts[1] > 0


def test_pairs_are_compared_by_their_last_answers_whatever_is_learnt(model):
    pair = row(None, None) | {"rejected_response": "worse"}
    examples = []
    for learn in ("all", "last_answer"):
        processor = Processor.from_pretrained(model, learn=learn)
        processor.pairs = True
        examples.append(processor(pair))
    assert examples[0].labels.tolist() == examples[1].labels.tolist()
    processor = Processor.from_pretrained(model)
    processor.pairs = True
    with pytest.raises(UserError, match="the last answer says that it is not learnt from"):
        processor(row(None, False) | {"rejected_response": "worse"})


def test_an_unknown_choice_is_refused(model):
    with pytest.raises(UserError, match="learn: expected one of all, last_answer, marked, found 'some'"):
        Processor.from_pretrained(model, learn="some")
