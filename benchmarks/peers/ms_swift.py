"""Peer of train_step.py: ms-swift's own `sft`, on the checkpoint in transformers' layout.

python ms_swift.py HF ROWS STEPS MAX_TILES THREADS RECIPE DROPOUT

by the interpreter that `python tests/judges/make_env.py ms-swift` makes, as `train_step.py --peer ms-swift` does. The
rows in order, batches of 4, float32, fused AdamW at a constant rate, no clipping, no activation checkpointing, no
loader workers, as on the other sides. Pictures are opened and tiled in the step, by its own template.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from side import BATCH, LORA, RATE, TARGETS, arguments, rows_of, watch_of, with_tiles, write_result
from swift.callbacks import callbacks_map
from swift.pipelines import sft_main
from transformers import TrainerCallback

REGEX = rf".*language_model.*\.({'|'.join(TARGETS)})"


def main() -> None:
    args, lora = arguments(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.recipe == "lora":
            lora = {"lora_rank": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": args.dropout}
        frozen = "true" if lora else "false"
        options = {
            "model": with_tiles(args, folder / "hf"), "model_type": "internvl", "template": "internvl_hf", "system": "",
            "dataset": rows_of(args, folder / "rows.jsonl"), "split_dataset_ratio": 0, "dataset_shuffle": "false",
            "train_dataloader_shuffle": "false", "load_from_cache_file": "false", "dataloader_num_workers": 0,
            "torch_dtype": "float32", "bf16": "false", "fp16": "false", "attn_impl": "sdpa", "max_length": 8192,
            "tuner_type": args.recipe, "freeze_vit": frozen, "freeze_aligner": frozen, **lora,
            "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_steps": args.steps,
            "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0, "weight_decay": 0,
            "max_grad_norm": 0, "optim": "adamw_torch_fused", "gradient_checkpointing": "false", "use_cpu": "true",
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": "true",
            "output_dir": folder / "out", "callbacks": "times",
        }  # fmt: skip
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        watch = callbacks_map["times"] = watch_of(TrainerCallback)
        sft_main([*words, *(["--target_regex", REGEX] if lora else [])])
    write_result(watch)


if __name__ == "__main__":
    main()
