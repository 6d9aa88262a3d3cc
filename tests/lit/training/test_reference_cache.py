"""Preference runs in which more than a LoRA trains: the reference computed once, kept on disk, and equal to a second
model."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ivl.__main__ import main
from ivl.data.index.index_build import fingerprint
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.data.sets.reference_store import KEY, ReferenceStore, indexed
from ivl.finetune import tune as tuning
from ivl.lit.training.reference_cache import check_strategy, share
from ivl.model.internvl import InternVL
from ivl.options import Tune
from ivl.types import UserError
from tests.finetune.record_trl import trl_inputs
from tests.lit.processes import finished, ranks
from tests.lit.test_runs import REPO, config, scalars
from tests.lit.training.test_preference import LOGGED, assert_equal, fit, settings, state
from tests.tiny import write_checkpoint

FULL = {"vision_model": "full", "mlp1": "full", "language_model": "full"}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
SEEN = ("train/loss", "train/rewards/margin", "train/kl")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Folder of the references of one test, which begins without any."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ivl/reference"


def caching_in(folder: str) -> None:
    """For `prepare` of processes, whose environment is older than the test's."""
    os.environ["XDG_CACHE_HOME"] = folder


def counts(printed: str) -> list[tuple[int, int]]:
    """Pairs whose numbers were on disk, and all pairs, of each file of rows."""
    return [(int(a), int(b)) for a, b in re.findall(r"log-probabilities of (\d+) of (\d+) pairs", printed)]


@pytest.fixture
def printed(caplog):
    """Counts of the reference's numbers that were logged since the last call."""
    caplog.set_level("INFO")

    def read() -> list[tuple[int, int]]:
        text = "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return counts(text)

    return read


def full(**changes) -> dict:
    return settings(model__tune=FULL, model__optimizer=SGD, **changes)


def seen(root: Path) -> dict[str, list[float]]:
    return {name: scalars(root, name) for name in SEEN}


@pytest.mark.parametrize("packing", [False, True])
def test_stored_numbers_are_the_live_reference_s(base, tmp_path, cache, packing):
    """A LoRA can have both. With SGD, as Adam turns a last bit into a step."""
    changes = {"model__optimizer": SGD, "data__batch_size": None if packing else 2, "data__packing": packing}
    objective = {"mpo": {}}
    live = fit(base, tmp_path / "live", **changes, model__objective=objective)
    stored = fit(base, tmp_path / "stored", **changes, model__objective=objective | {"reference": "stored"})
    assert len(list(cache.glob("*/*.npy"))) == 1
    assert_equal(stored, live, atol=1e-6)
    for name, values in seen(tmp_path / "live").items():
        assert seen(tmp_path / "stored")[name] == pytest.approx(values, abs=1e-6)


def test_full_tuning_is_dpo_against_a_second_model(base, tmp_path, cache):
    """The second model is transformers' own, which this program does without."""
    from transformers import AutoModelForImageTextToText

    from ivl.commands.export import export

    changes = {"model__objective": {"dpo": {"beta": 0.5}}, "model__optimizer__init_args__lr": 0.001}
    trained = fit(base, tmp_path, **full() | changes | {"data__batch_size": 8})
    hf = export(str(tmp_path / "model-hf"), base=str(base / "model"), layout="hf")
    reference = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32)
    processor, policy = Processor.from_pretrained(base / "model"), InternVL.from_pretrained(base / "model")
    processor.pairs = True
    rows = RowDataset(base / "data/train.jsonl", processor)
    batch = processor.collate([rows[n] for n in range(8)])
    inputs = trl_inputs(batch)
    mask = inputs.pop("completion_mask")[:, 1:]
    words_known = policy.language_model.lm_head.out_features  # the hf layout has one more, `<video>`
    with torch.no_grad():
        logits = reference(**inputs).logits[..., :words_known].log_softmax(-1)
    words = inputs["input_ids"][:, 1:, None]
    base_chosen, base_rejected = (logits[:, :-1].gather(-1, words)[..., 0] * mask).sum(1).view(2, -1)
    tuning.apply(policy, Tune(**FULL))
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.001)
    losses = []
    for _ in range(2):
        chosen, rejected = -policy(**batch).row_losses.view(-1, 2).T
        margin = (chosen - base_chosen) - (rejected - base_rejected)
        loss = torch.nn.functional.softplus(-0.5 * margin).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert scalars(tmp_path, "train/loss") == pytest.approx(losses, abs=2e-5) and losses[1] < losses[0] - 0.01
    weights = dict(policy.named_parameters())
    assert len(trained["state_dict"]) == sum(p.requires_grad for p in weights.values())
    for name, tensor in trained["state_dict"].items():
        torch.testing.assert_close(weights[name.removeprefix("model.")].data, tensor, atol=1e-5, rtol=1e-4)


def test_a_projector_beside_a_lora_is_compared_with_the_model_before_training(base, tmp_path, cache):
    tune = {"vision_model": "frozen", "mlp1": "full", "language_model": {"rank": 4}}
    fit(base, tmp_path, model__tune=tune, trainer__max_epochs=1, data__batch_size=4)
    first, last = scalars(tmp_path, "train/rewards/margin")
    assert first == pytest.approx(0, abs=1e-5) and last > 1e-3


def test_a_cut_run_goes_on_bit_for_bit_and_finds_the_numbers(base, tmp_path, cache, printed):
    changes = {"model__tune": FULL, "data__val": str(base / "data/val.jsonl"), "model__answer_rows": 0}
    whole = fit(base, tmp_path / "whole", **changes)
    assert printed() == [(0, 8), (5, 5)], "the held-out rows are among the others"
    saved = str(next((tmp_path / "whole/run/checkpoints").glob("epoch=0-step=2*.ckpt")))
    again = fit(base, tmp_path / "again", "--ckpt_path", saved, **changes)
    assert printed() == [(8, 8), (5, 5)]
    assert_equal(again, whole)
    shutil.rmtree(cache)  # the model is the untouched one also where a checkpoint is read later
    without = fit(base, tmp_path / "without", "--ckpt_path", saved, **changes)
    assert printed() == [(0, 8), (5, 5)]
    assert_equal(without, whole)
    argv = ["--ckpt_path", str(tmp_path / "whole/run/checkpoints/last.ckpt"), *LOGGED]
    assert main(["validate", "--config", str(tmp_path / "whole/config.yaml"), *argv]) == 0
    held_out = scalars(tmp_path / "whole", "val/rewards/margin")
    assert held_out[-1] != held_out[0] and printed() == [(5, 5)]


def test_numbers_are_found_by_the_content_of_rows_pictures_and_weights(base, tmp_path, cache, printed, capsys):
    shutil.copytree(base / "data", tmp_path / "data")
    path = tmp_path / "data/train.jsonl"

    def run(name: str, **more) -> tuple[int, int]:
        fit(base, tmp_path / name, **full(data__train=str(path), trainer__max_epochs=1, data__batch_size=8, **more))
        return printed()[0]

    assert run("first") == (0, 8)
    with open(path, "a") as out:
        out.write(json.dumps({"query": "How?", "response": "so", "rejected_response": "not so"}) + "\n")
    Image.new("RGB", (56, 120)).save(tmp_path / "data/0.png")
    assert run("changed") == (6, 9), "two rows show the picture"
    damaged = max(cache.glob("*/*.npy"), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert run("damaged")[0] < 9
    assert "is damaged; its log-probabilities are computed again" in capsys.readouterr().err
    assert scalars(tmp_path / "damaged", "train/loss") == scalars(tmp_path / "changed", "train/loss")
    assert run("another", model__pretrained=str(write_checkpoint(tmp_path / "model", seed=5))) == (0, 9)


def test_a_limit_of_tiles_makes_other_numbers(base):
    names = set()
    for tiles in (1, 2):
        processor = Processor.from_pretrained(base / "model", max_tiles=tiles)
        processor.pairs = True
        names.add(fingerprint(processor))
        rows = RowDataset(base / "data/train.jsonl", processor, max_tiles=tiles)
        names |= set(indexed(rows)[0].tolist())
    assert len(names) == 2 + 2 * 8


def test_a_pair_that_cannot_be_read_is_left_out(base, tmp_path, cache):
    shutil.copytree(base / "data", tmp_path / "data")
    (tmp_path / "data/3.png").write_bytes((tmp_path / "data/3.png").read_bytes()[:200])  # its header is whole
    changes = {"data__train": str(tmp_path / "data/train.jsonl"), "data__on_error": "skip", "data__batch_size": 4}
    fit(base, tmp_path, **full(**changes, trainer__max_epochs=1, data__max_bad=0.5))
    (numbers,) = (np.load(path) for path in cache.glob("*/*.npy"))
    assert len(numbers) == 6


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(base, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fit(base, tmp_path, **full(trainer__max_epochs=1))
    assert len(scalars(tmp_path, "train/loss")) == 4


def test_the_store_keeps_what_is_finite(tmp_path):
    store = ReferenceStore("model", tmp_path)
    keys = np.array(["a" * 32, "b" * 32, "c" * 32], KEY)
    store.add(keys, np.array([[1, 2], [np.nan, 1], [3, 4]], np.float32))
    store.add(keys[1:2], np.array([[np.inf, 1]], np.float32))
    np.testing.assert_array_equal(store.read(keys[::-1]), [[3, 4], [np.nan, np.nan], [1, 2]])
    assert len(list(tmp_path.rglob("*.npy"))) == 1 and store.read(keys[:0]).shape == (0, 2)


def test_keys_follow_selected_rows(base):
    processor = Processor.from_pretrained(base / "model")
    processor.pairs = True
    rows = RowDataset([base / "data/train.jsonl", base / "data/val.jsonl"], processor)
    keys, index = indexed(rows)
    numbers = np.array([11, 2, 9])
    some, part = indexed(rows.select(numbers))
    assert list(some) == list(keys[numbers]) and list(part.tokens) == list(index.tokens[numbers])
    assert len(set(keys)) == 8 and list(keys[8:]) == list(keys[:5]), "rows of the same content have the same key"


def test_every_process_has_as_many_batches():
    batches = [[0], [1], [2], [3], [4]]
    assert [share(batches, rank, 3) for rank in range(3)] == [[[0], [3]], [[1], [4]], [[2], [0]]]
    assert share(batches[:1], 1, 2) == [[0]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "tune"), [("ddp", FULL), ("fsdp2", FULL), ("fsdp2", FULL | {"language_model": {"rank": 4}})]
)
def test_two_processes_are_one(base, tmp_path, cache, strategy, tune):
    changes = {"model__optimizer__init_args__lr": 0.01, "data__val": str(base / "data/val.jsonl")}
    changes |= {"model__answer_rows": 0, "model__tune": tune}
    one = fit(base, tmp_path / "one", **full() | changes | {"data__batch_size": 2})
    numbers = {path: path.read_bytes() for path in cache.glob("*/*.npy")}
    shutil.rmtree(cache)
    path = config(base, tmp_path / "two", **full() | changes | {"data__batch_size": 1})
    argv = ["fit", "--config", str(path), "--config", str(REPO / f"configs/strategy/{strategy}.yaml")]
    finished(ranks(argv, tmp_path / "two", prepare=partial(caching_in, str(tmp_path / "cache"))), tmp_path / "two")
    assert scalars(tmp_path / "two", "train/loss") == pytest.approx(scalars(tmp_path / "one", "train/loss"), abs=1e-4)
    assert_equal(state(tmp_path / "two"), one, atol=1e-4)
    assert {path.parent for path in numbers} == {path.parent for path in cache.glob("*/*.npy")}, "one name of the model"
    assert len(list(cache.glob("*/*.npy"))) == 2 * len(numbers), "each process made its share"
    log = (tmp_path / "two/rank0.log").read_text()
    assert counts(log) == [(0, 8), (5, 5)]


@pytest.mark.slow
def test_an_adapter_goes_on_under_a_strategy_that_splits_the_model(base, tmp_path, cache):
    fit(base, tmp_path / "sft", model__objective="sft")
    changes = {"model__adapter": str(tmp_path / "sft/run/adapter"), "model__tune": None, "model__optimizer": SGD}
    one = fit(base, tmp_path / "one", **changes)
    path = config(base, tmp_path / "two", **settings(**changes, data__batch_size=1))
    argv = ["fit", "--config", str(path), "--config", str(REPO / "configs/strategy/fsdp2.yaml")]
    finished(ranks(argv, tmp_path / "two"), tmp_path / "two")
    assert_equal(state(tmp_path / "two"), one, atol=1e-4)
    assert scalars(tmp_path / "two", "train/rewards/chosen")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__video": {"sample": "random"}}, "data.video.sample: random takes other frames in each epoch"),
        (
            {"model__objective": {"dpo": {}, "reference": "live"}},
            "model.objective.reference: live is the model without",
        ),
    ],
)
def test_what_stays_refused_says_why(base, tmp_path, capsys, changes, message):
    assert main(["fit", "--config", str(config(base, tmp_path, **full(**changes)))]) == 2
    assert message in capsys.readouterr().err


def test_a_strategy_that_splits_the_model_later_is_refused():
    from lightning.pytorch.strategies import FSDPStrategy

    with pytest.raises(UserError, match="FSDPStrategy splits the model after the reference's log-probabilities are"):
        check_strategy(FSDPStrategy())
