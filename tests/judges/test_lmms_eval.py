"""lmms-eval's registry and requests drive a model of this program: five rows, answered as `Chat` answers them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from ivl import Chat, InternVL, Processor
from ivl.chat import Settings
from tests.judges.conversations import pictures
from tests.judges.make_env import REPO, python_of
from tests.judges.results import Result, record, versions_in
from tests.tiny import write_checkpoint

SIDE = Path(__file__).with_name("lmms_eval_side.py")


@pytest.mark.judge
def test_five_rows(tmp_path):
    if not python_of("lmms-eval").is_file():
        pytest.skip("lmms-eval is not installed: python tests/judges/make_env.py lmms-eval")
    folder, images = write_checkpoint(tmp_path / "tiny"), pictures(tmp_path / "pictures")[:5]
    task, out = tmp_path / "task.json", tmp_path / "out.json"
    task.write_text(json.dumps({"folder": str(folder), "images": images, "question": "What is it?"}))
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([python_of("lmms-eval"), SIDE, task, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder)
    ours = [
        Chat(model, processor, settings=Settings(max_new_tokens=5)).ask("<image>\nWhat is it?", [path]).split("\n\n")[0]
        for path in images
    ]
    different = [pair for pair in zip(ours, json.loads(out.read_text()), strict=True) if pair[0] != pair[1]]
    compared = "answers asked by its registry and requests, `ivl.harness.lmms_eval`"
    versions = versions_in("lmms-eval", "lmms-eval")
    record("lmms_eval", [Result("lmms-eval", compared, len(images), len(different), {}, versions)])
    assert not different, different
