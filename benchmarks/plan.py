"""Peak memory of real training steps on a CPU, beside what `ivl.estimate.memory` predicts.

    python benchmarks/plan.py [NAME ...]      prints a Markdown table

Each case runs in a process of its own: random weights, three steps in Lightning's order (forward, gradients freed,
backward, optimizer). Measured is the largest resident set minus that before the model was built, with all blocks of
16 KiB and more mapped by themselves, so that freed memory goes back at once (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ivl.architecture.config import Config
from ivl.demo.model import config as demo_config
from ivl.estimate.memory import memory_needed
from ivl.estimate.training_step import BatchShape, ShallowModel, TrainSetup
from ivl.finetune import tune as tuning
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune

FULL, LOW = Tune("full", "full", "full"), Tune(language_model=LoRA(rank=16, dropout=0.05))
STEPS = 3


def config(vision: tuple[int, int, int], llm: tuple[int, int, int], size: int = 224, vocabulary: int = 20000) -> dict:
    """(width, blocks, heads) of the tower and of a Qwen2; both four times as wide inside."""
    width, blocks, heads = vision
    llm_width, llm_blocks, llm_heads = llm
    return {
        "architectures": ["InternVLChatModel"],
        "template": "Hermes-2",
        "force_image_size": size,
        "downsample_ratio": 0.5,
        "vision_config": {
            "hidden_size": width,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "image_size": size,
            "patch_size": 14,
        },
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": llm_width,
            "num_hidden_layers": llm_blocks,
            "num_attention_heads": llm_heads,
            "num_key_value_heads": llm_heads // 4,
            "intermediate_size": 4 * llm_width,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
    }


@dataclass(frozen=True)
class Case:
    raw: dict[str, Any]
    setup: TrainSetup
    micro: BatchShape


def _case(raw: dict, tune: Tune, micro: BatchShape, checkpointing: bool = False) -> Case:
    recomputed = {"vision_checkpointing": checkpointing, "language_checkpointing": checkpointing}
    return Case(raw, TrainSetup(tune, on_gpu=False, **recomputed), micro)


SMALL = config((384, 8, 6), (512, 8, 8))
MIDDLE = config((512, 12, 8), (1024, 12, 16))
LARGE = config((768, 12, 12), (1536, 16, 24), vocabulary=50000)
BILLION = config((1024, 24, 16), (1536, 24, 24), vocabulary=50000)
DEMO = demo_config({"<|endoftext|>": 0, "<|im_end|>": 1, "last": 900})
CASES = {
    "demo": _case(DEMO, FULL, BatchShape(128, 96, 128, 1000)),
    "60M LoRA": _case(SMALL, LOW, BatchShape(4, 512, 8, 400)),
    "60M LoRA, recomputed": _case(SMALL, LOW, BatchShape(4, 512, 8, 400), True),
    "60M LoRA, packed": _case(SMALL, LOW, BatchShape(1, 2048, 8, 400, True)),
    "60M full": _case(SMALL, FULL, BatchShape(4, 512, 8, 400)),
    "60M full, recomputed": _case(SMALL, FULL, BatchShape(4, 512, 8, 400), True),
    "250M LoRA": _case(MIDDLE, LOW, BatchShape(2, 512, 4, 256)),
    "250M full": _case(MIDDLE, FULL, BatchShape(2, 512, 4, 256)),
    "700M LoRA": _case(LARGE, LOW, BatchShape(1, 512, 4, 128)),
    "1B LoRA, recomputed": _case(BILLION, LOW, BatchShape(1, 512, 4, 128), True),
}


def status(field: str) -> int:
    """Bytes, from /proc."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def batch_of(case: Case, image: int = 9) -> dict[str, torch.Tensor]:
    micro, parsed = case.micro, Config.from_dict(case.raw)
    ids = torch.full((micro.rows, micro.length), 3)
    ids.view(-1)[: micro.tiles * parsed.tokens_per_tile] = image
    labels = torch.full_like(ids, -100)
    labels.view(-1)[-micro.supervised :] = 5
    tiles = torch.zeros(micro.tiles, 3, parsed.image_size, parsed.image_size, dtype=torch.uint8)
    batch = {"input_ids": ids, "labels": labels, "tiles": tiles}
    if micro.packed:
        batch |= {"row_ids": torch.zeros_like(ids), "position_ids": torch.arange(micro.length)[None]}
        batch["tiles_per_row"] = torch.tensor([micro.tiles])
    return batch


def steps(case: Case) -> tuple[int, int]:
    """Train; the peak above where it began, and the number of parameters."""
    before = status("VmRSS")
    model = InternVL.from_config(Config.from_dict(case.raw), attention="sdpa", image_token_id=9)
    tuning.apply(model, case.setup.tune)
    model.set_checkpointing(case.setup.vision_checkpointing, case.setup.language_checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = batch_of(case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    for _ in range(STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return status("VmHWM") - before, sum(p.numel() for p in model.parameters())


def warm_up() -> None:
    """What the first step of any model loads: libraries, peft among them."""
    tiny = config((32, 1, 2), (32, 1, 4), 28, 100)
    for tune in (FULL, LOW):
        steps(_case(tiny, tune, BatchShape(1, 16, 1, 4)))


def main(names: list[str]) -> None:
    if names[:1] == ["--measure"]:
        torch.set_num_threads(1)
        warm_up()
        print(json.dumps(steps(CASES[names[1]])))
        return
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}\n")
    print("| case | parameters | batch | predicted, MB | measured, MB | predicted / measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    for name, case in CASES.items():
        if names and name not in names:
            continue
        command = [sys.executable, __file__, "--measure", name]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        measured, count = json.loads(run.stdout.splitlines()[-1])
        predicted = memory_needed(ShallowModel(Config.from_dict(case.raw), case.setup), case.micro).total
        micro = case.micro
        print(
            f"| {name} | {count / 1e6:.0f} M | {micro.rows} x {micro.length}, {micro.tiles} tiles | "
            f"{predicted / 1e6:.0f} | {measured / 1e6:.0f} | {predicted / measured:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
