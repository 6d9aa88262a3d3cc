"""Answers through lmms-eval's registry and requests, in its environment: `lmms_eval_side.py TASK.json OUT.json`.

TASK: {"folder", "images", "question"}; OUT: an answer for each image.
"""

import importlib
import json
import sys

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2
from PIL import Image

from ivl.harness.lmms_eval import MANIFEST

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
registry = ModelRegistryV2()
registry.register_manifest(MANIFEST)
module, _, name = registry.get_manifest("ivl").simple_class_path.rpartition(".")
model = getattr(importlib.import_module(module), name)(task["folder"], device="cpu")
model.task_dict = {"local": {"test": [[Image.open(path)] for path in task["images"]]}}
wanted = {"max_new_tokens": 5, "until": ["\n\n"], "do_sample": False}
requests = [
    Instance(
        request_type="generate_until",
        arguments=(task["question"], dict(wanted), lambda row: row, n, "local", "test"),
        idx=0,
        metadata={"task": "local", "doc_id": n, "repeats": 1},
    )
    for n in range(len(task["images"]))
]
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(model.generate_until(requests), file)
