"""From a benchmark's official files to its score: every step as a user takes it, on a tiny model."""

import json

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its first import: not one test's own)
import pytest

from ivl.__main__ import main, run_command
from ivl.data.rows.formats import parse
from ivl.eval.benchmarks.tasks import TASKS
from ivl.lit.prediction.benchmark import rows_file, score_fields, settings
from ivl.types import UserError
from tests.eval import official
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    official.write(folder / "data", tables=False)
    return folder


def predict(base, out, name, *more):
    argv = ["predict", "--model.pretrained", str(base / "model"), "--trainer.accelerator", "cpu"]
    argv += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
    argv += ["--data.task", name, "--data.task_root", str(base / "data"), "--predictions.file", str(out)]
    assert main([*argv, *more]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "prompt", "truth"),
    [
        ("docvqa", "When? Answer the question using a single word or phrase.", {"answers": ["May 1", "1 May"]}),
        ("mmbench_en", 'A. cat\nB. a "hot" dog\nAnswer with the option\'s letter', {"group": "3", "reference": "A"}),
        ("refcoco", "this sentence describes: <ref>the thing</ref>", {"box": [4, 3, 20, 15.0], "size": [40, 30]}),
    ],
)
def test_official_files_are_answered_scored_and_shown(base, tmp_path, capsys, name, prompt, truth):
    said = tmp_path / f"{name}.jsonl"
    rows = predict(base, said, name, "--model.generation.max_new_tokens", "3")
    printed = capsys.readouterr().out
    assert f"model.generation.max_new_tokens 3 as given (published: {TASKS[name].max_new_tokens})" in printed
    assert f"python -m ivl score {said} --task {name}" in printed
    assert [row["index"] for row in rows] == list(range(len(rows)))
    first = rows[0]
    assert prompt in first["prompt"] and first["of"] == len(rows)
    assert {key: first[key] for key in truth} == truth
    assert first["max_tiles"] == TASKS[name].max_tiles
    assert first["decoding"]["max_new_tokens"] == 3 and first["decoding"]["min_new_tokens"] == 1
    assert first["model"].startswith(f"{base / 'model'}@")

    argv = ["score", str(said), "--task", name, "--resamples", "20"]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        out = ["--out", str(tmp_path / folder / "scores.json"), "--html", str(tmp_path / folder / "report.html")]
        assert main([*argv, *out]) == 0
    for file in ("scores.json", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    found = json.loads((tmp_path / "a/scores.json").read_text(encoding="utf-8"))
    assert found["files"][0]["asked_as_published"] == found["data"]["rows"] == len(rows)
    assert found["files"][0]["run"]["model"] == first["model"]
    pictures = 0 if name == "mmbench_en" else 1  # there they are inside the official file
    page = (tmp_path / "a/report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == pictures
    assert main([*argv, *out, "--rows", str(base / "data")]) == 0
    assert "data:image/jpeg;base64," in (tmp_path / "b/report.html").read_text(encoding="utf-8")

    said.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]), encoding="utf-8")
    if len(rows) > 1:
        capsys.readouterr()
        assert main(argv) == 2
        assert f"missing are rows {len(rows) - 1} (counted from 0)" in capsys.readouterr().err


def test_what_is_typed_wins_and_a_config_file_does_not(base, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("""
model: {generation: {max_new_tokens: 2, temperature: 0.7}}
data: {max_tiles: 1, share_tiles: true, dynamic_image_size: false, system_message: none, thinking: true}
""")
    (row,) = predict(base, tmp_path / "a.jsonl", "textvqa", "--config", str(config), "--data.max_tiles=2")
    assert row["max_tiles"] == 2
    assert row["decoding"]["max_new_tokens"] == 10 and row["decoding"]["temperature"] == 0
    assert "system\n" in row["prompt"] and "<think>" not in row["prompt"]
    published = settings(TASKS["textvqa"])
    assert not published["data.share_tiles"] and published["data.dynamic_image_size"] is None


def test_other_weights_have_another_name(base, tmp_path):
    names = []
    for n in range(3):
        folder = write_checkpoint(tmp_path / f"{n}/model", seed=n // 2)
        argv = ["--model.pretrained", str(folder), "--model.generation.max_new_tokens", "1"]
        (row,) = predict(base, tmp_path / f"{n}.jsonl", "docvqa", *argv)
        names.append(row["model"].split("@")[1])
    assert names[0] == names[1] != names[2]


def test_rows_are_made_once_and_made_again_where_the_files_changed(base, tmp_path):
    first = rows_file("docvqa", str(base / "data"), tmp_path)
    assert rows_file("docvqa", str(base / "data"), tmp_path) == first
    official.write(tmp_path / "data", tables=False)
    assert rows_file("docvqa", str(tmp_path / "data"), tmp_path) != first
    assert len(list((tmp_path / "tasks").iterdir())) == 2


def test_a_missing_download_is_one_line(base, tmp_path, capsys):
    argv = ["predict", "--model.pretrained", str(base / "model"), "--trainer.accelerator", "cpu"]
    assert main([*argv, "--data.task", "docvqa", "--data.task_root", str(tmp_path)]) == 2
    assert "val_v1.0.json: no such file; expected the benchmark's official download" in capsys.readouterr().err
    assert main([*argv, "--data.task", "docvq"]) == 2
    assert "--data.task docvq: no such benchmark; expected one of vqav2" in capsys.readouterr().err
    assert main([*argv, "--data.task", "docvqa", "--data.predict", "x.jsonl"]) == 2
    assert "--data.predict and --data.task: expected one of them, found both" in capsys.readouterr().err


@pytest.mark.parametrize("name", TASKS)
def test_every_setting_of_a_task_is_an_option(name):
    from ivl.options import DataOptions, GenerationOptions, VideoOptions

    known = {f"data.{key}" for key in DataOptions.__dataclass_fields__}
    known |= {f"data.video.{key}" for key in VideoOptions.__dataclass_fields__}
    known |= {f"model.generation.{key}" for key in GenerationOptions.__dataclass_fields__}
    assert settings(TASKS[name]).keys() <= known


def test_pictures_inside_a_row_are_not_written_again():
    rows = [{"query": "<image>?", "images": [image], "answers": ["a"]} for image in ("x.png", "data:image/png;base64,")]
    assert [score_fields(parse(row)) for row in rows] == [{"answers": ["a"], "images": ["x.png"]}, {"answers": ["a"]}]


def test_an_unanswered_row_is_no_wrong_answer(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "1", "error": "a.jpg: truncated"}) + "\n")
    with pytest.raises(UserError, match=r"p.jsonl:1: was not answered \(a.jpg: truncated\)"):
        run_command("score", [str(path), "--task", "docvqa"])
