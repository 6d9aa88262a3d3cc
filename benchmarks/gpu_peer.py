"""Peer of gpu_run.py: transformers' Trainer with peft, and `generate`, both with transformers' own processor."""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from gpu import wait
from PIL import Image

LORA = {"rank": 16, "alpha": 32, "dropout": 0.05}
TARGETS = "q|k|v|o|gate|up|down"
SYSTEM, USER, ASSISTANT, END = (
    "<|im_start|>system\n<|im_end|>",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>",
)


def peak() -> float:
    """Return the largest memory of tensors on the device, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def processed(processor: Any, rows: list[dict[str, Any]], args: argparse.Namespace, answers: bool) -> dict[str, Any]:
    """Return a batch of transformers' processor; with answers, right-padded and with labels."""
    images = [[Image.open(path).convert("RGB") for path in row["images"]] for row in rows]
    prompts = [f"{SYSTEM}{USER}{row['query'].replace('<image>', '<IMG_CONTEXT>')}{END}{ASSISTANT}" for row in rows]
    texts = [f"{prompt}{row['response']}{END}" for prompt, row in zip(prompts, rows)] if answers else prompts
    batch = processor(
        text=texts, images=images if any(images) else None, padding=True, padding_side="right" if answers else "left",
        return_tensors="pt", images_kwargs={"max_patches": args.max_tiles, "crop_to_patches": True},
    )  # fmt: skip
    if answers:
        batch["labels"] = supervised(processor.tokenizer, batch["input_ids"])
    return dict(batch)


def supervised(tokenizer: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return labels: the answer and its end."""
    begin = tokenizer(ASSISTANT, add_special_tokens=False)["input_ids"]
    end, labels = tokenizer.convert_tokens_to_ids(END), torch.full_like(ids, -100)
    for n, row in enumerate(ids.tolist()):
        for start in range(len(row) - len(begin)):
            if row[start : start + len(begin)] == begin:
                first, last = start + len(begin), row.index(end, start + len(begin)) + 1
                labels[n, first:last] = ids[n, first:last]
    return labels


def train_with_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """Train with transformers' Trainer, and with peft where the recipe is LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoProcessor,
        InternVLForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    processor, cpu = AutoProcessor.from_pretrained(args.hf), args.device == "cpu"
    dtype = torch.float32 if cpu or args.recipe == "full" else torch.bfloat16
    model = InternVLForConditionalGeneration.from_pretrained(args.hf, dtype=dtype)
    if args.recipe == "lora":
        where = rf".*language_model\..*\.({TARGETS})_proj"
        settings = LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=where
        )
        model = get_peft_model(model, settings)
        if args.checkpointing:
            model.enable_input_require_grads()
    found = {"rows": 0, "tokens": 0, "positions": 0, "seconds": 0.0, "loss": 0.0}
    began = [0.0]

    class Watch(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == args.warm:
                wait(torch.device(args.device))
                began[0] = time.perf_counter()
                found.update(rows=0, tokens=0, positions=0)

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            found["loss"] = (logs or {}).get("loss", found["loss"])

        def on_train_end(self, *_: Any, **__: Any) -> None:
            wait(torch.device(args.device))
            found["seconds"] = time.perf_counter() - began[0]

    class Counting(Trainer):
        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> torch.Tensor:
            mask = inputs["attention_mask"]
            found["rows"] += len(mask)
            found["tokens"] += int(mask.sum())
            found["positions"] += mask.numel()
            return super().training_step(model, inputs, *rest)

    arguments = TrainingArguments(
        output_dir=str(args.folder / "trainer"), per_device_train_batch_size=args.batch, max_steps=args.steps,
        logging_steps=1, save_strategy="no", report_to=[], learning_rate=1e-4, bf16=not cpu, use_cpu=cpu,
        remove_unused_columns=False, dataloader_num_workers=args.workers, disable_tqdm=True,
        gradient_checkpointing=args.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    rows = [json.loads(line) for line in (args.folder / "rows.jsonl").open()]
    collate = lambda batch: processed(processor, batch, args, answers=True)  # noqa: E731
    Counting(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Watch()]).train()
    return found | {"peak": peak()}


def generate_with_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """Answer the questions by `generate`, in batches sorted by length, made by threads meanwhile."""
    from transformers import AutoProcessor, InternVLForConditionalGeneration

    processor, dtype = AutoProcessor.from_pretrained(args.hf), torch.float32 if args.device == "cpu" else torch.bfloat16
    model = InternVLForConditionalGeneration.from_pretrained(args.hf, dtype=dtype).to(args.device).eval()
    rows = [json.loads(line) for line in (args.folder / "questions.jsonl").open()]
    rows.sort(key=lambda row: (-len(row["images"]), -len(row["query"])))
    batches = [rows[n : n + args.answer_batch] for n in range(0, len(rows), args.answer_batch)]
    length = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}

    def answer(batches: list[list[dict[str, Any]]]) -> None:
        with ThreadPoolExecutor(max(1, min(4, args.workers))) as pool:
            for batch in pool.map(lambda rows: processed(processor, rows, args, answers=False), batches):
                inputs = {name: tensor.to(args.device) for name, tensor in batch.items()}
                if "pixel_values" in inputs:
                    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
                with torch.no_grad():
                    model.generate(**inputs, **length).cpu()

    answer(batches[-1:])
    began = time.perf_counter()
    answer(batches)
    return {"rows": len(rows), "tokens": 0, "seconds": time.perf_counter() - began, "peak": peak()}
