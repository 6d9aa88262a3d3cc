"""A run with thoughts on a tiny InternVL3.5, as a new user starts it: fit by a config's name, predict, export, chat."""

import json

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its first import: not one test's own)
import pytest
import yaml
from PIL import Image

from ivl.__main__ import main
from ivl.commands.chat import chat
from ivl.data.processor import Processor
from ivl.options import ChatSessionOptions
from ivl.reasoning import BEGUN, split_reasoning
from ivl.system_text import R1
from tests.tiny import write_checkpoint

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0")
THOUGHT = {"reasoning_content": "Three chairs.\nOne table."}
ROWS = [
    {"query": "<image><image>How many?", "response": "Four.", "images": ["a.png", "b.png"], **THOUGHT},
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", **THOUGHT}]},
    {"query": "Again?", "response": "<think>\nAs before.\n</think>\n\nFour.", "history": [["Hi", "Hello."]]},
    {"query": "No thought?", "response": "None.", "system": False},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinking")
    write_checkpoint(folder / "InternVL3_5-8B", "Qwen3ForCausalLM")
    for name, size in (("a", (200, 60)), ("b", (60, 200))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(fit(folder)) == 0
    return folder


def fit(folder, *more: str) -> list[str]:
    words = ["fit", "--config", "internvl3_5-8b.yaml", "--model.pretrained", str(folder / "InternVL3_5-8B")]
    words += ["--data.train", str(folder / "rows.jsonl"), "--data.val", str(folder / "rows.jsonl"), *QUIET]
    words += ["--data.system_message", "r1", "--data.thinking", "true", "--model.generation.max_new_tokens", "5"]
    words += ["--trainer.max_steps", "2", "--trainer.accumulate_grad_batches", "1", "--trainer.precision", "32-true"]
    words += ["--trainer.num_sanity_val_steps", "0", "--trainer.logger.init_args.save_dir", str(folder / "runs")]
    return [*words, *more]


def test_the_config_shares_tiles_and_thoughts_are_learnt(run):
    settings = yaml.safe_load((run / "runs/version_0/config.yaml").read_text())
    assert settings["data"]["share_tiles"] is True and settings["data"]["system_message"] == "r1"
    names = ("share_tiles", "system_message", "thinking", "max_tiles")
    options = {name: settings["data"][name] for name in names}
    processor = Processor.from_pretrained(run / "InternVL3_5-8B", **options)
    assert processor.share_tiles and processor.max_tiles == 12
    shared, whole = (
        Processor.from_pretrained(run / "InternVL3_5-8B", share_tiles=share, max_tiles=4)(ROWS[0], root=run)
        for share in (True, False)
    )
    assert sum(shared.tiles_per_image) < sum(whole.tiles_per_image)
    learnt = [label for label in processor(ROWS[0], root=run).labels.tolist() if label != -100]
    assert processor.tokenizer.decode(learnt) == "<think>\nThree chairs.\nOne table.\n</think>\n\nFour.<|im_end|>"
    assert processor.tokenizer.token_id("<think>") in learnt
    assert "system" not in processor.prompt_text(processor.parse(ROWS[3]))


def test_predict_keeps_thoughts_apart(run):
    out = run / "answers.jsonl"
    words = ["--ckpt_path", str(run / "runs/version_0/checkpoints/last.ckpt"), "--predictions.file", str(out), *QUIET]
    assert main(["predict", *words, "--data.predict", str(run / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(ROWS)
    for row in rows:
        assert row["prompt"].endswith("<|im_start|>assistant\n" + BEGUN)
        assert row["reasoning"] is not None and "<think>" not in row["response"]
        assert row["finish_reason"] != "length" or "</think>" in row["response"] or not row["response"]
    assert R1 in rows[0]["prompt"] and "system" not in rows[3]["prompt"]
    assert [row["reference"] for row in rows] == ["Four.", "So.", ROWS[2]["response"], "None."]


def test_export_and_chat_ask_as_the_run_did(run):
    assert main(["export", "--run", str(run / "runs/version_0"), "--out", str(run / "merged")]) == 0
    session = chat(ChatSessionOptions(ckpt_path=str(run / "runs/version_0")))
    exported = Processor.from_pretrained(run / "merged")
    for processor in (exported, session.chat.processor):
        text = processor.prompt_text(processor.parse({"query": "How many?"}))
        assert R1 in text and text.endswith(BEGUN)
    jinja = (run / "merged/chat_template.jinja").read_text()
    assert json.dumps(R1)[1:40] in jinja
    session.chat.settings = type(session.chat.settings)(max_new_tokens=3)
    answer = session.chat.ask("How many?")
    assert not answer or split_reasoning(answer) == (session.chat.reasoning, session.chat.response)
