"""Every command of every page is run as it is written, one after the other in a fresh folder, with tiny models.

Names of models lead to tiny checkpoints of the same family in a hub cache of the test's own. Left out are lines for
more devices than one, whose runs `tests/lit/strategies` has, and those of packages that are not installed.
"""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import ivl
from ivl.__main__ import main
from ivl.architecture.families import find_model
from ivl.data.sets.hub_datasets import SETS
from tests.lit.rows import write_rows
from tests.test_docs import REPO, blocks, commands
from tests.tiny import FAMILIES, write_checkpoint

pytestmark = pytest.mark.slow

MODELS_NAMED = ("internvl2-2b", "internvl2-8b", "internvl2-26b", "internvl-chat-v1_5", "internvl3-8b")
PAGES = {
    "README": False,
    "docs/first_project": True,
    "docs/data": False,
    "docs/finetuning": False,
    "docs/preference": True,
    "docs/inference": True,
    "docs/evaluation": True,
    "docs/export": True,
    "docs/distributed": False,
    "docs/from_ms_swift": False,
    "docs/from_internvl": False,
    "docs/from_llama_factory": False,
}
"""Page → does it begin with a run that another page has made?"""

SEVERAL_DEVICES = re.compile(
    r"torchrun|CUDA_VISIBLE_DEVICES|--devices|--device_m|layer_split|deepspeed|trainer.devices"
)


def reason_to_leave_out(line: str) -> str | None:
    """Return why a line cannot be run here; None: it is run."""
    if SEVERAL_DEVICES.search(line) and "-m ivl plan" not in line:
        return "several devices"
    if "qlora" in line and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if "--push" in line:
        return "an account of a hub"
    if "configs/demo.yaml" in line and "fit" in line:
        return "the demo has a test of its own"
    return None


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Hub cache with a tiny checkpoint under the id of each model that the pages name."""
    folder = tmp_path_factory.mktemp("hub")
    for name in MODELS_NAMED:
        model = find_model(name)
        architecture = model.backbone.architecture
        assert architecture in FAMILIES
        storage = folder / f"models--{model.huggingface.replace('/', '--')}"
        (storage / "refs").mkdir(parents=True)
        (storage / "refs/main").write_text("0" * 40)
        write_checkpoint(storage / "snapshots" / ("0" * 40), architecture, template=model.template)
    return folder


@pytest.fixture(scope="module")
def named_set(tmp_path_factory) -> Path:
    """Cache folder in which the data set coco-en-2-mini lies as if it had been fetched."""
    cache = tmp_path_factory.mktemp("cache")
    name = "coco-en-2-mini"
    key = hashlib.blake2b(repr((ivl.__version__, SETS[name])).encode(), digest_size=6).hexdigest()
    path = write_rows(cache / "ivl/named" / f"{name}-{key}", 12, "rows.jsonl")
    captions = [line for line in path.read_text().splitlines() if json.loads(line)["source"] == "single"]
    path.write_text("\n".join(captions) + "\n")
    return cache


def write_files(folder: Path) -> None:
    """Write the files that the pages' commands name: the user's own rows, and DocVQA's official ones."""
    (folder / "configs").symlink_to(REPO / "configs")
    for name, count in {"my": 12, "held_out": 4, "train": 8, "other": 8}.items():
        write_rows(folder, count, f"{name}.jsonl")
    held_out = folder / "held_out.jsonl"
    text = held_out.read_text()
    for learnt, asked in {"What is it?": "What is this?", "How many": "So how many", "Find": "Show"}.items():
        text = text.replace(learnt, asked)
    held_out.write_text(text)
    rows = [json.loads(line) for line in (folder / "my.jsonl").read_text().splitlines()]
    (folder / "my.json").write_text(json.dumps(rows))
    questions = [{k: v for k, v in row.items() if k != "response"} for row in rows if row["source"] != "grounding"]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    pairs = [row | {"rejected_response": "a cow"} for row in rows if row["source"] != "grounding"]
    for name in ("pairs", "held_out_pairs"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "my.yaml").write_text("data: {train: my.jsonl, batch_size: 2, packing: false}\n")
    (folder / "shell/data").mkdir(parents=True)
    meta = {"mine": {"root": str(folder), "annotation": str(folder / "my.jsonl"), "repeat_time": 1, "length": 12}}
    (folder / "shell/data/internvl_1_2_finetune_custom.json").write_text(json.dumps(meta))
    docvqa = folder / "data/docvqa/val"
    (docvqa / "documents").mkdir(parents=True)
    shutil.copy(folder / "0.png", docvqa / "documents/0.png")
    asked = {"questionId": 1, "question": "What is it?", "image": "documents/0.png", "answers": ["a cat"]}
    (docvqa / "val_v1.0.json").write_text(json.dumps({"data": [asked]}))
    answer = {"id": "1", "index": 0, "response": "a cow", "answers": ["a cat"]}
    for name, field in {"ours": "response", "theirs": "response", "other_tool": "prediction"}.items():
        (folder / f"{name}.jsonl").write_text(
            json.dumps({field if k == "response" else k: v for k, v in answer.items()}) + "\n"
        )


def run(line: str, monkeypatch) -> int:
    """Run a line's command. Returns its exit status."""
    argv = shlex.split(line.split("-m ivl ", 1)[1], comments=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nexit\n"))
    monkeypatch.setattr("sys.argv", ["ivl", *argv])
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def learn_an_answer(answers: Path) -> None:
    """Make the first of each row's answers the right one: a model with random weights gives none."""
    lines = [json.loads(line) for line in answers.read_text().split("\n") if line]
    for line in lines:
        line["responses"][0] |= {"response": line["reference"], "finish_reason": "stop"}
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def first_run(hub, named_set, tmp_path_factory) -> Path:
    """Folder `runs` that README's first training leaves."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        settle(folder, hub, named_set, patch)
        fit = next(line for line in commands(REPO / "README.md") if " fit " in line and "--data.val" in line)
        assert run(fit, patch) == 0
    return folder / "runs"


def settle(folder: Path, hub: Path, cache: Path, monkeypatch) -> None:
    """Enter a fresh folder with the user's files; hubs are asked nothing."""
    write_files(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_project(folder: Path) -> None:
    """Write photographs with labels, and run the page's script that makes rows of them; write its config."""
    page = REPO / "docs/first_project.md"
    (folder / "photos").mkdir()
    for n in range(20):
        Image.effect_noise((64 + n, 48), 60).convert("RGB").save(folder / f"photos/{n + 1:04}.jpg")
    (folder / "labels.csv").write_text("".join(f"{n + 1:04}.jpg,{('red', 'blue')[n % 2]}\n" for n in range(20)))
    exec(compile(blocks(page, "python")[0], str(page), "exec"), {})
    (folder / "project.yaml").write_text(blocks(page, "yaml")[0].replace("max_epochs: 20", "max_epochs: 1"))


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run_one_after_the_other(page, hub, named_set, first_run, tmp_path, monkeypatch, capsys):
    settle(tmp_path, hub, named_set, monkeypatch)
    if PAGES[page]:
        shutil.copytree(first_run, "runs")
    if page == "docs/first_project":
        write_project(tmp_path)
    failed = []
    for line in commands(REPO / f"{page}.md"):
        if reason_to_leave_out(line) is not None:
            continue
        status = run(line, monkeypatch)
        printed = "".join(capsys.readouterr())
        if "--predictions.file several.jsonl" in line:
            learn_an_answer(Path("several.jsonl"))
        if status != 0:
            failed.append(f"{line.strip()}\n  exit status {status}: {os.linesep.join(printed.splitlines()[-3:])}")
    assert not failed, "\n".join(failed)
    if page == "docs/first_project":
        exec(compile(blocks(REPO / f"{page}.md", "python")[1], page, "exec"), {})
        assert capsys.readouterr().out.endswith("\n")
