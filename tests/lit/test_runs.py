"""Whole runs on tiny models: what is learnt, what is saved, what is written; each in the process a user would start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its first import: not one test's own)
import pytest
import torch
import yaml

from ivl.__main__ import main
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.finetune import tune as tuning
from ivl.model.internvl import InternVL
from ivl.options import Tune
from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint

REPO = Path(__file__).resolve().parents[2]


def config(base: Path, root: Path, **changes) -> Path:
    """A config for a short run on a CPU; `changes` are dotted keys with dots written as double underscores."""
    value = {
        "seed_everything": 1,
        "model": {
            "pretrained": str(base / "model"),
            "tune": {"vision_model": "full", "mlp1": "full", "language_model": "full"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
            "schedule": {
                "class_path": "ivl.lit.schedule.Warmup",
                "init_args": {"warmup": 0, "decay": "constant"},
            },
            "generation": {"max_new_tokens": 4},
        },
        "data": {
            "train": str(base / "data/train.jsonl"),
            "val": str(base / "data/val.jsonl"),
            "batch_size": 4,
            "num_workers": 0,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "logger": {
                "class_path": "TensorBoardLogger",
                "init_args": {"save_dir": str(root), "name": "", "version": "run"},
            },
        },
    }
    for key, change in changes.items():
        *parents, last = key.split("__")
        place = value
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = change
    path = root / "config.yaml"
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value))
    return path


def fit(base: Path, root: Path, *more: str, **changes) -> dict[str, torch.Tensor]:
    """Run fit; the checkpoint's tensors."""
    assert main(["fit", "--config", str(config(base, root, **changes)), *more]) == 0
    checkpoint = torch.load(root / "run/checkpoints/last.ckpt", weights_only=True)
    return checkpoint["state_dict"]


def losses(root: Path) -> list[float]:
    return scalars(root, "train/loss")


def scalars(root: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "run"))
    events.Reload()
    return [e.value for e in events.Scalars(tag)]


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_accumulation_does_not_change_the_step(base, tmp_path, reduction):
    """Rows of unequal label counts, 4 x 1 = 2 x 2 = 1 x 4: the step is one weighted mean, however the batch is cut."""
    common = {"model__loss_reduction": reduction, "model__label_smoothing": 0.1}
    whole = fit(base, tmp_path / "whole", data__batch_size=4, **common)
    for accumulate in (2, 4):
        cuts = {"data__batch_size": 4 // accumulate, "trainer__accumulate_grad_batches": accumulate}
        cut = fit(base, tmp_path / str(accumulate), **cuts, **common)
        assert whole.keys() == cut.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(cut[name], tensor, atol=1e-6, rtol=1e-5)
        for tag in ("train/loss", "train/grad_norm"):
            assert scalars(tmp_path / str(accumulate), tag) == pytest.approx(scalars(tmp_path / "whole", tag), rel=1e-4)


def test_the_gradient_is_that_of_the_mean_over_supervised_tokens(base, tmp_path):
    """Its size too, which clipping and weight decay depend on, and which Adam alone would not show."""
    fit(base, tmp_path, data__batch_size=12, trainer__max_epochs=1)
    processor, model = Processor.from_pretrained(base / "model"), InternVL.from_pretrained(base / "model")
    rows = RowDataset(base / "data/train.jsonl", processor)
    tuning.apply(model, Tune("full", "full", "full"))
    loss = model(**processor.collate([rows[n] for n in range(len(rows))])).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert len(rows) == 12 and losses(tmp_path)[0] == pytest.approx(float(loss), rel=1e-5)
    assert scalars(tmp_path, "train/grad_norm")[0] == pytest.approx(float(norm), rel=1e-4)


def test_packing_does_not_change_the_step(base, tmp_path):
    padded = fit(base, tmp_path / "padded", data__batch_size=12)
    packed = fit(base, tmp_path / "packed", data__packing=True, data__pack_tokens=4096)
    for name, tensor in padded.items():
        torch.testing.assert_close(packed[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_holds_what_trains_and_a_lora_is_a_peft_folder(base, tmp_path):
    tune = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 2}}
    state = fit(base, tmp_path, model__tune=tune)
    assert state and all("lora_" in name for name in state)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "run/config.yaml").is_file()


def test_an_hf_folder_trains_as_the_release_it_was_made_from(base, tmp_path):
    from ivl.commands.export import export

    hf = export(str(tmp_path / "model-hf"), base=str(base / "model"), layout="hf")
    start = InternVL.from_pretrained(base / "model").state_dict()
    released = fit(base, tmp_path / "released")
    for name, tensor in fit(base, tmp_path / "hf", model__pretrained=str(hf)).items():
        # Not to the bit: the hf layout has a row of the output layer more, for `<video>`, which the softmax counts.
        before = start[name.removeprefix("model.")]
        step, difference = released[name] - before, tensor[: len(before)] - released[name]
        assert difference.norm() < 0.2 * step.norm(), name
    out = tmp_path / "answers.jsonl"
    checkpoint = str(tmp_path / "hf/run/checkpoints/last.ckpt")
    rows = ["--data.predict", str(base / "data/val.jsonl"), "--predictions.file", str(out)]
    assert main(["predict", "--ckpt_path", checkpoint, *rows]) == 0
    assert len(out.read_text().splitlines()) == 5
    merged = export(str(tmp_path / "merged"), run=str(tmp_path / "hf/run"), layout="hf")
    assert (merged / "chat_template.jinja").read_text() == (hf / "chat_template.jinja").read_text()


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_lora_trains_on_a_base_in_few_bits(base, tmp_path, quantize):
    pytest.importorskip("bitsandbytes")
    from ivl.commands.export import export
    from ivl.model.internvl import InternVL

    model = write_checkpoint(tmp_path / "model", llm={"intermediate_size": 128})  # blocks of 4-bit numbers are 64 wide
    settings = {
        "model__pretrained": str(model),
        "model__quantize": quantize,
        "model__tune": {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 4}},
        "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        "trainer__max_epochs": 8,
    }
    state = fit(base, tmp_path, **settings)
    assert state and all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in state.items())
    seen = losses(tmp_path)
    assert sum(seen[-3:]) < 0.9 * sum(seen[:3]), seen
    out = ["--data.predict", str(base / "data/val.jsonl"), "--predictions.file", str(tmp_path / "answers.jsonl")]
    assert main(["predict", "--ckpt_path", str(tmp_path / "run/checkpoints/last.ckpt"), *out]) == 0
    merged = export(str(tmp_path / "merged"), run=str(tmp_path / "run"))
    report = json.loads((merged / "export_report.json").read_text())
    assert any(f"trained on a base in {quantize}" in note for note in report["notes"])
    weight = InternVL.from_pretrained(merged).language_model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32


def test_what_is_in_few_bits_cannot_be_tuned_in_full(base, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    assert main(["fit", "--config", str(config(base, tmp_path, model__quantize="nf4"))]) == 2
    assert "model.tune.language_model: full, but its weights are quantised" in capsys.readouterr().err


def test_loss_falls(base, tmp_path):
    settings = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}}
    for name, tune in {"full": "full", "lora": {"rank": 8}}.items():
        parts = {"vision_model": "frozen", "mlp1": "full", "language_model": tune}
        fit(base, tmp_path / name, model__tune=parts, model__optimizer=settings, trainer__max_epochs=8)
        seen = losses(tmp_path / name)
        assert sum(seen[-3:]) < 0.8 * sum(seen[:3]), (name, seen)


def test_torch_computes_with_as_many_threads_as_asked(base, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["fit", "--config", str(config(base, tmp_path, trainer__max_steps=1)), "--threads", "1"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_two_processes_write_one_complete_file_in_order(base, tmp_path):
    rows = write_rows(base / "data", 7, "ask.jsonl")
    answers = []
    for devices in (1, 2):
        path = config(base, tmp_path / str(devices), trainer__devices=devices, trainer__strategy="auto")
        out = tmp_path / f"{devices}.jsonl"
        command = ["predict", "--config", str(path), "--data.predict", str(rows), "--predictions.file", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "ivl", *command],
            capture_output=True,
            text=True,
            cwd=REPO,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append(out.read_text())
    assert answers[0] == answers[1]
    parsed = [json.loads(line) for line in answers[0].splitlines()]
    assert [row["id"] for row in parsed] == [f"row{n}" for n in range(7)]
    assert parsed[0]["where"].endswith("ask.jsonl:1") and parsed[0]["reference"] == "a cat"
    assert parsed[2]["reference"].startswith("<box>")


def test_a_fitted_run_predicts_with_its_own_config_and_its_adapter_says_the_same(base, tmp_path):
    rows = str(base / "data/val.jsonl")
    tune = {"vision_model": "frozen", "mlp1": "full", "language_model": {"rank": 4}}
    settings = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    fit(base, tmp_path, model__tune=tune, model__optimizer=settings, trainer__max_epochs=3)
    checkpoint = str(tmp_path / "run/checkpoints/last.ckpt")
    for name, argv in {
        "run": ["--ckpt_path", checkpoint],
        "adapter": ["--config", str(tmp_path / "config.yaml"), "--model.adapter", str(tmp_path / "run/adapter")],
        "base": ["--config", str(tmp_path / "config.yaml")],
    }.items():
        out = ["--data.predict", rows, "--predictions.file", str(tmp_path / f"{name}.jsonl")]
        done = subprocess.run(
            [sys.executable, "-m", "ivl", "predict", *argv, *out], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "site-packages" not in done.stderr, "a warning of some package, which says nothing to a user"
    said = {
        name: [row | {"model": None} for row in map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())]
        for name in ("run", "adapter", "base")
    }  # each names the model it came from
    assert said["run"] == said["adapter"] != said["base"]


@pytest.mark.parametrize("how", ["fraction", "file"])
def test_a_run_s_held_out_rows_are_found_again(base, tmp_path, capsys, how):
    """After training, and whatever has been added to the file since."""
    data = write_rows(tmp_path / "data", 12, "train.jsonl")
    changes = {"data__val": None, "data__val_fraction": 0.25} if how == "fraction" else {}
    fit(base, tmp_path, data__train=str(data), **changes)
    run = tmp_path / "run"
    assert (run / "validation-split.json").is_file() == (how == "fraction")
    data.write_text('{"query": "added", "response": "later"}\n' + data.read_text())
    answers = []
    for name, argv in {
        "ckpt": ["--ckpt_path", str(run / "checkpoints/last.ckpt"), "--data.split", "run-validation"],
        "base": ["--config", str(tmp_path / "config.yaml"), "--data.split", str(run)],
    }.items():
        out = tmp_path / f"{name}.jsonl"
        assert main(["predict", *argv, "--predictions.file", str(out)]) == 0
        answers.append([json.loads(line)["id"] for line in out.read_text().splitlines()])
    capsys.readouterr()
    if how == "file":
        assert answers == [[f"row{n}" for n in range(5)]] * 2
        return
    known = json.loads((run / "validation-split.json").read_text())
    assert len(answers[0]) == len(known["rows"]) == 3 and answers[0] == answers[1]
    assert main(["predict", "--config", str(tmp_path / "config.yaml"), "--data.split", "run-validation"]) == 2
    assert "--data.split run-validation: expected --ckpt_path with a checkpoint" in capsys.readouterr().err
    assert main(["predict", "--config", str(tmp_path / "config.yaml"), "--data.split", str(tmp_path / "data")]) == 2
    assert "no config.yaml in it; expected the folder of a run" in capsys.readouterr().err


def test_rows_changed_by_the_limit_are_counted(base, tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(base, tmp_path, data__max_length=250)
    (line,) = [r.getMessage() for r in caplog.records if "max_length" in r.getMessage()]
    assert line.startswith("rows that max_length changes: ") and line.endswith("(of 12)")


def test_an_existing_file_of_predictions_is_not_overwritten(base, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    out.write_text("precious\n")
    argv = ["--config", str(config(base, tmp_path)), "--data.predict", str(base / "data/val.jsonl")]
    assert main(["predict", *argv, "--predictions.file", str(out)]) == 2
    assert f"error: {out}: exists already" in capsys.readouterr().err
    assert out.read_text() == "precious\n"


def test_validation_reports_scores_and_pictures(base, tmp_path, capsys):
    fit(base, tmp_path)
    printed = capsys.readouterr().out
    for word in (
        "held-out rows",
        "grounding",
        "mean IoU",
        "tensorboard --logdir",
        "predict --ckpt_path",
        "held_out.html",
    ):
        assert word in printed
    page = (tmp_path / "run/held_out.html").read_text()
    assert "held-out rows after step 3: 5 rows" in page and "IoU 0.0 [" in page and "data:image/jpeg" in page
    (entry,) = json.loads((tmp_path / "run/scores.json").read_text())["fits"]
    assert entry["step"] == 3 and entry["scores"][""]["rows"] == 5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert "answers" in tags["images"]
    wanted = {"train/loss", "val/loss", "val/exact", "speed/tokens_per_s", "speed/samples_per_s", "speed/data_wait"}
    assert wanted <= set(tags["scalars"])
    argv = ["--ckpt_path", str(tmp_path / "run/checkpoints/last.ckpt"), "--data.test", str(base / "data/val.jsonl")]
    before = set(Path().rglob("version_*"))
    assert main(["test", *argv]) == 0
    printed = capsys.readouterr().out
    assert printed.count("exact") == 1 and "loss" in printed, "one table"
    assert set(Path().rglob("version_*")) == before, "no folder without anything in it"
    assert any(tag.startswith("lr/") for tag in tags["scalars"])


def test_a_run_without_efficient_layers_is_the_same_run(base, tmp_path):
    """`model.efficient: false`, with everything that the option leaves out in use."""
    tune = {"vision_model": "full", "mlp1": "full", "language_model": {"rank": 4}}
    weights = [
        fit(base, tmp_path / name, model__tune=tune, model__efficient=efficient)
        for name, efficient in (("efficient", True), ("plain", False))
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "efficient"), rel=1e-4)
