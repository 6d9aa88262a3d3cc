"""Rows of public reports that were once read wrongly, and the right values. Their files lie outside the repository."""

import json

import pytest

from ivl.data.processor import Processor
from ivl.data.sets.meta_file import read_meta
from ivl.types import IGNORE, UserError


@pytest.fixture(scope="module")
def case(golden, shared):
    if not (shared / "cases/data").is_dir():
        pytest.skip(f"{shared}/cases/data is missing: rows of public reports")
    folder = shared / "cases/data"
    processor = Processor.from_pretrained(golden / "checkpoints/internvl2_1b")

    def read(name):
        """Of each row of a file: its example, or its problem."""
        made = []
        for line in (folder / name).read_text().splitlines():
            try:
                made.append(processor(json.loads(line), root=folder))
            except UserError as error:
                made.append(str(error))
        return made

    read.folder, read.processor = folder, processor
    return read


def learnt(case, example):
    return case.processor.tokenizer.decode([token for token in example.labels.tolist() if token != IGNORE])


def test_a_path_between_img_tags(case):
    for example in case("01_img_path_in_conversations.jsonl"):
        assert [medium.kind for medium in example.conversation.media] == ["image"] and len(example.tiles)
    (row, _) = (case.folder / "01_img_path_in_conversations.jsonl").read_text().splitlines()
    with pytest.raises(UserError, match=r"gone\.jpg: no such file"):
        case.processor(json.loads(row.replace("plain.jpg", "gone.jpg")), root=case.folder)


def test_a_box_belongs_to_its_image(case):
    (example,) = case("02_image_id.jsonl")
    assert "[[156, 83, 469, 917]]" in learnt(case, example)


def test_objects_of_ms_swift_3(case):
    first, second, third = (learnt(case, example) for example in case("03_swift3_objects.jsonl"))
    assert first.startswith("<ref>a</ref><box> [[31, 83, 94, 167]] </box> and <ref>b</ref><box> [[156, 250, 219, 333]]")
    assert second.startswith("<box> [[100, 200, 300, 400]] </box>")
    assert third.startswith("click(<box> [[191, 92]] </box>)")


def test_keys_that_say_what_is_learnt(case):
    *turns, thought, tools, sound, frames = case("05_unread_keys.jsonl")
    assert [learnt(case, example) for example in turns] == ["6<|im_end|>"] * 3
    assert learnt(case, thought) == "<think>\ntwo and two\n</think>\n\n4<|im_end|>"
    for problem, key in ((tools, "tools"), (sound, "audios")):
        assert isinstance(problem, str) and f"{key}: " in problem
    assert not isinstance(frames, str) or "fps" not in frames  # read by now


def test_a_list_of_annotation_files(case):
    (part,) = read_meta(case.folder / "13_meta_list.json", case.processor)
    assert [len(part.rows[n].tiles) > 0 for n in range(len(part.rows))] == [True, True]
