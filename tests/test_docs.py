"""The pages say what is true: rows are rows, yaml is accepted, commands are understood by their own parsers, links lead
somewhere, Python imports what is there. Nothing is trained, loaded or fetched."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from ivl import shipped
from ivl.__main__ import COMMANDS, run_command
from ivl.cli import preflight
from ivl.data.row_files.json_line import loads
from ivl.data.rows.formats import parse
from ivl.lit import cli
from ivl.lit.cli import IvlCLI
from tests.diffs import REPO, applied
from tests.tiny import write_checkpoint

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
WANTED = {
    "first_project",
    "data",
    "finetuning",
    "preference",
    "inference",
    "evaluation",
    "distributed",
    "export",
    "from_ms_swift",
    "from_internvl",
    "from_llama_factory",
    "models",
    "design",
    "troubleshooting",
}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [
        body for name, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if name == language
    ]


def named(found: list[tuple[Path, str]]):
    return [pytest.param(text, id=f"{page.stem}-{n}") for n, (page, text) in enumerate(found)]


def test_the_pages_are_there():
    assert {page.stem for page in (REPO / "docs").glob("*.md")} >= WANTED


# -- rows ------------------------------------------------------------------------------------------------------------

ROWS = [(page, line) for page in PAGES for block in blocks(page, "json") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("line", named(ROWS))
def test_a_row_is_understood(line):
    conversation = parse(loads(line), size=lambda source: (640, 480))
    assert conversation.messages[0].role == "user"
    assert not any(re.search(r"<(bbox|ref-object)>", message.text) for message in conversation.messages)


@pytest.mark.parametrize("text", named([(page, b) for page in PAGES for b in blocks(page, "jsonc")]))
def test_a_meta_file_is_one(text):
    for entry in json.loads(text).values():
        assert (
            {"annotation"}
            <= set(entry)
            <= {"root", "annotation", "repeat_time", "length", "data_augment", "max_dynamic_patch"}
        )


# -- commands --------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """`-m ivl …` lines of a page's shell blocks and of its tables, with continued lines joined."""
    lines = [line for block in blocks(page, "shell") for line in block.replace("\\\n", " ").splitlines()]
    outside = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`((?:[^`]* )?-m ivl [^`]*)`", outside)
    return [line for line in lines if re.search(r"-m ivl \w", line)]


def arguments(line: str) -> list[str]:
    return [w for w in shlex.split(line.split("-m ivl ", 1)[1], comments=True) if w not in ("&&", "|")]


COMMAND_LINES = [(page, line) for page in PAGES for line in commands(page)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with runs and a base in it, where commands that name one find its config."""
    folder = tmp_path_factory.mktemp("work")
    write_checkpoint(folder / "base")
    for run in (folder / "runs/version_0", folder / "runs/version_1"):
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints/last.ckpt").touch()
        (run / "config.yaml").write_text("model: {pretrained: internvl2-2b}\n")
    (folder / "my.yaml").write_text("data: {batch_size: 2}\n")
    (folder / "project.yaml").write_text(blocks(REPO / "docs/first_project.md", "yaml")[0])
    return folder


class Understood(Exception):
    """The options were read; nothing shall run."""


def understood(*args, **options):
    raise Understood


STOPS = {
    "check": ("ivl.commands.check", "_processor"),
    "chat": ("ivl.commands.chat", "_trained"),
    "export": ("ivl.commands.export", "parse_size"),
    "models": ("ivl.commands.models", "_lines"),
    "pairs": ("ivl.commands.pairs", "atomic_file"),
    "plan": ("ivl.commands.plan", "rows_of"),
    "reproduce": ("ivl.commands.reproduce", "reproduce"),
    "score": ("ivl.eval.score", "main"),
}
"""The first thing each command does with its options"""


class Parser(IvlCLI):
    """The command line as far as its parser: making one takes seconds, reading options with it does not."""

    def parse_arguments(self, parser, args):
        raise Understood(parser)


@pytest.fixture(scope="module")
def lightning():
    """The parser of one of Lightning's commands, made when it is first asked for."""

    @cache
    def parser(command: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["ivl"])
            with pytest.raises(Understood) as stop:
                cli._cli(Parser, [command])
        return stop.value.args[0]

    return parser


def read_options(argv: list[str], lightning, monkeypatch) -> None:
    """Let a command's own parser read its arguments. Raises what the command raises."""
    argv = shipped.with_configs(argv)
    if COMMANDS[argv[0]][0] == "ivl.lit.cli":
        preflight.check(argv[0], [*argv[1:], "--print_config"])
        lightning(argv[0]).parse_args(cli.run_config(argv))
        return
    place, name = STOPS[argv[0]]
    monkeypatch.setattr(importlib.import_module(place), name, understood)
    if argv[0] == "plan":
        monkeypatch.setattr(cli, "read", lambda rest: lightning("fit").parse_args(["fit", *rest])["fit"])
    with pytest.raises(Understood):
        run_command(argv[0], argv[1:])


@pytest.mark.parametrize("line", named(COMMAND_LINES))
def test_a_command_is_understood_by_its_parser(line, workplace, lightning, monkeypatch):
    monkeypatch.chdir(workplace)
    argv = arguments(line)
    if argv[0].startswith("-") or "--help" in argv:
        return
    argv = [word for word in argv if word != "--print_config"]
    for word in argv:
        if word.startswith("configs/"):
            assert (REPO / word).is_file(), word
    read_options(argv, lightning, monkeypatch)


def test_a_wrong_option_is_noticed(workplace, lightning, monkeypatch):
    monkeypatch.chdir(workplace)
    for line in (
        "fit --config demo --data.colour red",
        "fit --config demo --trainer.max_epochs blue",
        "export --colour red",
    ):
        with pytest.raises(Exception, match=r"(?i)colour|blue"):
            read_options(line.split(), lightning, monkeypatch)


YAMLS = [(page, text) for page in PAGES for text in blocks(page, "yaml")]


@pytest.mark.parametrize("text", named(YAMLS))
def test_yaml_is_accepted_on_top_of_a_models_config(text, tmp_path, lightning, monkeypatch):
    assert isinstance(yaml.safe_load(text), dict)
    (tmp_path / "page.yaml").write_text(text)
    read_options(["fit", "--config", "internvl2_2b", "--config", str(tmp_path / "page.yaml")], lightning, monkeypatch)


# -- messages --------------------------------------------------------------------------------------------------------


@cache
def literals() -> list[str]:
    """Texts in the package's source, with `…` for what an f-string fills in."""
    texts = []
    for path in sorted((REPO / "ivl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


MESSAGES = re.findall(r"^\| `([^`]+)` \|", (REPO / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_program(message):
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in literals())


# -- options, Python, links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        target = "".join(target)
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = unquote(target).partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, (
                f"{page.name}: {target}"
            )


PYTHON = [(page, text) for page in PAGES for text in blocks(page, "python")]


@pytest.mark.parametrize("text", named(PYTHON))
def test_python_reads_and_imports_what_is_there(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "ivl":
            if node.module.startswith("ivl.harness."):  # imports a program that is not installed
                source = Path(importlib.util.find_spec(node.module).origin).read_text(encoding="utf-8")
                defined = {getattr(part, "name", None) for part in ast.parse(source).body}
                assert {alias.name for alias in node.names} <= defined
                continue
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


PATHS = [
    (page, path)
    for page in PAGES
    for path in re.findall(r"`((?:ivl|tests|configs|docs|benchmarks)/[\w./-]+)`", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("path", named(sorted(set(PATHS))))
def test_a_path_that_is_named_exists(path):
    assert (REPO / path).exists()


DIFFS = [(page, text) for page in PAGES for text in blocks(page, "diff")]


@pytest.mark.parametrize("text", named(DIFFS))
def test_a_diff_fits_the_present_code(text):
    """Its unchanged and removed lines stand in the file it names, in that order, and what it makes is Python."""
    sources = applied(text)
    assert sources
    for path, source in sources.items():
        compile(source, path, "exec")
