"""The command line as a user meets it: help, every yaml, and one clear line for each mistake."""

import json
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its first import: not one test's own)
import pytest

from ivl.__main__ import COMMANDS, main
from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint

REPO = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
STACKED = sorted((REPO / "configs").glob("*/*.yaml"))


def test_help_of_the_top_command_is_instant():
    """Heavy imports are lazy: the best of three starts, as a busy machine slows any one."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ivl", "--help"], capture_output=True, text=True, cwd=REPO)
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
    assert min(seconds) < 2


def options(capsys, command: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help", "full"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_every_option_is_typed_and_documented(capsys, command):
    text = options(capsys, command)
    entries = text.split("\n  --")[1:]
    own = [e for e in entries if e.startswith(("model.", "data.", "predictions.", "demo"))]
    assert len(own) > 25
    for entry in own:
        name, *words = entry.split("\n\n")[0].split()
        if name.endswith(".help") or "CONFIG" in words[0]:
            continue
        text = " ".join(words)
        assert "type: " in text, entry
        assert len(text.split("type: ")[0].split()) > 3, f"{name} says too little: {text}"


def parse(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *argv, "--print_config"])
    out = capsys.readouterr()
    assert stop.value.code == 0, out.err
    return out.out


def test_the_yamls_are_found():
    assert {"demo.yaml", "internvl2_2b.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_accepted(capsys, path):
    assert "pretrained:" in parse(capsys, "--config", str(path))


@pytest.mark.parametrize("path", STACKED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_stacked_config_is_accepted_on_top_of_a_model(capsys, path):
    if "bitsandbytes" in path.read_text():
        pytest.importorskip("bitsandbytes")
    parse(capsys, "--config", str(REPO / "configs/internvl2_2b.yaml"), "--config", str(path))


# -- mistakes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_rows(folder / "data")
    return folder


def run(capsys, base: Path, tmp_path: Path, *argv: str) -> str:
    """Run fit on the tiny checkpoint; the one line of its error."""
    common = ["--model.pretrained", str(base / "model"), "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]
    common += ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    common += ["--data.num_workers", "0", "--data.batch_size", "1"]
    status = main(["fit", *common, *argv])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert status == 2, captured.err
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


def rows_file(tmp_path: Path, *rows) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = {"query": "Hi", "response": "Hello."}


def test_a_missing_image(capsys, base, tmp_path):
    path = rows_file(tmp_path, {"query": "<image>?", "response": "a", "images": ["nowhere.png"]})
    assert f"{path}:1: " in (line := run(capsys, base, tmp_path, "--data.train", path))
    assert "nowhere.png" in line


def test_a_truncated_jpeg(capsys, base, tmp_path):
    from PIL import Image

    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    path = rows_file(tmp_path, {"query": "<image>?", "response": "a", "images": ["cut.jpg"]})
    line = run(capsys, base, tmp_path, "--data.train", path)
    assert f"{path}:1: " in line and "cut.jpg" in line


def test_a_row_that_is_not_json(capsys, base, tmp_path):
    path = rows_file(tmp_path, GOOD, '{"query": "broken')
    assert f"{path}:2: " in run(capsys, base, tmp_path, "--data.train", path, "--trainer.max_steps", "2")


def test_marks_that_do_not_match_the_images(capsys, base, tmp_path):
    path = rows_file(tmp_path, {"query": "<image><image>?", "response": "a", "images": [str(base / "data/0.png")]})
    line = run(capsys, base, tmp_path, "--data.train", path)
    assert line == f"error: {path}:1: 2 <image> marks but 1 image; add the image or drop a mark"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_line_is_the_same_from_a_loader_process(capsys, base, tmp_path, workers):
    path = rows_file(tmp_path, {"query": "<image><image>?", "response": "a", "images": [str(base / "data/0.png")]})
    line = run(capsys, base, tmp_path, "--data.train", path, "--data.num_workers", workers)
    assert line == f"error: {path}:1: 2 <image> marks but 1 image; add the image or drop a mark"


def test_an_empty_data_set(capsys, base, tmp_path):
    path = rows_file(tmp_path)
    assert f"{path}: " in run(capsys, base, tmp_path, "--data.train", path)


def test_a_file_that_is_not_there(capsys, base, tmp_path):
    assert "nowhere.jsonl" in run(capsys, base, tmp_path, "--data.train", str(tmp_path / "nowhere.jsonl"))


def test_no_data_at_all(capsys, base, tmp_path):
    assert "--data.train" in run(capsys, base, tmp_path)


def test_an_unknown_option(capsys, base, tmp_path):
    line = run(capsys, base, tmp_path, "--data.train", "x", "--data.batchsize", "3")
    assert "batchsize" in line


def test_a_misspelt_key_inside_a_part(capsys, base, tmp_path):
    line = run(capsys, base, tmp_path, "--data.train", "x", "--model.tune.language_model", '{"rang": 4}')
    assert "rang" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_a_checkpoint_without_a_needed_file(capsys, base, tmp_path, name):
    import shutil

    shutil.copytree(base / "model", tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    path = rows_file(tmp_path, GOOD)
    line = run(capsys, base, tmp_path, "--data.train", path, "--model.pretrained", str(tmp_path / "model"))
    assert name in line and str(tmp_path / "model") in line


def test_an_unknown_command(capsys):
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err.startswith("error: fitt: no such command; expected one of fit, ")


def test_a_checkpoint_path_that_is_not_there(capsys):
    assert main(["predict", "--ckpt_path", "nowhere/last.ckpt"]) == 2
    assert "error: --ckpt_path nowhere/last.ckpt: no such file" in capsys.readouterr().err


def test_hub_and_token_are_options_of_every_command(capsys, monkeypatch, tmp_path):
    from ivl import hub

    asked = []
    monkeypatch.setattr(hub, "_settings", hub._HubSettings())
    monkeypatch.setattr(hub, "_cached_folder", lambda *a: None)
    for place in hub.HUBS:
        module = getattr(hub, place)
        monkeypatch.setattr(module, "lock", lambda _: tmp_path / "lock")
        monkeypatch.setattr(module, "download", lambda *a, place=place: asked.append((place, *a[:4])) or tmp_path)
    assert main(["export", "--hub", "modelscope", "--token=secret", "--base", "internvl2-2b", "--out", "x"]) == 2
    assert asked == [("modelscope", "OpenGVLab/InternVL2-2B", None, "secret", "")]
    argv = ["fit", "--model.pretrained", "internvl2-2b", "--data.train", "x.jsonl"]
    assert main([*argv, "--hub=huggingface", "--token", "other"]) == 2
    assert asked[1:] == [("huggingface", "OpenGVLab/InternVL2-2B", None, "other", "")]
    assert main(["models", "--hub", "nowhere"]) == 2
    assert "hub: expected one of huggingface, modelscope, found 'nowhere'" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_a_command_without_a_word():
    command = f"{sys.executable} -m ivl models | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("name")
