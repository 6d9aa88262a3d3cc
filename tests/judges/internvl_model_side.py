"""Logits of OpenGVLab's own class, in the environment of internvl: `internvl_model_side.py TASK.json OUT.json`.

TASK: {"checkout", "folder", "dtypes", "work", "rows": ids of each, "context": id of an image token}. Pictures are read
from work/tiles{n}.npy, where row n has some, and logits are written to work/logits{n}-{dtype}.npy as float32.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

with open(sys.argv[1], encoding="utf-8") as opened:
    task = json.load(opened)
sys.path.insert(0, task["checkout"])

from internvl.model.internvl_chat.modeling_internvl_chat import InternVLChatModel

work = Path(task["work"])
with torch.no_grad():
    for name in task["dtypes"]:
        dtype = getattr(torch, name)
        model = InternVLChatModel.from_pretrained(task["folder"], torch_dtype=dtype).eval()
        model.img_context_token_id = task["context"]
        for n, row in enumerate(task["rows"]):
            ids, pixels = torch.tensor([row]), work / f"tiles{n}.npy"
            if pixels.is_file():
                tiles = torch.from_numpy(np.load(pixels)).to(dtype)
                flags = torch.ones(len(tiles), 1, dtype=torch.long)
                out = model(tiles, input_ids=ids, attention_mask=torch.ones_like(ids), image_flags=flags)
            else:
                out = model.language_model(input_ids=ids, attention_mask=torch.ones_like(ids))
            np.save(work / f"logits{n}-{name}.npy", out.logits.float().numpy())
with open(sys.argv[2], "w", encoding="utf-8") as opened:
    json.dump(len(task["rows"]), opened)
