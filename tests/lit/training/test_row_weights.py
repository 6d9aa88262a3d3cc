"""Weights of rows and sources in runs: the step is one weighted mean, however it is cut, and is resumed bit for bit."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml

from ivl.__main__ import main
from ivl.data.learnt_turns import check_pairs
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.finetune.objectives import DPO, Preference
from ivl.lit.run.experiment import differences
from ivl.lit.training.loss_normalizer import LossNormalizer
from ivl.lit.training.preference import PreferenceTuning
from ivl.model.internvl import InternVL
from ivl.model.loss import Output
from ivl.types import UserError
from tests.lit.rows import write_rows
from tests.lit.test_runs import fit, losses
from tests.tiny import write_checkpoint

LORA = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 4}}
WEIGHTS = [0.25, 1.0, 3.0, 0.125]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    path = write_rows(folder / "data")
    rows = [json.loads(line) | {"weight": WEIGHTS[n % 4]} for n, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_rows(folder / "data", 5, "val.jsonl")
    return folder


def close(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_step_is_the_weighted_mean_of_token_losses_however_it_is_cut(base, tmp_path):
    source = {"path": str(base / "data/train.jsonl"), "loss_weight": 0.5}
    mixture = {"data__train": None, "data__mixture": [source], "model__tune": LORA, "data__val": None}
    whole = fit(base, tmp_path / "whole", data__batch_size=12, **mixture)
    packed = fit(base, tmp_path / "packed", data__packing=True, data__pack_tokens=4096, **mixture)
    cut = fit(base, tmp_path / "cut", data__batch_size=4, trainer__accumulate_grad_batches=3, **mixture)
    close(whole, packed)
    close(whole, cut)
    processor, model = Processor.from_pretrained(base / "model"), InternVL.from_pretrained(base / "model")
    rows = RowDataset(base / "data/train.jsonl", processor)
    with torch.no_grad():
        out = model(**processor.collate([rows[n] for n in range(len(rows))]))
    weights = torch.tensor(WEIGHTS * 3) * 0.5
    expected = float((weights * out.row_losses).sum() / (weights * out.row_tokens).sum())
    unweighted = float(out.row_losses.sum() / out.row_tokens.sum())
    assert expected != pytest.approx(unweighted, rel=1e-4)
    for root in ("whole", "packed", "cut"):
        assert losses(tmp_path / root)[0] == pytest.approx(expected, rel=1e-5)
    saved = yaml.safe_load((tmp_path / "whole/run/config.yaml").read_text())["data"]
    assert saved["mixture"][0]["loss_weight"] == 0.5 and saved["learn"] == "all"


def test_a_denominator_below_1_is_no_other_one():
    """Small weights alone change nothing: the mean is over the weights, however small they are."""
    means = []
    for weight in (1.0, 1e-4):
        module = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(module.weight)
        normalizer, log = LossNormalizer(), Mock()
        module.device, module.log = torch.device("cpu"), log
        strategy = SimpleNamespace()
        trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, strategy=strategy, precision_plugin=None)
        normalizer.on_fit_start(trainer, module)
        losses = module(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))[:, 0]
        normalizer.add(trainer, (losses * weight).sum(), torch.tensor(2 * weight)).backward()
        normalizer.on_before_optimizer_step(trainer, module, None)
        logged = {call.args[0]: float(call.args[1]) for call in log.call_args_list}
        means.append((logged["train/loss"], module.weight.grad[0].tolist()))
    assert means[0] == (5.5, pytest.approx([2.0, 3.5]))
    assert means[1] == (pytest.approx(5.5, rel=1e-5), pytest.approx([2.0, 3.5], rel=1e-5))


def test_a_weighted_run_is_resumed_bit_for_bit(base, tmp_path):
    common = {"model__tune": LORA, "data__val": None, "data__learn": "last_answer", "data__batch_size": 6}
    common |= {"trainer__max_epochs": 2, "checkpoint__every_n_train_steps": 1, "checkpoint__save_top_k": -1}
    whole = fit(base, tmp_path / "whole", **common)
    (saved,) = (tmp_path / "whole/run/checkpoints").glob("epoch=0-step=1*.ckpt")
    resumed = fit(base, tmp_path / "cut", "--ckpt_path", str(saved), **common)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    here = {"data.learn": "all"}
    there = {"data.learn": "last_answer"}
    assert differences(there, here, ["data.learn"]) == ["data.learn last_answer there, all here"]
    assert not differences({}, here, ["data.learn"])  # an older checkpoint


def test_pairs_weigh_by_their_rows():
    tuning, trainer = PreferenceTuning(Preference(dpo=DPO())), SimpleNamespace(world_size=1)
    losses, reference = torch.tensor([1.0, 2.0, 3.0, 2.5]), torch.tensor([1.5, 1.0, 3.0, 3.0])
    out = Output(row_losses=losses, row_tokens=torch.ones(4))
    single = [
        tuning.loss(trainer, Output(row_losses=losses[at], row_tokens=torch.ones(2)), reference[at]).loss_sum
        for at in (slice(0, 2), slice(2, 4))
    ]
    whole = tuning.loss(trainer, out, reference, torch.tensor([0.25, 0.25, 2.0, 2.0]))
    assert float(whole.loss_sum) == pytest.approx(float(0.25 * single[0] + 2 * single[1])) and whole.pairs == 2.25
    assert tuning.loss(trainer, out, reference).pairs == 2


def test_turns_marked_mean_nothing_for_pairs(base, tmp_path, capsys):
    with pytest.raises(UserError, match=r"data\.learn: marked, and model.objective compares pairs"):
        check_pairs("marked")
    check_pairs("last_answer")
    argv = [f"--model.pretrained={base / 'model'}", f"--data.train={base / 'data/train.jsonl'}", "--workers=0"]
    assert main(["check", *argv, "--pairs", "--data.learn=marked", f"--out={tmp_path}"]) == 2
    assert "data.learn: marked" in capsys.readouterr().err


def test_check_shows_the_weights(base, tmp_path, capsys):
    mixture = [{"path": str(base / "data/train.jsonl"), "loss_weight": 2.0}, {"path": str(base / "data/val.jsonl")}]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"mixture": mixture, "learn": "last_answer"}}))
    argv = [f"--model.pretrained={base / 'model'}", f"--config={tmp_path / 'c.yaml'}", "--workers=0"]
    assert main(["check", *argv, f"--out={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}"]) == 0
    shown = capsys.readouterr().out
    assert "| source | rows | rows an epoch | times | share | weight in the loss |" in shown
    assert "| 2 |" in shown and "| 1 |" in shown
    assert "rows whose weight in the loss is not 1: 12, from 0.25 to 6; they are" in shown


def test_a_source_without_weight_is_refused(base):
    with pytest.raises(UserError, match="loss_weight: expected above 0, found 0; leave the source out"):
        RowDataset(base / "data/train.jsonl", Processor.from_pretrained(base / "model"), loss_weight=0)
