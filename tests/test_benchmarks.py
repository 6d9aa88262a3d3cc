"""Scripts of benchmarks/: a card's tables add up, and other frameworks take turns in a training step's."""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ivl.estimate import flops

ROOT = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = ["--device", "cpu", "--size", "tiny", "--compile", "no"]


@pytest.fixture
def script(monkeypatch):
    """Import a script, those beside it too, as where it is run."""
    monkeypatch.syspath_prepend(str(ROOT))

    def load(name):
        for module in (name, "models"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    yield load
    for module in ("gpu", "gpu_run", "gpu_peer", "train_step", "models"):
        sys.modules.pop(module, None)


def tables(printed):
    """Rows of all Markdown tables by their first cell: the number that another cell begins with, else its text."""
    found = {}
    for line in printed.splitlines():
        if line.startswith("| ") and "---" not in line:
            first, *cells = (cell.strip() for cell in line[1:].removesuffix("|").split("|"))
            found[first] = [float(m[0]) if (m := re.match(r"[\d.]+(e[+-]?\d+)?", c)) else c for c in cells]
    return found


# -- gpu.py ----------------------------------------------------------------------------------------------------------


def test_a_cards_tables_add_up(script, capsys):
    gpu = script("gpu")
    few = ["--tokens", "96", "--packs", "2", "--repeats", "1", "--answer", "3", "--side", "64", "--buffer", "0.001"]
    gpu.main([*CPU, *few])
    found = tables(capsys.readouterr().out)
    ceiling = max(row[0] for name, row in found.items() if name.startswith("product"))
    bandwidth = max(row[0] for name, row in found.items() if name.startswith("0.001 GB"))
    for name in ("with the tower", "features kept"):
        seconds, _, tokens, rows, operations, mfu, memory = found[name]
        assert mfu == pytest.approx(100 * operations / seconds / ceiling, rel=5e-3)
        assert tokens * seconds == pytest.approx(96, rel=5e-3) and 0.99 < rows * seconds < 2.01
        assert memory == "-"
    reached, _, bound, times, size, _ = next(row for name, row in found.items() if name.isdigit())
    assert bound == pytest.approx(bandwidth / size, rel=5e-3) and times == pytest.approx(bound / reached, rel=5e-3)
    config = gpu.size_of("tiny")
    llm, width = config.llm, config.llm["hidden_size"]
    block = width * (2 * width + 2 * llm["num_key_value_heads"] * 16 + 3 * llm["intermediate_size"] + 2)
    block += width + 2 * llm["num_key_value_heads"] * 16  # Qwen2's biases
    weights = llm["num_hidden_layers"] * block + width + width * llm["vocab_size"]
    assert size == pytest.approx(2 * weights / 1e9, rel=5e-3)


def test_packs_are_full_and_their_operations_those_of_their_rows(script):
    gpu = script("gpu")
    config, draw = gpu.size_of("internvl2-2b"), torch.Generator().manual_seed(0)
    batch = gpu.pack(config, 2048, draw)
    assert batch.num_tokens == batch.input_ids.shape[1] == 2048 and len(batch) > 1
    tiles, llm, width = int(batch.tiles_per_row.sum()), config.llm, config.llm["hidden_size"]
    assert len(batch.image_positions) == 256 * tiles == 256 * len(batch.tiles) > 0
    kept = gpu.with_features(batch, config)
    assert len(kept.tiles) == 0 and kept.features.shape == (tiles, 256, config.llm["hidden_size"])
    costs = flops.model_costs(config, gpu.TUNE)
    assert gpu.asked(costs, batch) - gpu.asked(costs, kept) == pytest.approx(tiles * costs.tile)
    # A frozen tower and projector: forward alone. 24 blocks of InternViT 300M, and the convolution of its patches.
    block = 2 * 1025 * (4 + 8) * 1024**2 + 4 * 1025**2 * 1024
    projector = 2 * 256 * width * (4096 + width)
    assert costs.tile == pytest.approx(24 * block + 2 * 1024 * 3 * 14**2 * 1024 + projector)
    # Frozen weights: forward, and their input's gradient. Attention: forward, and twice that. The rest is small.
    block = width * (2 * width + 2 * llm["num_key_value_heads"] * 128 + 3 * llm["intermediate_size"])
    linear = 4 * 2048 * block * 24
    attention = 12 * 2048 * sum(n * n for n in batch.lengths.tolist()) * 24
    assert gpu.asked(costs, kept) == pytest.approx(linear + attention, rel=0.05)


def test_what_does_not_fit_says_so_and_the_rest_goes_on(script, capsys, monkeypatch):
    gpu = script("gpu")
    answers = iter([None, [3.0, 1.0, 1.5]])

    def train(model, batches, args):
        if (seconds := next(answers)) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds

    monkeypatch.setattr(gpu, "train", train)
    monkeypatch.setattr(gpu, "card", lambda args: gpu.Card(1e9, 1e9))
    monkeypatch.setattr(gpu, "decoding", lambda *given: "| decoded |")
    gpu.main([*CPU, "--tokens", "96", "--packs", "3"])
    found = tables(capsys.readouterr().out)
    assert found["with the tower"][0] == "out of memory" and len(found["with the tower"]) == len(found["features kept"])
    seconds, least, tokens, _, operations, mfu, _ = found["features kept"]
    assert (seconds, tokens) == (0.5, 192) and least == pytest.approx(1 / 3, rel=1e-3)
    assert mfu == pytest.approx(100 * operations * 1e12 / 0.5 / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "said"), [(["--size", "internvl9"], "internvl9"), ([], "no GPU is found")], ids=["size", "no GPU"]
)
def test_what_cannot_be_measured_is_refused(script, capsys, monkeypatch, argv, said):
    gpu = script("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main([*(["--device", "cpu"] if argv else []), *argv])
    assert stop.value.code == 2 and said in capsys.readouterr().err


# -- video.py --------------------------------------------------------------------------------------------------------


def test_decoders_are_compared_frame_by_frame(script, tmp_path, monkeypatch, capsys):
    """A decoder that is one frame late shows other pictures, and one that fails stops no other."""
    video = script("video")
    clip = video.Clip("a.mp4", size=(64, 48), count=12)
    path = video.write(clip, tmp_path)

    class Late(video.PyAVReader):
        def read(self, indices):
            return super().read([min(i + 1, self.frames - 1) for i in indices])

    class Other(video.PyAVReader):
        def read(self, indices):
            return super().read(indices) ^ 1

    def broken(source):
        raise ValueError("no such codec")

    monkeypatch.setattr(
        video, "READERS", {"av": video.PyAVReader, "alike": video.PyAVReader, "late": Late, "b": broken, "other": Other}
    )
    ours, alike, late, fails, other = video.cells(path, list(video.READERS), 1)
    assert re.fullmatch(r"12; [\d.]+ ms", ours) and re.fullmatch(r"12; same; [\d.]+ ms", alike)
    assert "11 other" in late and fails == "fails" and "; ≤ 1; " in other
    assert "a.mp4: b: no such codec" in capsys.readouterr().err


def test_the_table_of_decoders_has_a_row_for_each_video(script, monkeypatch, capsys):
    video = script("video")
    monkeypatch.setattr(video, "CLIPS", (video.Clip("a.mkv", title="small", size=(64, 48), count=9),))
    video.main(["--repeats", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| file", "| ---", "| a.mkv", "| pauses.gif"]
    assert rows[2].split(" | ")[2].startswith("9; ") and rows[3].split(" | ")[2].startswith("12; ")


# -- train_step.py: other frameworks ---------------------------------------------------------------------------------

PRINTS = (
    'import json, sys; print("step 1"); print(json.dumps({"times": [5, 9, 11, 12], "losses": [3, 2, 1]} | dict(%s)))'
)
PYTHON = shlex.quote(sys.executable)


def command(more="", words=""):
    """Of a peer that prints fixed times. `more`: what else, as keywords."""
    code = (PRINTS % more).replace("{", "{{").replace("}", "}}")
    return f"{PYTHON} -c {shlex.quote(code)} {words}"


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """Run train_step.py's command line, our sides and theirs answered for."""
    train_step = script("train_step")
    for folder in ("tiny", "tiny-hf", "mixed-3"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    (tmp_path / "mixed-3" / "rows.jsonl").write_text("\n")
    found = {"times": [0, 4, 8, 12], "losses": [4, 4, 4], "peak_gb": 4.0}
    monkeypatch.setattr(train_step, "measure", lambda *given: found)
    monkeypatch.setattr(train_step, "counted", lambda *given: (0.5, 0.1, 2.0, 3.0))

    def main(*argv):
        fixed = ["--size", "tiny", "--steps", "3", "--repeats", "2", "--no_curves", "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["train_step.py", *fixed, *argv])
        train_step.main()

    return main


def test_peers_take_turns_with_the_sides(run, tmp_path, capsys):
    log = tmp_path / "log.txt"
    write = f"peak_gb=open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10)) and 2.0"
    words = "{model} {hf} {rows} {steps} {max_tiles} {threads} {recipe}"
    run("--peer", f"one={command(write, words)}", "--peer", f"other={command()}")
    printed = capsys.readouterr().out
    found = tables(printed)
    assert list(found)[1:] == ["theirs", "ours", "ours, features kept", "one", "other"]
    # 2 s and 1 s a step after the first, where theirs takes 4; 4 rows a step
    assert found["one"] == [pytest.approx(4 / 1.5, abs=0.5), 2, 3, 2, 0.5]
    assert found["other"][:3] == found["one"][:3] and found["other"][3] > 0.01
    assert "one 1, other 1" in printed
    model, hf, rows, *rest = log.read_text().splitlines()[0].split()
    assert (model, hf) == (str(tmp_path / "tiny"), str(tmp_path / "tiny-hf")) and rows.endswith("rows.jsonl")
    assert rest == ["3", "6", "2", "lora"] and len(log.read_text().splitlines()) == 2


def test_a_framework_by_name_is_run_in_its_environment(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("IVL_JUDGES", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        run("--peer", "ms-swift")
    assert stop.value.code == 2 and "make_env.py ms-swift makes it" in capsys.readouterr().err
    for name in ("ms-swift", "llamafactory"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        line = json.dumps({"times": [5, 9, 11, 12], "losses": [3, 2, 1]})
        log = tmp_path / "log"
        python.write_text(f"#!/bin/sh\nbasename $1 >> {log}\nshift\necho $* >> {log}\necho '{line}'\n")
        python.chmod(0o755)
    run("--peer", "ms-swift", "--peer", "llamafactory", "--repeats", "1")
    assert list(tables(capsys.readouterr().out))[-2:] == ["ms-swift", "llamafactory"]
    swift, words, factory, _ = (tmp_path / "log").read_text().splitlines()
    assert (swift, factory) == ("ms_swift.py", "llama_factory.py")
    hf, rows, *rest = words.split()
    assert hf == str(tmp_path / "tiny-hf") and rows.endswith("rows.jsonl") and rest == ["3", "6", "2", "lora", "0.05"]


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ("one", 2, "NAME=COMMAND"),
        ("one=python {weights}", 2, "{model}"),
        ("ours=python", 2, "names must differ"),
        (f"one={PYTHON} -c 'raise ValueError(7)'", 1, "ValueError: 7"),
        (f"one={PYTHON} -c 'print(3)'", 1, "as its last line, found '3'"),
        (f"one={command('times=[1, 2]')}", 1, "expected 4 times and 3 losses"),
    ],
)
def test_a_peer_that_breaks_the_contract_is_told(run, capsys, given, code, said):
    with pytest.raises(SystemExit) as stop:
        run("--peer", given)
    text = capsys.readouterr().err if code == 2 else stop.value.code
    assert said in text and (stop.value.code == 2) == (code == 2)


def test_the_peer_of_the_readme_trains(script, tmp_path):
    train_step = script("train_step")
    model = importlib.import_module("models").write(tmp_path / "tiny", "tiny")
    rows = train_step.write_rows(tmp_path / "rows", 8)
    (tmp_path / "peer.py").write_text(
        re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    )
    (given,) = re.findall(r'--peer "(.*?)"', (ROOT / "README.md").read_text())
    name, words = train_step.peer_of(given.replace("peer.py", shlex.quote(str(tmp_path / "peer.py"))))
    words = [sys.executable if word == "python" else word for word in words]
    args = argparse.Namespace(model=model, rows=rows, steps=2, max_tiles=1, threads=1, recipe="lora")
    found = train_step.peer(args, name, words)
    assert found["times"] == sorted(found["times"]) and found["peak_gb"] > 0.1
    assert all(5 < loss < 8 for loss in found["losses"])  # log 700 is 6.6
    json.dumps(found)


# -- gpu_run.py ------------------------------------------------------------------------------------------------------


def test_both_sides_of_a_gpu_run_learn_the_same_tokens(script, tmp_path):
    from transformers import AutoProcessor

    from ivl.data.processor import Processor

    gpu_run = script("gpu_run")
    peer, models = importlib.import_module("gpu_peer"), importlib.import_module("models")
    rows = [json.loads(line) for line in gpu_run.write_rows(tmp_path, 6).open()]
    assert (tmp_path / "questions.jsonl").read_text().count("\n") == 6 and "response" in rows[0]
    model = models.write(tmp_path / "model", "tiny", dtype="bfloat16")
    ours = Processor.from_pretrained(model, max_tiles=2)
    theirs = AutoProcessor.from_pretrained(models.write_twin(tmp_path / "model-hf", model))
    batch = peer.processed(theirs, rows, argparse.Namespace(max_tiles=2), answers=True)
    assert sum(len(row["images"]) for row in rows) > 3
    for n, row in enumerate(rows):
        example = ours(row)
        assert batch["input_ids"][n][batch["attention_mask"][n].bool()].tolist() == example.input_ids.tolist()
        assert batch["labels"][n][: len(example)].tolist() == example.labels.tolist()


@pytest.mark.slow
def test_a_gpu_run_on_a_cpu(tmp_path):
    """The whole script with tiny models: every stage ends well and has its figures."""
    command = ["bash", str(ROOT / "gpu.sh"), str(tmp_path)]
    environment = os.environ | {"ON": "cpu", "STAGES": "train predict full card"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.count("status 0") == 4 == printed.count("status ")
    found = tables(printed)
    for side in ("fit", "trainer", "predict", "generate"):
        assert found[side][0] > 0 and found[side][1] > 0
    assert found["fit"][5] == pytest.approx(found["trainer"][5], abs=0.1)
    assert "`ivl plan` predicts a peak of" in printed and list(tmp_path.glob("kernels-*.txt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_run_without_a_gpu_is_told(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_run.py"])
    with pytest.raises(SystemExit, match="2"):
        script("gpu_run").main()
    assert "no GPU is found here; --device cpu" in capsys.readouterr().err
