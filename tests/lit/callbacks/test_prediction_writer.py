"""predict: the answers of each row alone, in input order, whatever crashes, whatever is wrong with a row."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its first import: not one test's own)
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ivl.__main__ import main
from ivl.data.processor import Processor
from ivl.inference.request import row_seed
from ivl.lit.callbacks.prediction_writer import PredictionShards
from ivl.lit.prediction.prediction_rows import answered
from ivl.model.internvl import InternVL
from ivl.options import GenerationOptions
from ivl.types import UserError
from tests.data.videos import write_long_video
from tests.tiny import write_checkpoint

COUNT = 200
LIMIT = 6
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]


def write_questions(folder: Path, count: int = COUNT) -> Path:
    """Text, images of several shapes, two turns, videos; questions of unequal length."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n, (width, height) in enumerate([(56, 56), (200, 60), (60, 170), (300, 300)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    frames = [Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)) for _ in range(6)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    rows = []
    for n in range(count):
        words = " ".join(str(number) for number in rng.integers(0, 100, n % 13))
        kinds = [
            {"query": f"How many are there? {words}"},
            {"query": f"<image>What is it? {words}", "images": [f"{n % 4}.png"], "response": "a cat"},
            {"query": f"<image>And this? {words}", "images": ["1.png", "2.png"], "history": [["<image>?", "a cat"]]},
            {"query": f"<video>What happens? {words}", "videos": ["clip.gif"]},
            {"query": "Again.", "history": [[words or "Hi", "Hello."]]},
        ]
        rows.append(kinds[n % 5] | {"id": f"row{n}"})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_questions(folder / "data")
    return folder


class Api:
    """The rows by the Python API."""

    def __init__(self, base: Path) -> None:
        self.model, self.processor = InternVL.from_pretrained(base / "model"), Processor.from_pretrained(base / "model")
        eos_ids = [*self.processor.stop_ids, *self.model.eos_ids]
        self.options = {"max_new_tokens": LIMIT, "eos_ids": eos_ids}
        rows = map(json.loads, (base / "data/questions.jsonl").read_text().splitlines())
        asked = (self.processor.parse(row, root=base / "data").as_prompt() for row in rows)
        self.prompts = [self.processor(row) for row in asked]

    def streamed(self, n: int, **options) -> list[int]:
        return list(self.model.stream(self.processor.collate([self.prompts[n]]), **self.options, **options))

    def generated(self, prompts: list, **options) -> list[list[int]]:
        return self.model.generate(self.processor.collate(prompts), **self.options, **options)


@pytest.fixture(scope="module")
def api(base) -> Api:
    return Api(base)


@pytest.fixture(scope="module")
def alone_ids(api) -> list[list[int]]:
    """The tokens of each row's answer, streamed alone."""
    return [api.streamed(n) for n in range(COUNT)]


@pytest.fixture(scope="module")
def alone(api, alone_ids) -> list[str]:
    """The same as text."""
    answers = [api.processor.decode(ids) for ids in alone_ids]
    assert len(set(answers)) > COUNT // 2
    return answers


def command(base: Path, out: Path, *more: str) -> list[str]:
    rows = [] if "--data.predict" in more else ["--data.predict", str(base / "data/questions.jsonl")]
    return [
        "predict", "--model.pretrained", str(base / "model"), *rows,
        "--model.generation.max_new_tokens", str(LIMIT), "--predictions.file", str(out),
        "--trainer.logger.init_args.save_dir", str(out.parent), *QUIET, *more,
    ]  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def crash(argv: list[str], parts: PredictionShards, lines: int) -> None:
    """Start a prediction in a process of its own, and kill it when its part has that many lines."""
    process = multiprocessing.get_context("fork").Process(target=main, args=(argv,))
    process.start()
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if sum(part.read_bytes().count(b"\n") for part in parts.existing()) >= lines:
            break
        time.sleep(0.002)
    assert process.is_alive(), "it ended before it was killed"
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_of_generate_answer_as_rows_alone_do(api, alone_ids, size):
    found = [ids for n in range(0, COUNT, size) for ids in api.generated(api.prompts[n : n + size])]
    assert found == alone_ids


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_decoding_step_gives_the_same_answers(base, alone, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert main(command(base, out, "--model.compile", "true")) == 0
    assert [row["response"] for row in read(out)] == alone


def test_several_answers_and_log_probabilities_of_each_row(base, api, tmp_path):
    rows, lines = tmp_path / "few.jsonl", (base / "data/questions.jsonl").read_text().splitlines()[:3]
    rows.write_text("\n".join(lines))
    out = tmp_path / "answers.jsonl"
    generation = {"temperature": 1.0, "num_answers": 3, "logprobs": "true", "seed": 5}
    options = [f"--model.generation.{name}={value}" for name, value in generation.items()]
    words = ["--data.predict", str(rows), "--data.media_root", str(base / "data"), *options]
    assert main(command(base, out, *words)) == 0
    for n, line in enumerate(read(out)):
        seed = row_seed(5, n)
        seeds = [seed, row_seed(seed, 1), row_seed(seed, 2)]
        alone = [api.streamed(n, temperature=1.0, seed=each) for each in seeds]
        assert [one["response"] for one in line["responses"]] == [api.processor.decode(ids) for ids in alone]
        assert line["response"] == line["responses"][0]["response"]
        assert [len(one["logprobs"]) for one in line["responses"]] == [len(ids) for ids in alone]
        assert line["logprobs"] == line["responses"][0]["logprobs"] and max(line["logprobs"]) < 0
    with pytest.raises(UserError, match=r"num_answers: expected 1, or more with a temperature above 0, found 2"):
        GenerationOptions(num_answers=2).check()


def test_an_answer_goes_on_from_the_beginning_that_its_row_has(base, api, tmp_path):
    turns = [{"role": "user", "content": "Which animal?"}, {"role": "assistant", "content": "It is", "prefix": True}]
    made = [{"messages": turns}, {"query": "Which animal?"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    options = ["--model.generation.temperature", "1.0", "--model.generation.num_answers", "2"]
    assert main(command(base, tmp_path / "answers.jsonl", "--data.predict", str(rows), *options)) == 0
    begun, other = read(tmp_path / "answers.jsonl")
    example = api.processor(made[0])
    seed = row_seed(0, 0)
    for answer, each in zip(begun["responses"], (seed, row_seed(seed, 1)), strict=True):
        batch = api.processor.collate([example])
        ids = list(api.model.stream(batch, **api.options, temperature=1.0, seed=each))
        assert answer["response"] == api.processor.decode(ids, prefix="It is")
        assert answer["response"].startswith("It is") and len(answer["response"]) > len("It is")
    assert begun["response"] == begun["responses"][0]["response"]
    assert (begun["prefix"], other["prefix"]) == ("It is", None)
    assert begun["prompt"].endswith("It is") and begun["prompt"].startswith(other["prompt"])


def test_answers_are_those_of_each_row_alone(base, alone, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert main(command(base, out)) == 0
    found = read(out)
    assert [row["id"] for row in found] == [f"row{n}" for n in range(COUNT)]
    assert [row["response"] for row in found] == alone
    assert found[1]["reference"] == "a cat" and found[0]["reference"] is None
    assert [path.name for path in tmp_path.glob("answers*")] == ["answers.jsonl"]


def test_a_killed_prediction_goes_on(base, alone, tmp_path, caplog):
    """Killed at several moments, with a line left half written; no row is lost, none comes twice."""
    out = tmp_path / "answers.jsonl"
    argv, parts = command(base, out), PredictionShards(out)
    for lines in (1, 60, 130):
        crash(argv, parts, lines)
        assert not out.exists()
    done = parts.existing()[0].read_bytes()
    parts.existing()[0].write_bytes(done[: done.rstrip(b"\n").rfind(b"\n") + 20])
    kept = len(done.splitlines()) - 1
    assert main(argv) == 0
    assert f"{kept} of {COUNT} rows are in {out}.part" in caplog.text
    found = read(out)
    assert [row["id"] for row in found] == [f"row{n}" for n in range(COUNT)]
    assert [row["response"] for row in found] == alone
    assert [path.name for path in tmp_path.glob("answers*")] == ["answers.jsonl"]


def test_sampled_rows_do_not_depend_on_batching(base, api, alone, tmp_path):
    """Each by its own seed: alone, few or many at a time, and where a crash came between."""
    sampled = ["--model.generation.temperature", "1", "--model.generation.seed", "5"]
    texts = [
        [api.processor.decode(api.streamed(n, temperature=1.0, seed=row_seed(5, n))) for n in range(COUNT)],
    ]
    for rows in (3, 32):
        out = tmp_path / f"{rows}.jsonl"
        argv = command(base, out, *sampled, "--model.batching.rows", str(rows))
        if rows == 3:
            crash(command(base, out, *sampled, "--model.batching.rows", "9"), PredictionShards(out), COUNT // 2)
        assert main(argv) == 0
        texts.append([row["response"] for row in read(out)])
    assert texts[0] == texts[1] == texts[2] != alone
    assert texts[0][0] != texts[0][65], "rows that ask the same draw differently"


def test_stop_texts_and_beams(base, alone, tmp_path):
    stop = alone[0][1:3]
    out = tmp_path / "stop.jsonl"
    small = tmp_path / "few.jsonl"
    rows = [json.loads(line) for line in (base / "data/questions.jsonl").read_text().splitlines()[:7]]
    small.write_text("".join(json.dumps(row) + "\n" for row in rows))
    less = ["--data.predict", str(small), "--data.media_root", str(base / "data")]
    assert main(command(base, out, *less, "--model.generation.stop", json.dumps([stop]))) == 0
    assert [row["response"] for row in read(out)] == [text.partition(stop)[0].strip() for text in alone[:7]]
    assert main(command(base, tmp_path / "beams.jsonl", *less, "--model.generation.num_beams", "2")) == 0
    assert len(read(tmp_path / "beams.jsonl")) == 7


def small(folder: Path, *rows: dict, **llm) -> tuple[Path, list[str]]:
    """A model with its own `llm_config`, and a file of rows: the file, and the start of a command."""
    write_checkpoint(folder / "model", llm=llm or None)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["predict", "--model.pretrained", str(folder / "model"), "--data.predict", str(path), *QUIET]
    return path, [*argv, "--trainer.logger", "false", "--model.generation.max_new_tokens", "5"]


TURNS = {"system": "", "query": "What is it?", "history": [[f"My number is {'7 ' * 60}", "Noted."], ["Second", "ok"]]}


def test_prompts_have_the_models_context_and_not_the_length_of_training_rows(tmp_path, caplog):
    """A config's `data.max_length` is of training; what is typed counts, and is said on the screen and in the row."""
    _, argv = small(tmp_path, TURNS, {"system": "", "query": "Hi"})
    (tmp_path / "run.yaml").write_text("data: {max_length: 60}\n")
    out = tmp_path / "a.jsonl"
    assert main([*argv, "--config", str(tmp_path / "run.yaml"), "--predictions.file", str(out)]) == 0
    whole, hi = read(out)
    assert "7 7 7" in whole["prompt"] and whole["notes"] == hi["notes"] == [] and "shortened" not in caplog.text
    for n, option in enumerate(("--data.max_length", "--data.max_prompt_length")):
        caplog.clear()
        out = tmp_path / f"{n}.jsonl"
        assert main([*argv, option, "100", "--predictions.file", str(out)]) == 0
        cut, same = read(out)
        assert cut["notes"] == ["dropped 1 turn"] and "7 7 7" not in cut["prompt"]
        assert same == hi
        assert "prompts longer than their limit: oldest turns dropped 1 (of 2)" in caplog.text
        assert "1 of them to prompts that were shortened" in caplog.text


def test_a_prompt_beyond_the_context_is_shortened_with_room_for_an_answer(tmp_path, caplog):
    _, argv = small(tmp_path, TURNS, max_position_embeddings=128)
    assert main([*argv, "--predictions.file", str(tmp_path / "a.jsonl")]) == 0
    (row,) = read(tmp_path / "a.jsonl")
    assert row["notes"] == ["dropped 1 turn"] and row["finish_reason"] == "length"
    assert "prompts longer than their limit: oldest turns dropped 1 (of 1)" in caplog.text


def test_rows_say_why_their_answers_ended_and_the_cut_ones_are_counted(tmp_path, caplog):
    _, argv = small(
        tmp_path, {"system": "", "query": "Hi"}, {"system": "", "query": "7 " * 30}, max_position_embeddings=86
    )
    processor, model = Processor.from_pretrained(tmp_path / "model"), InternVL.from_pretrained(tmp_path / "model")
    room = 86 - len(processor({"system": "", "query": "7 " * 30}))
    argv += ["--model.generation.max_new_tokens", str(room + 2)]
    assert main([*argv, "--predictions.file", str(tmp_path / "a.jsonl")]) == 0
    rows = read(tmp_path / "a.jsonl")
    assert [row["finish_reason"] for row in rows] == ["length", "context"]
    assert f"1 of them cut off at model.generation.max_new_tokens {room + 2}" in caplog.text
    assert "1 of them cut off at the end of the model's context" in caplog.text
    batch = processor.collate([processor({"system": "", "query": "Hi"})])
    stop = processor.decode(model.generate(batch, max_new_tokens=9, eos_ids=[])[0])[:3]
    argv += ["--model.generation.stop", json.dumps([stop]), "--predictions.file", str(tmp_path / "b.jsonl")]
    assert main(argv) == 0
    assert read(tmp_path / "b.jsonl")[0]["finish_reason"] == "stop"


def test_a_thought_stands_apart_in_the_row(base):
    processor = Processor.from_pretrained(base / "model")
    asked = processor.parse({"query": "Where?"})
    row = answered(0, asked, "<think>cat[[1, 2, 3, 4]]?</think>\n\ndog[[5, 6, 7, 8]]", processor, "stop")
    assert row["reasoning"] == "cat[[1, 2, 3, 4]]?" and row["response"] == "dog[[5, 6, 7, 8]]"
    assert row["boxes"] == [{"ref": "dog", "boxes": [(5, 6, 7, 8)]}]
    cut = answered(0, asked, "<think>cat[[1, 2, 3, 4]]", processor, "length")
    assert (cut["response"], cut["boxes"], cut["reasoning"]) == ("", [], "cat[[1, 2, 3, 4]]")
    assert answered(0, asked, "a cat", processor, "stop")["reasoning"] is None


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_without_a_name_the_same_command_goes_on_too(base, tmp_path, monkeypatch, caplog):
    """Each run has a folder of its own, but an unfinished file of the same settings is found."""
    argv = command(base, tmp_path / "unused")
    at = argv.index("--predictions.file")
    del argv[at : at + 2]
    with monkeypatch.context() as patch:
        patch.setattr(
            "ivl.lit.callbacks.prediction_writer.PredictionShards.join",
            lambda *_: (_ for _ in ()).throw(UserError("stopped")),
        )
        assert main(argv) == 2
    begun = tmp_path / "version_0/predictions.jsonl"
    assert main([*argv, "--model.generation.max_new_tokens", "3"]) == 0, "other settings, another file"
    assert not begun.exists() and (tmp_path / "version_1/predictions.jsonl").is_file()
    caplog.clear()
    assert main(argv) == 0
    count = len(read(begun))
    assert f"{count} of {count} rows are in {begun}.part*" in caplog.text
    assert not (tmp_path / "version_2/predictions.jsonl").exists()
    assert main(argv) == 0 and (tmp_path / "version_3/predictions.jsonl").is_file(), "it was finished"


def error(capsys, argv: list[str]) -> str:
    status = main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1
    return lines[0]


def test_other_settings_are_refused_and_named(base, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    argv = command(base, out)
    crash(argv, PredictionShards(out), 1)
    line = error(capsys, [*argv, "--model.generation.temperature", "0.7"])
    assert "begun with other settings (generation.temperature: 0.0 there, 0.7 here)" in line
    assert "processor: " in error(capsys, [*argv, "--data.max_tiles", "3"])
    assert "rows: " in error(capsys, [*argv, "--data.predict", str(tail(base, tmp_path))])


def tail(base: Path, folder: Path) -> Path:
    path = folder / "other.jsonl"
    path.write_text('{"query": "Hi"}\n')
    return path


def bad_rows(base: Path, folder: Path, url: str) -> Path:
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.mp4").write_bytes(b"")
    rows = [
        {"query": "Good."},
        {"query": "<image>?", "images": ["nowhere.png"], "id": "missing"},
        {"query": "<image>?", "images": ["text.jpg"]},
        {"query": "<video>?", "videos": ["empty.mp4"]},
        {"query": "<image><image>?", "images": [str(base / "data/0.png")]},
        {"query": "long " * 3000},
        {"query": "<image>?", "images": [url]},
        {"query": "Good too."},
    ]
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


BAD = {
    2: ("nowhere.png", "no such file"),
    3: ("text.jpg", "expected an image", "found text that begins with 'not a picture'"),
    4: ("empty.mp4", "the file is empty (0 bytes)"),
    5: ("2 <image> marks but 1 image",),
    6: ("tokens", "exceed the model's context of 4096"),
    7: ("/cat.png", "no whole answer (timed out), 1 times"),
}
"""Line of a bad row → what is said of it"""


@pytest.fixture
def hanging():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/cat.png"


def impatient(folder: Path) -> list[str]:
    fetching = {"timeout": 0.3, "retries": 0, "allow_private": "true", "cache_dir": folder / "fetched"}
    return [word for name, value in fetching.items() for word in (f"--data.media.fetch.{name}", str(value))]


def test_errors_of_rows_are_written_beside_the_answers(base, tmp_path, caplog, hanging):
    path, out = bad_rows(base, tmp_path, hanging), tmp_path / "answers.jsonl"
    more = ["--data.predict", str(path), "--data.on_error", "skip", "--data.max_length", "100000"]
    assert main(command(base, out, *more, *impatient(tmp_path))) == 0
    assert "8 answers" in caplog.text and "6 of them errors" in caplog.text
    found = read(out)
    assert {n for n, row in enumerate(found, 1) if "error" in row} == BAD.keys()
    for number, words in BAD.items():
        row = found[number - 1]
        assert row["error"].startswith(f"{path}:{number}: ") and row["where"] == f"{path}:{number}"
        assert "response" not in row and "\n" not in row["error"]
        assert all(word in row["error"] for word in words), row["error"]
    assert found[1]["id"] == "missing" and found[7]["response"]


def test_an_error_of_a_row_stops_before_the_model_is_read(base, tmp_path, capsys, monkeypatch, hanging):
    path, read = bad_rows(base, tmp_path, hanging), []
    monkeypatch.setattr("ivl.lit.module.load_model", read.append)
    line = error(capsys, command(base, tmp_path / "answers.jsonl", "--data.predict", str(path)))
    assert not read
    assert f"{path}:2: " in line and "4 more rows" in line and "--data.on_error skip" in line
    assert list(tmp_path.glob("answers*")) == []


@pytest.mark.parametrize("number", [6, 7])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_found_on_the_way_stops_with_one_line(base, tmp_path, capsys, hanging, number, workers):
    """A prompt beyond the context and a server that hangs: what was answered stays, and the same command goes on."""
    path, out = bad_rows(base, tmp_path, hanging), tmp_path / "answers.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], rows[number - 1]]) + "\n")
    more = ["--data.predict", str(path), "--data.max_length", "100000", "--data.num_workers", str(workers)]
    line = error(capsys, [*command(base, out, *more), *impatient(tmp_path)])
    assert line.startswith(f"error: {path}:2: ") and all(word in line for word in BAD[number])
    assert not out.exists() and PredictionShards(out).settings.exists()


def enlarge(folder: Path, factor: float) -> None:
    """Multiply a matrix of a model: by 3e5 it fits float32 and bfloat16 alone, as those do that overflow float16."""
    state = load_file(folder / "model.safetensors")
    state["language_model.model.layers.1.mlp.down_proj.weight"] *= factor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_logits_that_are_not_finite_are_an_error_and_not_an_answer(tmp_path, capsys):
    path, argv = small(tmp_path, {"query": "Hi", "response": "Hello"}, {"query": "And?", "response": "Yes"})
    enlarge(tmp_path / "model", 3e5)
    assert main([*argv, "--predictions.file", str(tmp_path / "a.jsonl")]) == 0
    argv += ["--trainer.precision", "16-true"]
    message = "the model's logits are not finite in float16, whose largest number is 65504; compute in bfloat16"
    line = error(capsys, [*argv, "--predictions.file", str(tmp_path / "b.jsonl")])
    assert line.startswith(f"error: {path}:") and message in line and "--trainer.precision bf16-true" in line
    assert main([*argv, "--predictions.file", str(tmp_path / "c.jsonl"), "--data.on_error", "skip"]) == 0
    assert all(message in row["error"] and "response" not in row for row in read(tmp_path / "c.jsonl"))
    enlarge(tmp_path / "model", float("nan"))
    at = argv.index("--data.predict")
    line = error(capsys, ["validate", *argv[1:at], "--data.val", *argv[at + 1 : -2]])
    assert line.startswith(f"error: {path}:1: the model's logits are not finite in float32: its weights hold NaN")


def test_a_video_of_three_hours_is_answered(base, tmp_path):
    """Its frames are sought. More frames than the limits allow are refused, and the next row is answered."""
    write_long_video(tmp_path / "long.mp4")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "<video>What happens?", "videos": ["long.mp4"]}\n{"query": "Good."}\n')
    for name, more in {
        "sought": [],
        "many": ["--data.video.fps", "1", "--data.media.max_video_pixels", "100000"],
    }.items():
        out = tmp_path / f"{name}.jsonl"
        more = ["--data.predict", str(path), "--data.on_error", "skip", *more]
        assert main(command(base, out, *more)) == 0
        video, text = read(out)
        assert text["response"]
        assert video["response"] if name == "sought" else "are more than 100000 pixels" in video["error"]


# -- the files ---------------------------------------------------------------------------------------------------------


def lines(*indices: int) -> list[dict]:
    return [{"index": n, "response": str(n)} for n in indices]


def begun(path: Path, *parts: list[dict]) -> PredictionShards:
    whole = PredictionShards(path)
    whole.begin({"seed": 1})
    for rank, rows in enumerate(parts):
        part = PredictionShards(path)
        part.open(rank)
        part.append(rows)
        part.close()
    return whole


def test_parts_are_joined_in_order(tmp_path):
    whole = begun(tmp_path / "a.jsonl", lines(4, 0, 2), lines(3, 1))
    assert whole.answered() == {0, 1, 2, 3, 4}
    assert whole.join(5)["error"] == 0
    assert [row["response"] for row in read(tmp_path / "a.jsonl")] == list("01234")
    assert [(row["index"], row["of"]) for row in read(tmp_path / "a.jsonl")] == [(n, 5) for n in range(5)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_parts_that_lack_rows_are_kept(tmp_path):
    whole = begun(tmp_path / "a.jsonl", lines(0), lines(3))
    with pytest.raises(UserError, match="2 of 4 rows are answered; the same command goes on"):
        whole.join(4)
    assert len(whole.existing()) == 2 and not (tmp_path / "a.jsonl").exists()
    assert PredictionShards(tmp_path / "a.jsonl").begin({"seed": 1}) is None


@pytest.mark.parametrize("kept", [0, 1, 5, 40])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, kept):
    whole = begun(
        tmp_path / "a.jsonl", [{"index": 0, "response": "x" * 100_000}, {"index": 1, "response": "y" * 90_000}]
    )
    part = whole.existing()[0]
    whole_line = part.read_bytes().find(b"\n") + 1
    part.write_bytes(part.read_bytes()[: whole_line + kept])
    again = PredictionShards(tmp_path / "a.jsonl")
    again.begin({"seed": 1})
    assert again.answered() == {0}
    assert part.stat().st_size == whole_line
    part.write_bytes(b'{"index": 0')
    again.begin({"seed": 1})
    assert again.answered() == set() and part.stat().st_size == 0


def test_what_is_damaged_foreign_or_in_use_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = begun(path, lines(0, 1))
    with pytest.raises(UserError, match=r"other settings \(seed: 1 there, 2 here\)"):
        PredictionShards(path).begin({"seed": 2})
    part = whole.existing()[0]
    good = part.read_bytes()
    part.write_bytes(good + b"nonsense\n")
    with pytest.raises(UserError, match=r"a\.jsonl\.part0:3: is damaged"):
        PredictionShards(path).answered()
    part.write_bytes(good)
    writing = PredictionShards(path)
    writing.open(0)
    with pytest.raises(UserError, match="another program is writing it"):
        PredictionShards(path).begin({"seed": 1})
    writing.close()
    PredictionShards(path).begin({"seed": 1})
    whole.settings.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl\.settings\.json beside it does not"):
        PredictionShards(path).begin({"seed": 1})
