"""Answers through VLMEvalKit's data set and inference, in its environment: `vlmevalkit_side.py TASK.json OUT.json`.

TASK: {"folder", "data", "work"}; OUT: {"rows": for each row of data/Five.tsv {"images", "question",
"prediction"}, "scores"}. `question`: as its own adapter of InternVL writes it.
"""

import json
import os
import sys
from functools import partial

with open(sys.argv[1], encoding="utf-8") as opened:
    task = json.load(opened)
os.environ["LMUData"] = task["data"]  # noqa: SIM112
os.environ["PRED_FORMAT"] = "tsv"  # a spreadsheet escapes control characters, which random weights write

from vlmeval.config import supported_VLM
from vlmeval.dataset import build_dataset
from vlmeval.inference import infer_data_job
from vlmeval.smp import get_pred_file_path, load
from vlmeval.vlm.internvl.utils import reorganize_prompt

from ivl.harness.vlmevalkit import IvlChat

supported_VLM["mine"] = partial(IvlChat, pretrained=task["folder"], device="cpu", max_new_tokens=5)
data = build_dataset("Five")
messages = [data.build_prompt(data.data.iloc[n]) for n in range(len(data))]
infer_data_job("mine", work_dir=task["work"], model_name="mine", dataset=data)
file = get_pred_file_path(task["work"], "mine", "Five", use_env_format=True)
predictions = [str(text) for text in load(file)["prediction"]]
scores = data.evaluate(file, model="exact_matching", nproc=1)
with open(sys.argv[2], "w", encoding="utf-8") as opened:
    rows = [
        {"images": images, "question": reorganize_prompt(m, len(images), "Five"), "prediction": p}
        for m, p in zip(messages, predictions, strict=True)
        if (images := [item["value"] for item in m if item["type"] == "image"])
    ]
    json.dump({"rows": rows, "scores": scores.to_dict("list")}, opened, default=str)
