"""Ids and labels of ms-swift's templates against ours: 1,000 random conversations for each.

Where ms-swift writes something else on purpose, the row or the template is changed to write the same, and the rest has
to be equal; docs/from_ms_swift.md names each such difference.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ivl.data.processor import Processor
from ivl.data.text.template import SYSTEM_2_5, Template, find_template
from ivl.data.text.tokenizer import Tokenizer
from ivl.types import IGNORE
from tests.judges.conversations import conversations, pictures
from tests.judges.results import Result, record, versions_in
from tests.judges.side import answer, interpreter

CHECKOUT = Path(os.environ.get("IVL_INTERNVL", "/"))
"""A checkout of OpenGVLab/InternVL: its class reads InternLM2's tokenizer"""
INTERNLM2 = CHECKOUT / "internvl_chat/internvl/model/internlm2/tokenization_internlm2.py"
CASES = {
    "internvl": ("internvl_chat_v1_5", "internlm2-chat", True),
    "internvl_phi3": ("internvl2_4b", "phi3-chat", True),
    "internvl2 (Qwen2)": ("internvl2_1b", "Hermes-2", False),
    "internvl2 (InternLM2)": ("internvl2_2b", "internlm2-chat", False),
    "internvl2_phi3": ("internvl2_4b", "phi3-chat", False),
    "internvl2_5": ("internvl3_8b", "internvl2_5", False),
    "internvl2_5 (InternLM2)": ("internvl2_2b", "internvl2_5", False),
    "internvl3_5": ("internvl3_5_4b", "internvl2_5", False),
}
"""Template there → recorded checkpoint, template here, images in the first question alone"""
SYSTEMS = {
    "internvl": "You are an AI assistant whose name is InternLM (书生·浦语).",
    "internvl_phi3": "You are an AI assistant whose name is Phi-3.",
    "internvl2_5 (InternLM2)": SYSTEM_2_5,
    "internvl3_5": "none",
}
"""System texts that are not those of the recorded checkpoint"""
ROWS = 1000


def encode_there(folder: Path, template: str, rows: list[dict[str, Any]], tmp_path: Path) -> list[dict[str, Any]]:
    own = "InternLM2" in (folder / "tokenizer_config.json").read_text()
    if own and not INTERNLM2.is_file():
        pytest.skip("IVL_INTERNVL names no checkout of OpenGVLab/InternVL: its class reads this tokenizer")
    task = {"folder": str(folder), "template": template, "tokenizer": str(INTERNLM2) if own else None, "rows": rows}
    return answer("ms-swift", task, tmp_path, INPUT_SIZE="56", MAX_NUM="6", PYTHONPATH="")


def as_written_there(row: dict[str, Any]) -> dict[str, Any]:
    """A row that makes this program write the same: a line break after each image, whatever follows it."""
    messages = [
        message | {"content": message["content"].replace("<image>", "<image>\n")} for message in row["messages"]
    ]
    return row | {"messages": messages}


class Encoded(NamedTuple):
    """Ids and labels of a row"""

    ids: list[int]
    labels: list[int]


def differences(
    row: dict[str, Any], template: Template, ours: Encoded, theirs: Encoded, tokenizer: Tokenizer, first_line: bool
) -> list[str | None]:
    """Names of the known differences of a row; None in it: there is one that is not known.

    `ours`: with the line breaks that ms-swift writes, see `as_written_there`.
    """
    known: list[str | None] = []
    if first_line and len(row.get("images", ())) > 1:
        return ["several images"]
    if not template.gap:
        known.append("line break after an end")
    if row.get("images"):
        known.append("line break after an image")
    ends = {tokenizer.token_id(template.end)}
    newline = tokenizer.encode("\n")[-1]
    trained = [
        IGNORE if i == newline and theirs.ids[n - 1] in ends else label
        for n, (i, label) in enumerate(zip(theirs.ids, theirs.labels))
    ]
    if trained != theirs.labels:
        known.append("trained line break")
    if not tokenizer.decode([ours.ids[1]]).strip() and ours.ids[1] != theirs.ids[1]:
        known.append("blank of sentencepiece")
        del ours.ids[1], ours.labels[1]
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    labels = [
        IGNORE if i in ends and ours.labels[n - 1] == IGNORE else label
        for n, (i, label) in enumerate(zip(ours.ids, ours.labels))
    ]
    if labels != ours.labels or (not template.every_turn and "" in answers):
        known.append("empty answer")
    if template.strip and any(message["content"].strip() != message["content"] for message in row["messages"]):
        known.append("outer blanks")
    if (ours.ids, labels) != (theirs.ids, trained):
        leading = any("\n" in text[: len(text) - len(text.lstrip())] for text in answers)
        texts = [tokenizer.decode(encoded.ids) for encoded in (ours, theirs)]
        words = [re.sub(r"<\|assistant\|>\s*", "<|assistant|>", text) for text in texts]
        if template.name == "phi3-chat" and words[0] == words[1]:
            known.append("answer with a blank of sentencepiece")
        else:
            known.append("line break before an answer" if leading and texts[0] == texts[1] else None)
    return known


@pytest.mark.judge
@pytest.mark.parametrize("name", CASES)
def test_ids_and_labels(name, golden, tmp_path):
    interpreter("ms-swift")
    checkpoint, here, first_line = CASES[name]
    folder = golden / "checkpoints" / checkpoint
    rows = conversations(ROWS, pictures(tmp_path / "pictures"), one_turn=first_line)
    theirs = encode_there(folder, name.split()[0], rows, tmp_path)
    processor = Processor.from_pretrained(folder, max_tiles=6, system_message=SYSTEMS.get(name))
    own = find_template(here)
    processor.template = replace(own, gap="\n", strip=False, every_turn=True)
    explained, different = Counter[str](), []
    for n, (row, other) in enumerate(zip(rows, theirs, strict=True)):
        example = processor(as_written_there(row), str(n))
        here_row = Encoded(example.input_ids.tolist(), example.labels.tolist())
        known = differences(row, own, here_row, Encoded(other["ids"], other["labels"]), processor.tokenizer, first_line)
        explained.update(name for name in known if name)
        if None in known:
            different.append((n, row, here_row.ids, other["ids"]))
    versions = versions_in("ms-swift", "ms-swift", "transformers")
    compared = f"`Template.encode`: ids and labels, template {name}"
    result = Result("ms-swift", compared, ROWS, len(different), dict(explained), versions)
    record("ms_swift_" + re.sub(r"\W+", "_", name).strip("_"), [result])
    assert not different, different[0]
