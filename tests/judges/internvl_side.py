"""Prompts, ids and labels by OpenGVLab's code, in its environment: `internvl_side.py TASK.json OUT.json`.

TASK: {"checkout", "folder", "template", "system", "tokens", "chats": [{"question", "history", "tiles"}], "batch":
[{"question", "tiles"}], "rows": [{"conversations", "tiles"}]}; OUT: {"chats": [{"prompt", "ids"}], "batch": the same,
"rows": [{"ids", "labels", "mismatch"}]}. `chat` and `batch_chat` run up to their call of `generate`; the label
functions as its data set calls them. `tokens`: image tokens for a tile.
"""

import contextlib
import importlib
import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

with open(sys.argv[1], encoding="utf-8") as opened:
    task = json.load(opened)
sys.path.insert(0, task["checkout"])

from internvl.model.internvl_chat.modeling_internvl_chat import InternVLChatModel
from internvl.train import dataset
from transformers import AutoTokenizer

LABELS = {
    "Hermes-2": dataset.preprocess_mpt,
    "internlm2-chat": dataset.preprocess_internlm,
    "phi3-chat": dataset.preprocess_phi3,
    "internvl2_5": dataset.preprocess_internvl2_5,
}


class Noting:
    """Tokenizer that keeps the texts and ids of its last call."""

    def __init__(self, tokenizer: Any) -> None:
        vars(self).update(tokenizer=tokenizer, texts=None, ids=None)

    def __call__(self, texts: Any, **options: Any) -> Any:
        made = self.tokenizer(texts, **options)
        rows = zip(made["input_ids"], made["attention_mask"], strict=True)
        vars(self).update(texts=texts, ids=[row[mask == 1].tolist() for row, mask in rows])
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.tokenizer, name, value)


def load_tokenizer(training: bool) -> Any:
    """The class that the folder names, as the trainer and the release's README load it."""
    with open(f"{task['folder']}/tokenizer_config.json", encoding="utf-8") as opened:
        own = json.load(opened)["tokenizer_class"] == "InternLM2Tokenizer"
    options = {"add_eos_token": False} if training else {}
    if own:
        module = importlib.import_module("internvl.model.internlm2.tokenization_internlm2")
        return module.InternLM2Tokenizer.from_pretrained(task["folder"], **options)
    return AutoTokenizer.from_pretrained(task["folder"], use_fast=False, **options)


def pixels(tiles: int) -> Any:
    return torch.zeros(tiles, 1) if tiles else None


def asked() -> dict[str, list]:
    model = SimpleNamespace(
        template=task["template"], num_image_token=task["tokens"], language_model=SimpleNamespace(device="cpu"),
        generate=lambda **options: torch.zeros(len(options["input_ids"]), 1, dtype=torch.long),
    )  # fmt: skip
    tokenizer, chats, batch = Noting(load_tokenizer(training=False)), [], task["batch"]
    model.system_message = task["system"] or dataset.get_conv_template(task["template"]).system_message
    for chat in task["chats"]:
        InternVLChatModel.chat(
            model, tokenizer, pixels(sum(chat["tiles"])), chat["question"], {}, history=chat["history"],
            num_patches_list=chat["tiles"], return_history=True,
        )  # fmt: skip
        chats.append({"prompt": tokenizer.texts, "ids": tokenizer.ids[0]})
    counts = [question["tiles"] for question in batch]
    InternVLChatModel.batch_chat(
        model, tokenizer, pixels(sum(counts)), [question["question"] for question in batch], {}, num_patches_list=counts
    )
    made = zip(tokenizer.texts, tokenizer.ids, strict=True)
    return {"chats": chats, "batch": [{"prompt": text, "ids": ids} for text, ids in made]}


def labelled() -> list[dict]:
    tokenizer, rows = load_tokenizer(training=True), []
    tokenizer.model_max_length = 8192
    for row in task["rows"]:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            made = LABELS[task["template"]](
                task["template"], [row["conversations"]], tokenizer, [task["tokens"] * n for n in row["tiles"]],
                text_only=not row["tiles"], group_by_length=True, num_image=len(row["tiles"]),
            )  # fmt: skip
        ids, labels = made["input_ids"][0].tolist(), made["labels"][0].tolist()
        rows.append({"ids": ids, "labels": labels, "mismatch": "mismatch" in said.getvalue()})
    return rows


with open(sys.argv[2], "w", encoding="utf-8") as opened:
    json.dump(asked() | {"rows": labelled()}, opened)
