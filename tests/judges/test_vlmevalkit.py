"""VLMEvalKit's data set and inference drive a model of this program: five rows, answered as `Chat` answers them."""

import base64
import csv
from pathlib import Path

import pytest

from ivl import Chat, InternVL, Processor
from ivl.chat import Settings
from tests.judges.conversations import pictures
from tests.judges.make_env import REPO
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer, checkout, commit_of
from tests.tiny import write_checkpoint


def write_table(file: Path, images: list[str]) -> None:
    """Five questions with options, in the form of its tables; the last has two pictures."""
    file.parent.mkdir()
    encoded = [base64.b64encode(Path(path).read_bytes()).decode() for path in images]
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened, delimiter="\t")
        table.writerow(["index", "question", "hint", "A", "B", "answer", "category", "image"])
        for n in range(5):
            shown = encoded[n] if n < 4 else str(encoded[:2])
            table.writerow([n, f"What is it? {n}", "", "a cat", "a dog", "AB"[n % 2], "animals", shown])


@pytest.mark.judge
def test_five_rows(tmp_path):
    kit = checkout("IVL_VLMEVALKIT", "open-compass/VLMEvalKit", "vlmeval")
    folder = write_checkpoint(tmp_path / "tiny")
    write_table(tmp_path / "data/Five.tsv", pictures(tmp_path / "pictures"))
    task = {"folder": str(folder), "data": str(tmp_path / "data"), "work": str(tmp_path)}
    made = answer("vlmevalkit", task, tmp_path, PYTHONPATH=f"{REPO}:{kit}")
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder)
    different = []
    for row in made["rows"]:
        ours = Chat(model, processor, settings=Settings(max_new_tokens=5)).ask(row["question"], row["images"])
        different += [] if ours == row["prediction"] else [row | {"ours": ours}]
    compared = "answers asked by its table of models, data set and inference, `ivl.harness.vlmevalkit`"
    versions = {"VLMEvalKit": commit_of(kit)} | versions_in("vlmevalkit", "transformers")
    record("vlmevalkit", [Result("VLMEvalKit", compared, len(made["rows"]), len(different), {}, versions)])
    assert len(made["rows"]) == 5 and "Overall" in made["scores"] and not different, different
