"""Options of the commands beside Lightning's: short pages, values, and mistakes in our words."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from ivl.__main__ import COMMANDS, main
from ivl.cli.command_line import COMMAND_OPTIONS, arguments, parse
from ivl.errors import UserError
from ivl.options import ChatOptions, ExportOptions, ModelsOptions, PairsOptions, ScoreOptions


@pytest.fixture(params=sorted(COMMAND_OPTIONS))
def command(request) -> str:
    return request.param


def test_the_page_is_short_and_complete(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m ivl {command} ") and f"\n  python -m ivl {command} " in text
    assert text.count("\n") <= 60 and max(map(len, text.splitlines())) <= 120
    for one in arguments(COMMAND_OPTIONS[command]):
        assert f"\n  {one.title}\n" in text and one.option.help.split()[-1] in text
        assert len(one.option.help.split()) > 2, one.title


def test_each_help_text_stands_once():
    """Those of an option that several commands have, too: their classes inherit it."""
    package = Path(sys.modules["ivl"].__file__).parent
    source = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in package.rglob("*.py"))
    for kind in COMMAND_OPTIONS.values():
        for one in arguments(kind):
            if len(one.option.help.split()) > 4:
                assert source.count(one.option.help) == 1, one.option.help


def test_values_have_their_types():
    options = parse("score", ["a", "b", "--task", "pope", "--rows=c", "--field", "id=n", "--field", "response=r"])
    assert options == ScoreOptions(
        files=[Path("a"), Path("b")], task="pope", rows=Path("c"), field=["id=n", "response=r"]
    )
    options = parse("pairs", ["--rows", "b", "c", "--right", "1e-1", "--wrong=-1", "--reference", "--", "a"])
    assert options == PairsOptions(
        answers=Path("a"), rows=[Path("b"), Path("c")], right=0.1, wrong=-1.0, reference=True
    )
    assert parse("models", []) == ModelsOptions(text="")
    assert parse("score", ["a", "--task", "pope", "--html", "null"]).html is None
    options = parse(
        "chat",
        ["--model.pretrained=x", "--thinking", "true", "--device_max_memory", "1GB", "2GB", "--max_tiles", "null"],
    )
    assert (options.model, options.thinking, options.device_max_memory) == ("x", True, ["1GB", "2GB"])
    assert options.max_tiles is None and options.settings == ChatOptions()
    assert parse("export", ["--base", "x", "--out", "y", "--adapter-only", "--layout", "hf"]) == ExportOptions(
        base="x", out="y", adapter_only=True, layout="hf"
    )
    words = [
        "-c",
        "a",
        "--config",
        "b",
        "--data.train",
        "c",
        "--show=3",
        "--data.columns.query",
        "q",
        "--model.pretrained",
        "m",
    ]
    options = parse("check", words)
    assert (options.config, options.show, options.pretrained) == (["a", "b"], 3, "m")
    assert options.data == ["--data.train", "c", "--data.columns.query", "q"]
    options = parse("plan", ["--config", "{model: {pretrained: x}}", "--devices", "2", "--data.max_tiles", "3"])
    assert (options.devices, options.fit) == (2, ["--config", "{model: {pretrained: x}}", "--data.max_tiles", "3"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("pairs a", "pairs needs --rows FILE ...: Rows that were answered"),
        ("score --task pope", "score needs FILE ...: Answers, one JSON object a line"),
        ("score a --tsak pope", "--tsak: no such option of score; did you mean --task? (python -m ivl score --help)"),
        ("score a --task", "--task: expected one argument"),
        ("score a --task pope --mode old", "--mode: expected compat or strict, found 'old'"),
        ("score a --task pope --resamples many", "--resamples: expected int, found 'many'"),
        ("score a --task pope --field response", "--field: expected OURS=THEIRS, found 'response'"),
        ("pairs a --rows b --per_row 0", "--per_row: expected at least 1, found 0"),
        ("pairs a b --rows c", "b: not expected (python -m ivl pairs --help)"),
        ("models -x", "-x: not expected"),
        ("plan --config {} --efficiency much", "--efficiency: expected float, found 'much'"),
        ("plan --devcie T4", "--devcie: no such option of plan; did you mean --device"),
        ("plan --learning_rate 1", "--learning_rate is --model.optimizer.lr here"),
        ("plan", "plan needs --model.pretrained"),
        ("chat --model x --thinking maybe", "--thinking: expected bool, found 'maybe'"),
        ("chat --model x --dtype half", "--dtype: expected auto or float32 or bfloat16 or float16, found 'half'"),
        ("chat --model x --temperature -1", "temperature: expected at least 0, found -1.0"),
        ("export --base x", "export needs --out FOLDER: Folder to write."),
        ("export --out x", "nothing to export: expected --run RUN, --adapter DIR, or --base NAME"),
        ("check --dataset x", "--dataset is --data.train here"),
        ("check --data rows.jsonl", "--data rows.jsonl: --data.train takes files of rows"),
        ("check --data a.jsonl b.jsonl", "--data a.jsonl: --data.train takes files of rows"),
        ("check --model internvl2-2b", "--model is --model.pretrained here"),
        ("check --data.train", "--data.train: expected a value (str or list), found none"),
        ("check --learning_rate 1", "--learning_rate: no such option of check"),
        ("check --trainer.max_epochs 1", "--trainer.max_epochs: no such option of check"),
        ("check --data.max_tiles six", "--data.max_tiles: expected int, found 'six'"),
    ],
)
def test_a_mistake_is_told_in_our_words(argv, message):
    command, *words = argv.split()
    with pytest.raises(UserError) as error:
        parse(command, words)
    assert message in str(error.value)


def test_every_command_is_one_or_the_other():
    assert COMMAND_OPTIONS.keys() == {name for name, (module, _) in COMMANDS.items() if module != "ivl.lit.cli"}
    assert all(dataclasses.is_dataclass(kind) for kind in COMMAND_OPTIONS.values())


def test_help_and_mistakes_come_before_torch():
    code = "import sys; from ivl.__main__ import main; print([main(argv) for argv in {}], 'torch' in sys.modules)"
    argv = [[command, "--help"] for command in COMMAND_OPTIONS] + [[command, "--nosuch"] for command in COMMAND_OPTIONS]
    done = subprocess.run([sys.executable, "-c", code.format(argv)], capture_output=True, text=True)
    half = len(COMMAND_OPTIONS)
    assert done.stdout.splitlines()[-1] == f"{[0] * half + [2] * half} False", done.stderr


def test_answers_are_scored_without_torch(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"id": "1", "response": "blue", "answers": ["blue"]}\n')
    code = "import sys; from ivl.__main__ import main; print(main({}), 'torch' in sys.modules)"
    argv = ["score", str(file), "--task", "docvqa", "--html", str(tmp_path / "page.html")]
    done = subprocess.run([sys.executable, "-c", code.format(argv)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


@pytest.mark.parametrize(("command", "topic"), [("check", "data"), ("check", "data.video"), ("plan", "model.tune")])
def test_groups_of_fit_have_a_page_here_too(capsys, command, topic):
    assert main([command, "--help", topic]) == 0
    assert capsys.readouterr().out.startswith(f"options of {command}: {topic}\n")
