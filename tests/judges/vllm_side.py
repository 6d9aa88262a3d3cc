"""Answers by vLLM, run in its environment: `python vllm_side.py TASK.json OUT.json`.

TASK: {"folder", "dtype", "trust", "adapter", "rows": [{"messages", "images"}], "max_tokens"}; OUT: for each row
{"prompt", "answer", "logprobs"}: token ids, and the logarithm of the probability of each token of the answer. An
`{"type": "image"}` of a message stands for the next image.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def with_pictures(row: dict) -> list[dict]:
    """Messages in the form of `LLM.chat`, with opened pictures."""
    images = iter(row["images"])
    return [
        message
        | {
            "content": [
                {"type": "image_pil", "image_pil": Image.open(next(images))} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in row["messages"]
    ]


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        task = json.load(file)
    adapter = task["adapter"]
    llm = LLM(
        task["folder"],
        dtype=task["dtype"],
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 2},
        trust_remote_code=task["trust"],
        enable_lora=bool(adapter),
        max_lora_rank=8,
    )
    params = SamplingParams(temperature=0, max_tokens=task["max_tokens"], logprobs=1)
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    answers = llm.chat([with_pictures(row) for row in task["rows"]], params, lora_request=request)
    out = []
    for prompt, made in ((answer.prompt_token_ids, answer.outputs[0]) for answer in answers):
        chosen = [table[token].logprob for token, table in zip(made.token_ids, made.logprobs, strict=True)]
        out.append({"prompt": list(prompt), "answer": list(made.token_ids), "logprobs": chosen})
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(out, file)


if __name__ == "__main__":
    main()
