"""Names that llama.cpp's gguf package gives to tensors, run in its environment: `gguf_side.py TASK.json OUT.json`.

TASK: {"architecture", "blocks", "names"}; OUT: the GGUF name of each, null where it has none.
"""

import json
import sys

import gguf

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[task["architecture"]], task["blocks"])
found = [names.get_name(name, try_suffixes=(".weight", ".bias")) for name in task["names"]]
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(found, file)
