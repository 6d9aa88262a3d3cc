"""Preference runs: pairs are learnt, packed as padded, resumed bit for bit, by two processes as by one."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from ivl.__main__ import main
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.finetune import tune as tuning
from ivl.finetune.reference import Reference
from ivl.finetune.tune import LoRA, Tune
from ivl.model.internvl import InternVL
from tests.lit.processes import finished, ranks
from tests.lit.rows import write_rows
from tests.lit.test_runs import REPO, config, scalars

TUNE = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 4}}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0}}
LOGGED = ["--trainer.logger.init_args.version", "run"]
"""Asks `validate` to log its numbers in the run's folder; by default it prints them alone"""
MEASURED = [f"train/rewards/{name}" for name in ("chosen", "rejected", "margin", "accuracy")] + ["train/kl"]


def settings(**changes) -> dict:
    return {
        "model__tune": TUNE,
        "model__objective": {"mpo": {}},
        "model__optimizer": ADAMW,
        "data__batch_size": 2,
        "data__val": None,
        "trainer__max_epochs": 2,
        "checkpoint__every_n_train_steps": 1,
        "checkpoint__save_top_k": -1,
    } | changes


def fit(base: Path, root: Path, *more: str, **changes) -> dict:
    assert main(["fit", "--config", str(config(base, root, **settings(**changes))), *more]) == 0
    return state(root)


def state(root: Path, name: str = "last") -> dict:
    return torch.load(root / f"run/checkpoints/{name}.ckpt", weights_only=True)


def assert_equal(a: dict, b: dict, atol: float = 0) -> None:
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], tensor, atol=atol, rtol=0)
    torch.testing.assert_close(b["objective"], a["objective"], atol=max(atol, 1e-12), rtol=0)


@pytest.mark.parametrize("objective", [{"mpo": {}}, {"dpo": {}}])
def test_pairs_are_learnt_and_watched(base, tmp_path, objective):
    changes = {"data__val": str(base / "data/val.jsonl"), "trainer__max_epochs": 4, "model__objective": objective}
    changes |= {"model__answer_rows": 0, "trainer__check_val_every_n_epoch": 2}
    fit(base, tmp_path, checkpoint__monitor="val/rewards/margin", **changes)
    margin = scalars(tmp_path, "train/rewards/margin")
    assert margin[0] == pytest.approx(0, abs=1e-5) and sum(margin[-4:]) > 4 * 0.02
    assert scalars(tmp_path, "train/rewards/accuracy")[-1] > 0.5
    assert all(len(scalars(tmp_path, name)) == 16 for name in MEASURED)
    held_out = scalars(tmp_path, "val/rewards/margin")
    assert held_out[-1] > held_out[0] and len(scalars(tmp_path, "val/loss")) == 2
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    images, texts = panels(tmp_path)
    assert images == {"pairs": 2} and set(texts) == {"pairs"}
    question, good, _, bad, numbers = texts["pairs"].splitlines()[2].split(" | ")[1:]
    assert (question, good, bad) == ("<image>What is it?", "a cat", "a cow")
    assert re.search(r"log p -[0-9.]+ → -[0-9.]+, reward [+-]", numbers)


def panels(root: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Number of pictures by name, and the last text by name, of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "run"))
    events.Reload()
    images = {name: len(events.Images(name)) for name in events.Tags()["images"]}
    texts = {name: events.Tensors(name)[-1].tensor_proto.string_val[0].decode() for name in events.Tags()["tensors"]}
    return images, {name.partition("/")[0]: text for name, text in texts.items()}


def test_a_run_is_judged_and_stopped_by_the_objective_of_held_out_pairs(base, tmp_path):
    """Trained the wrong way round, so that each epoch is worse than the one before."""
    rows = [json.loads(line) for line in (base / "data/train.jsonl").read_text().splitlines()]
    rows = [row | {"response": row["rejected_response"], "rejected_response": row["response"]} for row in rows]
    train = base / "data/reversed.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows if "objects" not in row))
    changes = {"data__train": str(train), "data__val": str(base / "data/val.jsonl"), "trainer__max_epochs": 9}
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/objective", "patience": 2}}
    changes |= {"model__answer_rows": 0, "trainer__callbacks": [stop], "checkpoint__monitor": "val/objective"}
    changes |= {"checkpoint__every_n_train_steps": None, "checkpoint__save_top_k": 1}
    fit(base, tmp_path, **changes, model__objective={"dpo": {}})
    values = scalars(tmp_path, "val/objective")
    assert len(values) == 3 and values == sorted(values)
    (best,) = (tmp_path / "run/checkpoints").glob("epoch=*.ckpt")
    assert best.name.startswith("epoch=0-") and (tmp_path / "run/adapter-best").is_dir()
    margins = scalars(tmp_path, "val/rewards/margin")
    assert values[0] > math.log(2) > 0 > margins[0]
    argv = ["--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(best), *LOGGED]
    assert main(["validate", *argv]) == 0
    assert scalars(tmp_path, "val/objective")[-1] == pytest.approx(values[0], abs=1e-6)


def test_a_cut_run_goes_on_bit_for_bit_with_its_mean_of_rewards(base, tmp_path):
    changes = {"trainer__accumulate_grad_batches": 2, "model__tune": TUNE | {"language_model": {"dropout": 0.3}}}
    whole = fit(base, tmp_path / "whole", **changes)
    assert whole["objective"]["rewards"][1] == 2 * 8 * 2
    saved = str(next((tmp_path / "whole/run/checkpoints").glob("epoch=0-step=1*.ckpt")))
    again = fit(base, tmp_path / "again", "--ckpt_path", saved, **changes)
    assert_equal(again, whole)
    assert scalars(tmp_path / "again", "train/loss") == scalars(tmp_path / "whole", "train/loss")[1:]


def test_packed_pairs_are_padded_ones(base, tmp_path):
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}  # Adam turns a last bit into a step
    changes = {"model__optimizer": sgd, "trainer__max_epochs": 4}
    padded = fit(base, tmp_path / "padded", data__batch_size=8, **changes)
    packed = fit(base, tmp_path / "packed", data__batch_size=None, data__packing=True, **changes)
    assert_equal(packed, padded, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one(base, tmp_path, strategy):
    one = fit(base, tmp_path / "one", data__batch_size=2, model__optimizer__init_args__lr=0.001)
    path = config(base, tmp_path / "two", **settings(data__batch_size=1, model__optimizer__init_args__lr=0.001))
    argv = ["fit", "--config", str(path), "--config", str(REPO / f"configs/strategy/{strategy}.yaml")]
    finished(ranks(argv, tmp_path / "two"), tmp_path / "two")
    assert scalars(tmp_path / "two", "train/loss") == pytest.approx(scalars(tmp_path / "one", "train/loss"), abs=1e-4)
    assert_equal(state(tmp_path / "two"), one, atol=1e-4)


def test_an_adapter_that_goes_on_is_its_own_reference(base, tmp_path):
    """After training on answers, preferences are measured from there."""
    fit(base, tmp_path / "sft", model__objective="sft")
    adapter = str(tmp_path / "sft/run/adapter")
    changes = {"data__val": str(base / "data/val.jsonl"), "model__answer_rows": 0, "model__objective": {"dpo": {}}}
    fit(base, tmp_path / "dpo", model__adapter=adapter, model__tune=None, **changes)
    assert scalars(tmp_path / "dpo", "train/rewards/chosen")[0] == pytest.approx(0, abs=1e-5)
    assert abs(scalars(tmp_path / "dpo", "train/rewards/chosen")[-1]) > 1e-3
    assert main(["validate", "--ckpt_path", str(tmp_path / "dpo/run/checkpoints/last.ckpt"), *LOGGED]) == 0
    *_, last, again = scalars(tmp_path / "dpo", "val/rewards/chosen")
    assert again == pytest.approx(last, abs=1e-6) and abs(last) > 1e-3


def test_the_reference_is_the_model_before_training(base):
    model, processor = InternVL.from_pretrained(base / "model"), Processor.from_pretrained(base / "model")
    processor.pairs = True
    rows = RowDataset(base / "data/train.jsonl", processor)
    batch = processor.collate([rows[n] for n in range(4)])
    with torch.no_grad():
        before = model(**batch).row_losses
    tuning.apply(model, Tune(language_model=LoRA(rank=4, dropout=0.5)))
    model.neftune_alpha = 5.0
    for is_fresh in (True, False):
        reference = Reference(model, is_fresh)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in trained.values():
                p.add_(torch.randn_like(p))
        now = {name: p.detach().clone() for name, p in trained.items()}
        torch.testing.assert_close(reference.row_losses(model, batch), before, atol=1e-4, rtol=1e-5)
        assert all(p.requires_grad and torch.equal(p, now[name]) for name, p in trained.items())
        assert model.training and model.language_model.training and not model.vision_model.training
        with torch.no_grad():
            for name, p in trained.items():
                p.zero_() if "lora_B" in name else p


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__label_smoothing": 0.1}, "model.label_smoothing: is of objective sft"),
        ({"model__objective": {"dpo": {"beta": -1.0}}}, "dpo.beta: expected above 0"),
        ({"data__train": "SFT"}, "no rejected answer to compare with; add rejected_response"),
    ],
)
def test_mistakes(base, tmp_path, capsys, changes, message):
    if "data__train" in changes:
        changes = {"data__train": str(write_rows(tmp_path / "data", 4, "sft.jsonl"))}
    assert main(["fit", "--config", str(config(base, tmp_path, **settings(**changes)))]) == 2
    assert message in capsys.readouterr().err
