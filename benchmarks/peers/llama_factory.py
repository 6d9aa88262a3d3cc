"""Peer of train_step.py: LLaMA-Factory's own training, on the checkpoint in transformers' layout.

python llama_factory.py HF ROWS STEPS MAX_TILES THREADS RECIPE DROPOUT

by the interpreter that `python tests/judges/make_env.py llamafactory` makes, as `train_step.py --peer llamafactory`
does. The rows in order, batches of 4, float32, fused AdamW at a constant rate, no clipping, no activation
checkpointing, no loader workers, as on the other sides. Pictures are opened and tiled in the step, by its own plugin,
which knows one tile and twelve alone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from llamafactory.train.tuner import run_exp
from side import BATCH, LORA, RATE, TARGETS, arguments, rows_of, watch_of, write_result
from transformers import TrainerCallback


def main() -> None:
    args, lora = arguments(), {}
    if args.max_tiles not in (1, 12):
        raise SystemExit(
            f"LLaMA-Factory makes 1 tile of a picture, or up to 12: --max_tiles 1 or 12, not {args.max_tiles}"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = {"prompt": "query", "response": "response", "images": "images"}
        rows = {"file_name": rows_of(args, folder / "rows.jsonl").name, "formatting": "alpaca", "columns": columns}
        (folder / "dataset_info.json").write_text(json.dumps({"rows": rows}))
        if args.recipe == "lora":
            lora = {"lora_rank": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": args.dropout}
            lora["lora_target"] = ",".join(TARGETS)  # of the language model, as the tower is frozen
        options = {
            "model_name_or_path": str(args.hf), "template": "intern_vl", "default_system": "", "stage": "sft",
            "do_train": True, "finetuning_type": args.recipe, "freeze_vision_tower": bool(lora),
            "freeze_multi_modal_projector": bool(lora), "freeze_language_model": False, **lora,
            "dataset": "rows", "dataset_dir": str(folder), "cutoff_len": 8192, "disable_shuffling": True,
            "crop_to_patches": args.max_tiles > 1, "image_max_pixels": 2**30, "overwrite_cache": True,
            "dataloader_num_workers": 0, "per_device_train_batch_size": BATCH, "max_steps": args.steps,
            "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
            "max_grad_norm": 0.0, "optim": "adamw_torch_fused", "disable_gradient_checkpointing": True,
            "flash_attn": "sdpa", "bf16": False, "fp16": False, "use_cpu": True, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "output_dir": str(folder / "out"),
        }  # fmt: skip
        watch = watch_of(TrainerCallback)
        run_exp(options, callbacks=[watch()])
    write_result(watch)


if __name__ == "__main__":
    main()
