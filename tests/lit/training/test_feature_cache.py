"""Training with kept features is the same training, without the tower and without pixels."""

import json
from collections import Counter

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its first import: not one test's own)
import pytest
import torch

from ivl.__main__ import main
from ivl.data.media import feature_store as features
from ivl.data.media import load as media
from ivl.model.vision import InternViT
from tests.lit.rows import write_rows
from tests.lit.test_runs import config, fit, losses
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_rows(folder / "data")
    write_rows(folder / "data", 2, "val.jsonl")
    return folder


FROZEN = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 4}}


@pytest.mark.parametrize("mlp1", ["frozen", pytest.param("full", marks=pytest.mark.slow)])
def test_the_same_losses_and_weights_cold_warm_and_without(base, tmp_path, monkeypatch, capsys, mlp1):
    options = {"model__tune": FROZEN | {"mlp1": mlp1}, "data__val": None, "trainer__max_epochs": 2}
    kept = {"data__feature_cache": str(tmp_path / "cache"), **options}
    wanted = fit(base, tmp_path / "without", **options)
    monkeypatch.setattr(features, "SETTLED", -1e9)  # pictures are as new as this test
    calls = []
    plain = InternViT.forward
    monkeypatch.setattr(InternViT, "forward", lambda self, *a: calls.append(1) or plain(self, *a))
    cold = fit(base, tmp_path / "cold", **kept)
    batches = len(losses(tmp_path / "cold"))
    assert 0 < len(calls) < batches, "the second epoch runs the tower no more"
    assert len(list((tmp_path / "cache").glob("*/*/*.safetensors"))) == 4  # pictures
    calls.clear()

    def refuse(*args):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(media, "load_image", refuse)
    monkeypatch.setattr(media, "image_bytes", refuse)  # not even to know which picture it is
    warm = fit(base, tmp_path / "warm", **kept)
    assert not calls
    for name, tensor in wanted.items():
        torch.testing.assert_close(cold[name], tensor, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(warm[name], tensor, atol=1e-6, rtol=1e-5)
    assert losses(tmp_path / "warm") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_packs_and_loader_processes_take_features_too(base, tmp_path):
    options = {"model__tune": FROZEN, "data__val": None, "data__packing": True, "data__pack_tokens": 400}
    wanted = fit(base, tmp_path / "without", **options)
    options |= {"data__feature_cache": str(tmp_path / "cache"), "data__num_workers": 1}
    for name in ("cold", "warm"):
        found = fit(base, tmp_path / name, **options)
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_other_weights_and_other_tiles_find_nothing(base, tmp_path):
    options = {"model__tune": FROZEN, "data__val": None, "data__feature_cache": str(tmp_path / "cache")}
    fit(base, tmp_path / "a", **options)
    fit(base, tmp_path / "b", **options, data__max_tiles=2)
    write_checkpoint(tmp_path / "model", seed=1)
    fit(base, tmp_path / "c", **options, model__pretrained=str(tmp_path / "model"))
    folders = (path.parent.parent for path in (tmp_path / "cache").glob("*/*/*.safetensors"))
    assert sorted(Counter(folders).values()) == [4, 8]


@pytest.mark.slow
def test_a_damaged_file_is_made_again(base, tmp_path):
    options = {"model__tune": FROZEN, "data__val": None, "data__feature_cache": str(tmp_path / "cache")}
    wanted = fit(base, tmp_path / "a", **options)
    path = next((tmp_path / "cache").glob("*/*/*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    found = fit(base, tmp_path / "b", **options)
    assert path.read_bytes() == whole
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
def test_a_full_cache_goes_on_computing(base, tmp_path):
    options = {"model__tune": FROZEN, "data__val": None}
    wanted = fit(base, tmp_path / "without", **options)
    options |= {"data__feature_cache": str(tmp_path / "cache"), "data__feature_cache_gb": 5e-6}
    found = fit(base, tmp_path / "full", **options)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) <= 5000
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_tower_that_trains_is_refused(base, tmp_path, capsys):
    path = config(base, tmp_path, data__feature_cache=str(tmp_path / "cache"))
    assert main(["fit", "--config", str(path)]) == 2
    assert "--data.feature_cache: the vision encoder trains" in capsys.readouterr().err


def test_videos_are_computed_each_time(base, tmp_path):
    from PIL import Image

    for n in range(3):
        (tmp_path / "clip").mkdir(exist_ok=True)
        Image.new("RGB", (56, 56), (n * 40, 0, 0)).save(tmp_path / f"clip/{n}.png")
    rows = [{"query": "<video>\nWhat?", "response": "red", "videos": ["clip"]}]
    rows += [{"query": "<image>?", "response": "a", "images": [str(base / "data/0.png")]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model__tune": FROZEN, "data__val": None, "data__train": str(tmp_path / "train.jsonl")}
    wanted = fit(base, tmp_path / "without", **options)
    for name in ("cold", "warm"):
        found = fit(base, tmp_path / name, **options, data__feature_cache=str(tmp_path / "cache"))
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-5)
    assert len(list((tmp_path / "cache").glob("*/*/*.safetensors"))) == 1
