"""Whole runs with compiled layers: the same losses, the same checkpoints, gone on with either way."""

import shutil

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its first import: not one test's own)
import pytest
import torch

from tests.lit.rows import write_rows
from tests.lit.test_runs import fit, losses
from tests.tiny import write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"),
]

TUNES = {
    "full": {"vision_model": "full", "mlp1": "full", "language_model": "full"},
    "lora": {"vision_model": "frozen", "mlp1": "full", "language_model": {"rank": 4, "dropout": 0.0}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_rows(folder / "data", 24)
    write_rows(folder / "data", 2, "val.jsonl")
    return folder


@pytest.mark.parametrize("tune", TUNES)
def test_a_compiled_run_is_the_same_run(base, tmp_path, tune):
    options = {
        "model__tune": TUNES[tune],
        "model__checkpointing": {"vision_model": tune == "full", "language_model": tune == "lora"},
        "data__packing": True,
        "data__pack_tokens": 600,
    }
    whole = fit(base, tmp_path / "plain", **options, trainer__max_epochs=2)
    compiled = fit(base, tmp_path / "compiled", **options, trainer__max_epochs=2, model__compile=True)
    assert compiled.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-5, rtol=1e-5)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    # An epoch compiled, the next not.
    fit(base, tmp_path / "parts", **options, model__compile=True, trainer__limit_train_batches=1.0)
    checkpoint = tmp_path / "first.ckpt"
    shutil.copy(tmp_path / "parts/run/checkpoints/last.ckpt", checkpoint)
    shutil.rmtree(tmp_path / "parts")
    resumed = fit(base, tmp_path / "parts", "--ckpt_path", str(checkpoint), **options, trainer__max_epochs=2)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=1e-5)
