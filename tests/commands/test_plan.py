"""`python -m ivl plan`: from a fit's own options, with nothing made and nothing read but lengths."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from ivl.__main__ import main as command
from ivl.__main__ import run_command
from ivl.architecture.families import find_model
from ivl.commands.export import export
from ivl.commands.plan import _size, checkpoint_config, report, rows_of, setup_of
from ivl.estimate import flops
from ivl.estimate.memory import memory_needed
from ivl.estimate.training_step import BatchShape, ShallowModel, TrainSetup
from ivl.lit.cli import read
from ivl.lit.datamodule import IvlData
from ivl.options import LoRA, Tune
from ivl.types import UserError
from tests.lit.rows import write_pairs, write_rows
from tests.lit.test_runs import config
from tests.tiny import write_checkpoint

REPO = Path(__file__).resolve().parents[2]
main = partial(run_command, "plan")
CONFIG = str(REPO / "configs/internvl2_2b.yaml")


def test_a_released_model_on_a_device(capsys):
    main(["--config", CONFIG, "--device", "H100-80GB", "--json"])
    plan = json.loads(capsys.readouterr().out)
    total = sum(p["parameters"] - p["trainable"] for p in plan["parts"].values())
    assert total == find_model("internvl2-2b").parameters
    assert plan["parts"]["vision_model"]["trainable"] == 0 < plan["parts"]["language_model"]["trainable"]
    assert 5e9 < plan["memory"]["total"] < 12e9
    assert (plan["batch"]["length"], plan["batch"]["tiles"], plan["batch"]["accumulate"]) == (4096, 15, 16)
    assert plan["batch"]["packed"]
    assert plan["rows"].endswith("since no --data.train is given")
    assert plan["flops_per_step"]["computed"] > plan["flops_per_step"]["model"]
    assert plan["device"]["step_seconds"] > 0


def test_a_mixture_of_experts_says_what_a_token_uses(capsys):
    main(["--config", str(REPO / "configs/internvl3_5_30b_a3b.yaml"), "--json"])
    plan = json.loads(capsys.readouterr().out)
    released = find_model("internvl3_5-30b-a3b")
    assert plan["idle_parameters"] == released.parameters - released.active_parameters > 25e9
    total = sum(p["parameters"] for p in plan["parts"].values())
    assert f"for one token   {total - plan['idle_parameters']:>16,}" in report(plan)


def test_a_folder_in_either_layout(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", "Qwen3ForCausalLM")
    folder = export(str(tmp_path / "hf"), base=str(base), layout="hf")
    plans = []
    for pretrained in (base, folder):
        capsys.readouterr()
        main(["--config", CONFIG, "--model.pretrained", str(pretrained), "--json"])
        plans.append(json.loads(capsys.readouterr().out)["parts"])
    assert plans[0]["vision_model"] == plans[1]["vision_model"]


def test_what_does_not_fit_says_what_would(capsys):
    full = ["--config", CONFIG, "--config", str(REPO / "configs/tune/full.yaml")]
    with pytest.raises(UserError, match=r"does not fit: about [\d.]+ GB .* it would fit with .*configs/tune/lora.yaml"):
        main([*full, "--memory", "16GB"])
    assert "memory of one device, estimated" in capsys.readouterr().out


def test_what_need_not_be_computed_again_is_said(capsys):
    def faster(*options: str) -> str | None:
        return planned(["--config", CONFIG, *options], capsys)["faster"]

    found = faster("--memory", "24GB")
    option, other = "--model.checkpointing.language_model", "--model.checkpointing.vision_model"
    assert found.startswith(f"{option} false fits as well: ") and found.endswith(" % fewer operations")
    memory, saved = (float(n) for n in re.findall(r"([\d.]+) (?:GB|%)", found))
    without = planned(["--config", CONFIG, option, "false", "--memory", "24GB"], capsys)
    assert without["faster"] is None
    assert without["memory"]["total"] == pytest.approx(memory * 1e9, abs=1e7)
    again = planned(["--config", CONFIG, "--memory", f"{memory - 0.1}GB"], capsys)
    assert again["faster"] is None and again["memory"]["total"] < 1e9 * memory
    share = without["flops_per_step"]["computed"] / again["flops_per_step"]["computed"]
    assert saved == pytest.approx(100 * (1 - share), abs=0.5)
    full = ("--config", str(REPO / "configs/tune/full.yaml"), other, "true")
    assert faster(*full, "--memory", "500GB").startswith(f"{option} false {other} false fits")
    main(["--config", CONFIG, "--memory", "24GB"])
    assert f"faster: {found}" in capsys.readouterr().out
    assert planned(["--config", CONFIG], capsys).get("faster") is None  # how much there is was not said


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_rows(folder / "data", 18)
    write_rows(folder / "data", 5, "val.jsonl")
    return folder


def planned(argv: list[str], capsys) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_rows_at_hand_are_read(base, tmp_path, packed, capsys):
    settings = {"data__packing": True, "data__pack_tokens": 1200, "data__video": {"num_segments": 3}}
    settings = settings if packed else {"data__batch_size": 4, "data__report": str(tmp_path / "left_out.txt")}
    path = config(base, tmp_path, data__val=None, data__on_error="skip", trainer__max_epochs=1, **settings)
    plan = planned(["--config", str(path)], capsys)
    rows = list(
        IvlData(str(base / "model"), train=str(base / "data/train.jsonl"), num_workers=0).training_index().records
    )
    tokens, tiles, supervised = ([int(row[name]) for row in rows] for name in ("tokens", "tiles", "supervised"))
    assert plan["rows"] == f"read: 18 rows, {sum(tokens)} tokens, {sum(tiles)} tiles"
    assert not (tmp_path / "left_out.txt").exists()
    batch, epoch = plan["batch"], plan["epoch"]
    assert epoch["tokens"] == sum(tokens)
    assert command(["fit", "--config", str(path)]) == 0
    steps = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    if packed:
        assert (batch["rows"], batch["length"], batch["packed"]) == (1, 1200, True)
        assert epoch["steps"] == pytest.approx(steps, abs=1)
    else:
        assert (batch["rows"], batch["length"], batch["tiles"]) == (4, max(tokens), sum(sorted(tiles)[-4:]))
        assert batch["supervised"] == -(-4 * sum(supervised) // 18)
        assert epoch["steps"] == steps == 5


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_both_answers_of_a_pair_are_counted(base, tmp_path, packed, capsys):
    path = write_pairs(base / "data", 8, "pairs.jsonl")
    data = IvlData(str(base / "model"), train=str(path), num_workers=0, max_length=300)
    data.learn_pairs()
    index = data.training_index()
    settings = {"data__packing": True, "data__batch_size": None} if packed else {"data__batch_size": 2}
    changes = {"data__train": str(path), "data__val": None, "data__max_length": 300, **settings}
    tune = {"vision_model": "frozen", "mlp1": "frozen", "language_model": {"rank": 4}}
    argv = ["--config", str(config(base, tmp_path, **changes, model__tune=tune, model__objective={"mpo": {}}))]
    plan = planned(argv, capsys)
    computed = [-(-(int(row["tokens"]) + int(row["supervised"])) // 2) for row in index.records]  # the prompt once
    total = sum(computed)
    tiles = int(index.tiles.sum())
    assert plan["rows"] == f"read: 8 pairs, {total} tokens of prompts and both answers, {tiles} tiles"
    assert plan["epoch"]["tokens"] == total < int(index.tokens.sum())
    if packed:
        assert plan["epoch"]["steps"] == -(-int(index.tokens.sum()) // (0.95 * 600))
        assert 300 < plan["batch"]["length"] < 600
    else:
        most = sum(sorted(index.tiles.tolist())[-2:])
        assert [plan["batch"][name] for name in ("rows", "length", "tiles")] == [2, max(computed), most]
        assert plan["epoch"]["steps"] == 4
    live = plan["reference"]
    work = flops.Work(0, total, sum(n * n for n in computed), int(index.supervised.sum()))
    forward = flops.forward_costs(checkpoint_config(str(base / "model")), TrainSetup(Tune(language_model=LoRA(4))))
    assert live["how"] == "live" and live["flops_per_epoch"] == pytest.approx(forward.total(work), rel=1e-6)
    assert "the reference: a forward without the LoRA in each batch" in report(plan)
    if not packed:
        stored = planned([*argv, "--model.tune.mlp1", "full"], capsys)
        before = stored["reference"]["flops_before_training"]
        assert stored["reference"]["how"] == "stored" and before > forward.total(work), "the tower computes as well"
        assert "the reference: a forward of all rows once, before training" in report(stored)


def test_pairs_that_are_not_at_hand_are_assumed():
    def batch(*options: str) -> BatchShape:
        fit = read(["--config", CONFIG, "--data.max_length", "1000", *options])
        return rows_of(fit, checkpoint_config(fit.model.pretrained)).largest

    for size in (["--data.batch_size", "2"], []):
        answers, pairs = batch(*size), batch(*size, "--model.objective", "{mpo: {}}")
        assert (pairs.rows, pairs.tiles) == (answers.rows, answers.tiles), "two answers share their tiles"
        assert pairs.supervised == 2 * answers.supervised
        assert pairs.length == answers.length + answers.supervised // answers.rows > 1000
    assert 2000 < batch("--model.objective", "{dpo: {}}", "--data.pack_tokens", "4000").length < 4000


def test_an_adapter_that_goes_on_is_kept_as_it_began(base):
    argv = ["--config", CONFIG, "--model.objective", "{mpo: {}}", "--model.pretrained", str(base / "model")]
    setups = [setup_of(read([*argv, *more]), 1, False) for more in ([], ["--model.adapter", "DIR"])]
    assert [setup.keeps_start for setup in setups] == [False, True]
    sketches = [ShallowModel(checkpoint_config(str(base / "model")), setup) for setup in setups]
    fresh, going_on = (memory_needed(sketch, BatchShape(1, 64, 0, 8)).buffers for sketch in sketches)
    trained = sum(part.trainable for part in sketches[0].parameters().values())
    assert going_on - fresh == 8 * trained > 0


def test_why_rows_are_assumed(base, tmp_path, capsys):
    model = ["--model.pretrained", str(base / "model")]
    here, gone = str(base / "data/train.jsonl"), str(tmp_path / "gone.jsonl")
    for argv, why in (
        (["--data.train", here], "OpenGVLab/InternVL2-2B is not a folder here, and lengths need its tokenizer"),
        (["--data.train", f"[{here}, {gone}]", *model], f"{gone} is not a file here"),
        (["--data.train", "coco-en-2-mini", *model], "coco-en-2-mini is not a file"),
    ):
        assert f"since {why}" in planned(["--config", CONFIG, *argv], capsys)["rows"]


def test_layers_over_devices(base, tmp_path, capsys):
    argv = ["--config", str(config(base, tmp_path)), "--config", str(REPO / "configs/strategy/layer_split.yaml")]
    named = ["--trainer.strategy.devices", "[cpu, cpu, cpu]"]
    sized = ["--trainer.strategy.device_max_memory", "[15GB, 15GB, 15GB, 15GB]"]
    for more, count in (([], 2), (["--devices", "5"], 5), (named, 3), (sized, 4)):
        plan = planned([*argv, *more], capsys)
        assert (plan["strategy"], plan["devices"]) == ("layer_split", count)
    alone = planned(argv[:2], capsys)
    assert plan["memory"]["total"] < alone["memory"]["total"]
    assert plan["tokens_per_step"] == alone["tokens_per_step"]


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("80GiB", 80 * 2**30), ("16", 16e9), ("500 MB", 5e8)])
def test_sizes(text: str, size: float):
    assert _size(text) == size


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memory", "many"], "expected a size"),
        (["--device", "GTX-1"], "--device: 'GTX-1' is not known"),
        (["--model.pretrained", "nobody/nothing"], "neither a folder nor a released model"),
    ],
)
def test_mistakes(argv: list[str], message: str):
    with pytest.raises(UserError, match=message):
        main(["--config", CONFIG, *argv])
