"""Losses per source, and the time left."""

import io
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from ivl.architecture.config import Config
from ivl.estimate.flops import Work
from ivl.estimate.hardware import Device
from ivl.lit.callbacks import monitor
from ivl.lit.callbacks.monitor import SourceLosses, added, clock, device_row
from ivl.types import Batch, Conversation, Message, SequenceLayout
from tests.lit.rows import write_rows
from tests.lit.test_runs import fit, scalars
from tests.tiny import write_checkpoint


def rows(*sources: str) -> list[Conversation]:
    return [Conversation((Message("user", ("?",)),), source=source) for source in sources]


def test_losses_per_source_are_means_over_tokens_since_the_last_reading():
    losses = SourceLosses()
    losses.add(rows("a", "b", "a"), torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0]))
    losses.add(rows("", "b"), torch.tensor([5.0, 9.0]), torch.tensor([5.0, 1.0]))
    assert losses.read() == pytest.approx({"a": 2.0, "b": 3.0, "rows": 1.0})
    losses.add(rows("b"), torch.tensor([8.0]), torch.tensor([2.0]))
    assert losses.read() == {"b": 4.0}


def test_work_and_devices(monkeypatch):
    ids = torch.zeros(2, 5, dtype=torch.long)
    tiles, per_row = torch.zeros(3, 3, 2, 2), torch.tensor([1, 2])
    lengths = torch.tensor([5, 4])
    batch = Batch(ids, ids.bool(), ids, ids, tiles, per_row, lengths=lengths, supervised=[2, 1])
    batch.layout = SequenceLayout.of(lengths, 5, packed=False)
    work = added(added(Work(), batch), batch)
    assert work == Work(tiles=6, tokens=18, pairs=82, supervised=6)
    batch.layout = SequenceLayout.of(lengths, 5, packed=False, shared=[0, 3])  # the work of the second's last token
    assert added(Work(), batch) == Work(tiles=3, tokens=6, pairs=25 + 16 - 9, supervised=3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert device_row(torch.device("cuda")).flops == 989.4e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some new device")
    assert device_row(torch.device("cuda")) is None and device_row(torch.device("cpu")) is None


def test_a_run_on_a_known_device_logs_its_utilisation_and_is_the_same_run(tmp_path, monkeypatch):
    """Counting the model's operations at its start draws no random number."""
    base = tmp_path / "base"
    write_checkpoint(base / "model")
    for count, name in ((12, "train.jsonl"), (5, "val.jsonl")):
        write_rows(base / "data", count, name)
    modes = {"model__tune": {"language_model": {"rank": 4, "dropout": 0.1}}, "trainer__max_steps": 3}
    plain = fit(base, tmp_path / "plain", **modes)
    peak = Device("imagined", 1e9, 1e9)
    monkeypatch.setattr(monitor, "device_row", lambda device: peak)
    measured = fit(base, tmp_path / "measured", **modes)
    assert plain.keys() == measured.keys() and all(torch.equal(plain[name], measured[name]) for name in plain)
    shares, rates = (scalars(tmp_path / "measured", tag) for tag in ("speed/mfu", "speed/tokens_per_s"))
    assert len(shares) == len(rates) == 3
    per_token = [share * peak.flops / rate for share, rate in zip(shares, rates)]
    # Operations of a token differ with the tiles of a batch, not with the time it took.
    llm = Config.load(base / "model").llm
    width, inner, layers = llm["hidden_size"], llm["intermediate_size"], llm["num_hidden_layers"]
    assert all(2 * layers * 3 * width * inner < each < 10**8 for each in per_token)


def test_the_bar_keeps_the_time_left_in_80_columns_and_invents_no_digits(monkeypatch):
    watch = monitor.Watch()
    watch.shown = {"loss": 0.5, "tokens/s": 12345.6, "s/step": 3.0}
    run = SimpleNamespace(total_steps=1200, global_step=0, loggers=[])
    run.trainer = run.progress_bar_metrics = run
    run.callbacks = [watch]
    metrics = {"val/loss": 6.22, "val/exact": 0.5, "val/rewards/margin": 1 / 3}
    monkeypatch.setattr(monitor.TQDMProgressBar, "get_metrics", lambda *_: {"v_num": 3, **metrics})
    items = monitor.Progress().get_metrics(run, run)
    assert list(items)[:3] == ["left", "loss", "tokens/s"] and "v_num" not in items
    assert items["loss"] == "0.5" and items["val/loss"] == "6.22" and items["val/rewards/margin"] == "0.3333"
    bar = tqdm(total=300, desc="Epoch 12", ncols=80, file=io.StringIO(), bar_format=monitor.Progress.TRAINING)
    bar.set_postfix(items)
    line = str(bar)
    assert "left=1:00:00" in line and "tokens/s=12,346" in line and len(line) <= 80
    bar.close()


def test_a_log_has_lines_in_place_of_bars(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(monitor.Progress, "SECONDS", 0.0)
    fit(base, tmp_path / "out", trainer__max_epochs=2, trainer__enable_progress_bar=True)
    text = capsys.readouterr().out
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    steps = [line for line in lines if line.startswith("Epoch ")]
    assert steps[0].startswith("Epoch 0: 1/3") and steps[-1].startswith("Epoch 1: 3/3, left=")
    assert any(line.startswith("Validation: 1/") for line in lines)
    assert [line.split()[:2] for line in lines if line.endswith("%") and line.split()[0] in "12"][:2]
    monkeypatch.setattr(monitor.Progress, "SECONDS", 3600.0)
    fit(base, tmp_path / "quiet", trainer__max_epochs=2, trainer__enable_progress_bar=True)
    lines = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch ")]
    assert lines == ["Epoch 0: 1/3", "Epoch 0: 3/3", "Epoch 1: 3/3"]


def test_a_short_run_logs_every_step(tmp_path):
    base = tmp_path / "base"
    write_checkpoint(base / "model")
    write_rows(base / "data", 4, "train.jsonl")
    fit(base, tmp_path / "out", data__val=None, trainer__log_every_n_steps=10, trainer__max_epochs=2)
    assert len(scalars(tmp_path / "out", "train/loss")) == 2


def test_clock():
    assert [clock(s) for s in (5, 65.4, 3600 + 62, 100_000)] == ["0:00:05", "0:01:05", "1:01:02", "1 d 03:46"]
