"""Full tuning by preference, step for step as TRL's trainer, which holds a second model for the reference."""

import json

import pytest
import torch

from ivl.data.processor import Processor
from tests.finetune.record_trl import CASES, ROWS, batch_of, folders, trl_inputs
from tests.lit.test_runs import scalars
from tests.lit.training.test_preference import fit, settings

STEPS, LR = 3, 0.001
FULL = {"vision_model": "full", "mlp1": "full", "language_model": "full"}


def trained_by_trl(policy, root, name: str) -> list[float]:
    """Losses of TRL's steps."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    losses, weights, numbers = CASES[name]
    processor, seen = Processor.from_pretrained(policy), []

    class Seen(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.extend([float(logs["loss"])] if "loss" in (logs or {}) else [])

    options = DPOConfig(
        output_dir=str(root / "trainer"), per_device_train_batch_size=len(numbers), max_steps=STEPS, logging_steps=1,
        save_strategy="no", report_to=[], lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, bf16=False,
        remove_unused_columns=False, disable_tqdm=True, gradient_checkpointing=False, max_length=None, beta=0.1,
        loss_type=losses, loss_weights=weights,
    )  # fmt: skip
    columns = {"number": numbers} | {key: [key] * len(numbers) for key in ("prompt", "chosen", "rejected")}
    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32)
    trainer = DPOTrainer(
        model,
        args=options,
        data_collator=lambda _: trl_inputs(batch_of(processor, root, numbers)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(policy),
        callbacks=[Seen()],
    )
    assert trainer.ref_model is not None
    trainer.optimizer = torch.optim.SGD(model.parameters(), LR)
    trainer.train()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "mpo 0"])
def test_a_full_run_is_trl_s(tmp_path, name):
    pytest.importorskip("trl", reason='trl is not installed: pip install -e ".[trl]"')
    policy, _ = folders(tmp_path)
    numbers = CASES[name][2]
    rows = tmp_path / "data/train.jsonl"
    rows.parent.mkdir()
    rows.write_text("".join(json.dumps(ROWS[n]) + "\n" for n in numbers))
    changes = {"model__tune": FULL, "data__media_root": str(tmp_path), "trainer__max_steps": STEPS}
    changes |= {"data__batch_size": len(numbers), "trainer__max_epochs": STEPS, "data__train": str(rows)}
    changes |= {"model__optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": LR}}}
    objective = {"mpo": {"shift": "none"}} if name.startswith("mpo") else {"dpo": {}}
    fit(tmp_path, tmp_path / "run", **settings(**changes, model__objective=objective, model__pretrained=str(policy)))
    ours = scalars(tmp_path / "run", "train/loss")
    assert ours == pytest.approx(trained_by_trl(policy, tmp_path, name), rel=1e-5, abs=1e-5)
    assert ours[0] - ours[-1] > 1e-3
