"""Reproduction of a run: the printed command gives the same weights, and what changed since is named."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import ivl
from ivl.__main__ import main
from ivl.lit.run.record import without_secrets
from tests.lit.conftest import base  # noqa: F401  (a fixture)
from tests.lit.test_runs import config


@pytest.fixture
def run(base, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A fitted run, whose config names its rows from the folder it ran in."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "val.jsonl"):
        Path(name).write_bytes((base / "data" / name).read_bytes())
    paths = {"data__train": "train.jsonl", "data__val": "val.jsonl", "data__media_root": str(base / "data")}
    path = config(base, tmp_path, **paths)
    assert main(["fit", "--config", str(path), "--model.tune.language_model", "{rank: 2}"]) == 0
    return tmp_path / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_the_printed_command_gives_the_same_weights(run, tmp_path, monkeypatch, capsys):
    capsys.readouterr()
    assert main(["reproduce", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "seed 1, 1 process on cpu" in printed and "nothing has changed since" in printed
    (command,) = [line for line in printed.splitlines() if line.startswith("  python -m ivl fit")]
    assert "--model.tune.language_model" in printed.partition("# typed: ")[2]
    assert main(shlex.split(command)[3:]) == 0
    first, again = weights(run), weights(run.with_name("run-1"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    monkeypatch.chdir(moved)
    capsys.readouterr()
    assert main(["reproduce", "run"]) == 0, "rows are found where it stands now"
    told, command, *_ = (line.strip() for line in capsys.readouterr().out.partition("\n\n")[2].splitlines())
    assert told == f"# its folder {tmp_path} is gone; run it where the paths of its config start"
    assert Path(shlex.split(command)[5]).is_file()


def test_what_changed_since_is_named(run, base, tmp_path, monkeypatch, capsys):  # noqa: F811
    file = run / "versions.json"
    record = json.loads(file.read_text())
    assert record["rows"] == {"train.jsonl": 12, "val.jsonl": 5}
    assert record["versions"]["ivl"] == ivl.__version__, "of the code that ran, whatever was installed"
    record["versions"]["torch"], record["base"]["digest"] = "1.0", "0" * 32
    file.write_text(json.dumps(record))
    with open("train.jsonl", "a") as rows:
        rows.write('{"query": "a", "response": "b"}\n')
    Path("val.jsonl").unlink()
    monkeypatch.chdir(tmp_path.parent)  # paths of the config start where the fit ran
    capsys.readouterr()
    assert main(["reproduce", str(run / "checkpoints/last.ckpt")]) == 1
    printed = capsys.readouterr().out
    assert f"  cd {tmp_path}\n" in printed and "4 changes since" in printed
    changed = {line.split()[0]: line for line in printed.splitlines() if line and "the same" not in line}
    assert "12 rows, " in changed["train.jsonl"] and "13 rows, " in changed["train.jsonl"]
    assert changed["val.jsonl"].endswith("missing") and changed["base"] and changed["torch"].split()[1] == "1.0"
    (base / "model").rename(base / "moved")
    try:
        assert main(["reproduce", str(run)]) == 1
    finally:
        (base / "moved").rename(base / "model")
    assert any(line.startswith("base") and line.endswith("missing") for line in capsys.readouterr().out.splitlines())


def test_of_a_run_of_an_earlier_version_what_it_recorded_is_compared(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"seed_everything": 3, "model": {"pretrained": "internvl2-2b"}})
    )
    assert main(["reproduce", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "internvl2-2b, seed 3" in printed and "nothing to compare" in printed
    (tmp_path / "versions.json").write_text('{"versions": {"torch": "2.6"}, "data": {"a.jsonl": "00"}}')
    assert main(["reproduce", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "2 changes since" in printed and "a.jsonl" in printed
    assert f"fit --config {tmp_path / 'config.yaml'}" in printed


@pytest.mark.parametrize("damaged", ["{", "[]"])
def test_a_damaged_record_is_one_line(tmp_path, capsys, damaged):
    (tmp_path / "config.yaml").write_text("model: {pretrained: internvl2-2b}")
    (tmp_path / "versions.json").write_text(damaged)
    assert main(["reproduce", str(tmp_path)]) == 2
    assert f"error: {tmp_path / 'versions.json'}: " in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["reproduce", str(tmp_path / "gone")]) == 2
    assert "no config.yaml in it; expected the folder of a run" in capsys.readouterr().err


def test_secrets_of_the_command_line_are_not_recorded():
    argv = [
        "fit",
        "--trainer.logger.init_args.api_key",
        "abc",
        "--x.TOKEN=def",
        "--data.train",
        "a",
        "--password",
        "--y",
    ]
    assert without_secrets(argv) == [
        *("fit", "--trainer.logger.init_args.api_key", "...", "--x.TOKEN=...", "--data.train", "a"),
        *("--password", "..."),
    ]  # fmt: skip
