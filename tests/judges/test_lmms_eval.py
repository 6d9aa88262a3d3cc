"""lmms-eval's registry and requests drive a model of this program: five rows, answered as `Chat` answers them."""

import pytest

from ivl import Chat, InternVL, Processor
from ivl.chat import Settings
from tests.judges.conversations import pictures
from tests.judges.make_env import REPO
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer
from tests.tiny import write_checkpoint


@pytest.mark.judge
def test_five_rows(tmp_path):
    folder, images = write_checkpoint(tmp_path / "tiny"), pictures(tmp_path / "pictures")[:5]
    task = {"folder": str(folder), "images": images, "question": "What is it?"}
    theirs = answer("lmms-eval", task, tmp_path, PYTHONPATH=str(REPO))
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder)
    ours = [
        Chat(model, processor, settings=Settings(max_new_tokens=5)).ask("<image>\nWhat is it?", [path]).split("\n\n")[0]
        for path in images
    ]
    different = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    compared = "answers asked by its registry and requests, `ivl.harness.lmms_eval`"
    versions = versions_in("lmms-eval", "lmms-eval")
    record("lmms_eval", [Result("lmms-eval", compared, len(images), len(different), {}, versions)])
    assert not different, different
