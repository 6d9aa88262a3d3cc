"""Prompts and pictures as lmdeploy makes them, in its environment: `lmdeploy_side.py TASK.json OUT.json`.

TASK: {"folders": [...], "trust", "pixels", "rows": [{"messages", "images"}]}; OUT: for each folder and row {"prompt",
"ids", "tiles"}. An `{"type": "image"}` of a message stands for the next image. `pixels`: folder for {number}-{row}.npy.
"""

import json
import sys

import numpy as np
import torch
from lmdeploy.archs import get_model_arch
from lmdeploy.model import get_chat_template
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.vl.constants import Modality
from lmdeploy.vl.model.base import VISION_MODELS
from lmdeploy.vl.model.builder import VISION_MODELS as ALL_MODELS
from PIL import Image

assert ALL_MODELS is VISION_MODELS


def with_pictures(row: dict) -> list[dict]:
    """Messages as the server's parser hands them on: pictures opened, texts alone as plain texts."""
    images = iter(row["images"])
    messages = []
    for message in row["messages"]:
        parts = [
            {"type": Modality.IMAGE, "data": Image.open(next(images)).convert("RGB")}
            if part["type"] == "image"
            else part
            for part in message["content"]
        ]
        text = all(part["type"] == "text" for part in parts)
        messages.append(message | {"content": "".join(part["text"] for part in parts) if text else parts})
    return messages


def answers(folder: str, rows: list[dict], trust: bool, pixels: str) -> list[dict]:
    arch, config = get_model_arch(folder, trust_remote_code=trust)
    kind = next(m for m in VISION_MODELS.module_dict.values() if arch == m._arch or arch in (m._arch or []))
    model = kind(folder, hf_config=config, backend="pytorch", trust_remote_code=trust)
    model.build_preprocessor(trust_remote_code=trust)
    model.set_mm_feature_dtype(torch.float32)
    template = get_chat_template(folder, trust_remote_code=trust)
    tokenizer = Tokenizer(folder, trust_remote_code=trust)
    out = []
    for n, row in enumerate(rows):
        messages = with_pictures(row)
        if row["images"]:
            made = model.to_pytorch(model.preprocess(messages), template, tokenizer)
            tiles = [image["pixel_values"].float().numpy() for image in made["multimodal"]]
            np.save(f"{pixels}-{n}.npy", np.concatenate(tiles))
        else:
            prompt = template.messages2prompt(messages)
            made, tiles = {"prompt": prompt, "input_ids": tokenizer.encode(prompt, add_bos=True)}, []
        out.append({"prompt": made["prompt"], "ids": made["input_ids"], "tiles": [len(image) for image in tiles]})
    return out


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        task = json.load(file)
    out = [
        answers(folder, task["rows"], task["trust"], f"{task['pixels']}/{n}")
        for n, folder in enumerate(task["folders"])
    ]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(out, file)


if __name__ == "__main__":
    main()
