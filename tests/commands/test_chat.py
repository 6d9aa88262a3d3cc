"""The chat in a pseudo-terminal: the reference document's session, key by key, against the API's answers."""

import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from ivl import Chat, InternVL, Processor
from ivl.__main__ import main
from ivl.chat import Settings
from ivl.commands.chat import LINE, Session, chat, printable, typed_path
from ivl.finetune.adapter.peft_adapter import save_adapter
from ivl.finetune.tune import apply
from ivl.options import ChatSessionOptions, FetchPolicy, LoRA, MediaPolicy, Tune
from ivl.types import Conversation, Message
from tests import tiny
from tests.test_chat import fresh, picture

WAIT = 240.0
"""Seconds until a test gives up; the machine may be busy"""


class Terminal:
    """A command of this program, forked off, at the other end of a pseudo-terminal."""

    def __init__(self, argv: list[str], state: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            status = 1
            try:
                os.environ |= {"XDG_STATE_HOME": str(state), "TERM": "dumb"}
                sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
                signal.signal(signal.SIGINT, signal.default_int_handler)
                status = main(argv)
                sys.stdout.flush()
            finally:
                os._exit(status)
        # Wide enough that no line is broken, or scrolled sideways.
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 10_000, 0, 0))
        self._bytes, self.seen = b"", ""

    def until(self, text: str) -> str:
        """What is printed up to `text`, which is taken too."""
        limit = time.monotonic() + WAIT
        while text not in self.seen:
            self._read(text, limit)
        before, _, rest = self.seen.partition(text)
        self._bytes, self.seen = rest.encode(), rest
        return before

    def printed(self, count: int) -> str:
        """The next characters; they are not taken."""
        limit = time.monotonic() + WAIT
        while len(self.seen) < count:
            self._read(f"{count} characters", limit)
        return self.seen[:count]

    def _read(self, awaited: str, limit: float) -> None:
        left = limit - time.monotonic()
        if left <= 0 or not select.select([self.fd], [], [], left)[0]:
            raise AssertionError(f"{awaited!r} did not come; so far: {self.seen!r}")
        try:
            new = os.read(self.fd, 65536)
        except OSError:  # the other end is closed
            new = b""
        if not new:
            raise AssertionError(f"ended before {awaited!r}; so far: {self.seen!r}")
        self._bytes += new
        self.seen = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", self._bytes.decode("utf-8", "ignore").replace("\r", ""))

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")
        self.until(line + "\n")

    def press(self, key: bytes) -> None:
        os.write(self.fd, key)

    def status(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def start(folder: Path, state: Path, *options: str) -> Terminal:
    terminal = Terminal(["chat", "--model", str(folder), *options], state)
    assert "exit or quit" in terminal.until("<<< ")
    return terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("pictures", ["generated", "shared"])
def test_the_session_of_the_document(folder, tmp_path, pictures, request):
    if pictures == "shared":
        media = request.getfixturevalue("shared") / "media"
        cat, animal = media / "image1.jpg", media / "waterview.jpg"
    else:
        cat, animal = tmp_path / "cat.png", tmp_path / "animal.png"
        picture(1, (90, 60)).save(cat)
        picture(2, (60, 140)).save(animal)
    baby = tmp_path / "baby.gif"
    picture(3).save(baby, save_all=True, append_images=[picture(n) for n in range(4, 14)], duration=100)
    inline = f"image1: <img>{cat}</img> image2: <img>{animal}</img> What is the difference bewteen the two images?"
    chat = Chat(
        InternVL.from_pretrained(folder),
        Processor.from_pretrained(folder, max_tiles=2),
        settings=Settings(max_new_tokens=8),
    )
    terminal = start(folder, tmp_path, "--max_new_tokens", "8", "--max_tiles", "2")
    session: list[tuple[str, list[Path], list[Path]] | str] = [
        ("<image>describe the image", [cat], []),
        ("<image>What is the difference from the last picture", [animal], []),
        ("What the two pictures have in common", [], []),
        "clear",
        ("<video>Describe this video.", [], [baby]),
        "clear",
        (inline, [], []),
    ]
    for step in session:
        if step == "clear":
            terminal.type("clear")
            chat.clear()
        else:
            question, images, videos = step
            terminal.type(question)
            for kind, paths in (("an image", images), ("a video", videos)):
                for path in paths:
                    terminal.until(f"Input {kind} path or URL <<< ")
                    terminal.type(str(path))
            answer = terminal.until(f"\n{LINE}\n")
            assert answer == printable(chat.ask(question, images, videos)), question
        terminal.until("<<< ")
    terminal.type("exit")
    assert terminal.status() == 0
    kept = (tmp_path / "ivl" / "chat_history").read_text().splitlines()
    assert kept[:3] == ["<image>describe the image", str(cat), session[1][0]] and kept[-1] == "exit"


def test_words_of_command_and_what_goes_wrong(folder, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.mp4").touch()
    history = tmp_path / "ivl" / "chat_history"
    history.parent.mkdir()
    history.write_text("typed long ago\n")
    chat = Chat(InternVL.from_pretrained(folder), Processor.from_pretrained(folder), settings=Settings(8))
    terminal = start(folder, tmp_path, "--max_new_tokens", "8", "--max_length", "400")
    terminal.type("<image>What?")
    terminal.until("path or URL <<< ")
    terminal.type("/nowhere/cat.jpg")
    assert "/nowhere/cat.jpg: no such file" in terminal.until("path or URL <<< ")  # the question is kept
    terminal.type("")
    assert "no path given" in terminal.until("<<< ")
    terminal.type("/help")
    assert "<image> or <video> in it asks for a path" in terminal.until("<<< ")
    for mark, path, message in (
        ("<image>", str(tmp_path / "text.jpg"), "text.jpg"),
        ("<video>", str(tmp_path / "empty.mp4"), "empty.mp4"),
        ("<image>", "", "no path given, and the <image> of the question needs one"),
    ):
        terminal.type(f"{mark}What?")
        terminal.until("path or URL <<< ")
        terminal.type(path)
        assert message in terminal.until("<<< ").partition("error: ")[2]
    terminal.type(r"What is \<image> in HTML?")
    assert terminal.until(f"\n{LINE}\n") == printable(chat.ask(r"What is \<image> in HTML?"))
    chat.clear()
    terminal.until("<<< ")
    terminal.type("clear")
    assert "A new conversation." in terminal.until("<<< ")
    for word in ("/nonsense", "/think maybe"):
        terminal.type(word)
        assert f"{word}: no such command; /help lists them" in terminal.until("<<< ")
    terminal.type("/think off")
    assert "Thoughts are folded" in terminal.until("<<< ")
    terminal.type("sheep " * 120)
    terminal.until("tokens with this question, and max_length is 400; start anew")
    terminal.until("<<< ")
    terminal.type("multi-line")
    terminal.until("<<<[M] ")
    terminal.type("How many sheep")
    terminal.until("... ")
    terminal.type("are there?#")
    assert terminal.until(f"\n{LINE}\n") == printable(chat.ask("How many sheep\nare there?"))
    terminal.until("<<<[M] ")
    terminal.type("single-line")
    terminal.until("<<< ")
    terminal.type("reset-system")
    terminal.until("<<<[S] ")
    terminal.type("Be short.")
    terminal.until("<<< ")
    terminal.type("And cats?")
    chat.clear()
    chat.system = "Be short."
    assert terminal.until(f"\n{LINE}\n") == printable(chat.ask("And cats?"))
    terminal.until("<<< ")
    terminal.press(b"\x03")
    terminal.until("<<< ")
    terminal.press(b"\x04")
    assert terminal.status() == 0
    assert history.read_text().startswith("typed long ago\n<image>What?\n/nowhere/cat.jpg\n")


def test_dragged_paths_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.jpg").touch()
    (tmp_path / "back\\slash.jpg").touch()
    for line in (
        f"{tmp_path}/a\\ b.jpg ",
        f"'{tmp_path}/a b.jpg'",
        f'"{tmp_path}/a b.jpg"',
        "~/a\\ b.jpg",
        "~/a b.jpg",
    ):
        assert typed_path(line) == f"{tmp_path}/a b.jpg", line
    assert typed_path(f"file://{tmp_path}/a%20b.jpg") == f"{tmp_path}/a b.jpg"
    assert typed_path(f"{tmp_path}/back\\slash.jpg") == f"{tmp_path}/back\\slash.jpg"


def test_ctrl_c_stops_an_answer_and_not_the_session(folder, tmp_path):
    """What was printed stays, and is what the history holds: the next answer is the one that follows from it."""
    first, second = "How many sheep are there?", "And cats?"
    chat = Chat(InternVL.from_pretrained(folder), Processor.from_pretrained(folder), settings=Settings(3000))
    begin = ""
    for piece in chat.stream(first):
        begin += printable(piece)
        if len(begin) > 20:
            break
    terminal = start(folder, tmp_path, "--max_new_tokens", "3000")
    terminal.type(first)
    assert terminal.until(begin) == "", "greedy answers are the same"
    terminal.press(b"\x03")
    partial = begin + terminal.until(f" [stopped]\n{LINE}\n").replace("^C", "", 1)  # the key's echo
    terminal.until("<<< ")
    terminal.type(second)
    after = terminal.printed(12)
    terminal.press(b"\x03")
    terminal.until("<<< ")
    terminal.type("quit")
    assert terminal.status() == 0
    expected = [answer_after(chat, first, partial, second, more) for more in (0, 1)]
    assert any(text.startswith(after) for text in expected)
    kept = (tmp_path / "ivl" / "chat_history").read_text().splitlines()
    assert kept == [first, second, "quit"]


def answer_after(chat: Chat, first: str, partial: str, second: str, more: int) -> str:
    """How the second answer begins where the first was stopped after `partial` was printed.

    `more`: the key may have been pressed when a further piece was made and not printed yet.
    """
    chat.clear()
    said, pieces = "", chat.stream(first)
    while printable(said) != partial:
        said += next(pieces)
        assert partial.startswith(printable(said))
    said += "".join(next(pieces) for _ in range(more))
    row = {"query": second, "history": [[first, said]]}
    return printable(fresh(chat.model, chat.processor, row, Settings(30)))


def test_one_turn_models_ask_for_media_and_refuse_later_ones(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "InternVL-Chat-V1-5", "InternLM2ForCausalLM")
    picture(1).save(tmp_path / "cat.png")
    terminal = start(folder, tmp_path, "--max_new_tokens", "8")
    terminal.type("Describe this image.")
    terminal.until("Input a media path or URL <<< ")
    terminal.type(str(tmp_path / "cat.png"))
    terminal.until(f"\n{LINE}\n")
    terminal.until("<<< ")
    terminal.type("And <image>?")
    terminal.until("Input an image path or URL <<< ")
    terminal.type(str(tmp_path / "cat.png"))
    assert "internvl-chat-v1_5 takes images in one turn only, found them in 2" in terminal.until("\n<<< ")
    terminal.type("And what else?")
    assert "media path" not in terminal.until(f"\n{LINE}\n")
    terminal.type("exit")
    assert terminal.status() == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "chat: expected --model NAME or a folder, --adapter DIR, or --ckpt_path RUN"),
        (["--model", "internvl9-9b"], "internvl9-9b: neither a folder nor a known model"),
        (["--model.pretrained", "internvl9-9b"], "internvl9-9b: neither a folder nor a known model"),
        (["--model.pretrained=internvl9-9b"], "internvl9-9b: neither a folder nor a known model"),
        (["--adapter", "a", "--ckpt_path", "b"], "--ckpt_path and --adapter: expected one of them"),
        (["--ckpt_path", "/nowhere/run"], "no such folder; expected a run"),
        (["--max_new_tokens", "many"], "max_new_tokens"),
        (["--model", "internvl2-1b", "--device", "tpu"], "device: expected cpu, cuda, cuda:1 and so on, found 'tpu'"),
        (["--model", "internvl2-1b", "--device", "cuda:99"], "device: cuda:99 is not on this machine"),
        (["--model", "internvl2-1b", "--device", "cuda:99", "--dtype", "float32"], "device: cuda:99 is not on this"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, argv, message):
    assert main(["chat", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_adapter_is_put_on_its_model(folder, tmp_path):
    """Its own base is found; the answer is that of the model with the adapter, which differs from the base's."""
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder)
    plain = Chat(model, processor, settings=Settings(8)).ask("How many sheep?")
    made = Tune(language_model=LoRA(rank=4))
    apply(model, made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, made, tmp_path / "adapter", str(folder))
    adapted = Chat(model.eval(), processor, settings=Settings(8)).ask("How many sheep?")
    session = chat(ChatSessionOptions(adapter=str(tmp_path / "adapter"), device="cpu", max_new_tokens=8))
    assert session.chat.ask("How many sheep?") == adapted != plain


def test_a_url_that_hangs_is_one_line(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        fetching = FetchPolicy(timeout=0.2, total_timeout=0.5, retries=0, allow_private=True)
        processor = Processor.from_pretrained(folder, policy=MediaPolicy(fetch=fetching))
        session = Session(Chat(InternVL.from_pretrained(folder), processor, settings=Settings(8)))
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cat.png"
        session._handle(f"<img>{url}</img> What is it?")
        error = capsys.readouterr().err
        assert error.startswith("error: ") and url in error and error.count("\n") == 1
        session._handle("And cats?")
    assert [question for question, _ in session.chat.history] == ["And cats?"]


@pytest.mark.parametrize(
    ("words", "terminal", "printed"),
    [
        (["/think on"], False, "Hm, 3 or 4.\n\nFour."),
        (["/think on"], True, "\x1b[2mHm,\x1b[0m\x1b[2m 3 or 4.\x1b[0m\n\nFour."),
        (["/think off"], True, "(thinking; /think on shows it)\nFour."),
        (["multi-line", "/think off", "/think ON", "single-line"], False, "Hm, 3 or 4.\n\nFour."),
    ],
)
def test_thoughts_are_dimmed_or_folded(folder, monkeypatch, capsys, words, terminal, printed):
    session = Session(Chat(InternVL.from_pretrained(folder), Processor.from_pretrained(folder)))
    pieces = ["<think>", "\nHm,", " 3 or 4.", "</think>", "\n\n", "Four."]
    monkeypatch.setattr(session.chat, "stream", lambda *_: iter(pieces))
    lines = iter([*words, "How many?", "exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    session.run()
    out = capsys.readouterr().out
    assert printed + "\n" + LINE in out and "<think>" not in out


def test_options_of_thinking_and_of_no_system_turn(folder, tmp_path):
    session = chat(ChatSessionOptions(model=str(folder), system="none", thinking=True))
    assert session.chat.system == "none" and session.chat.processor.template.prefill == "<think>\n"
    assert "system" not in session.chat.processor.prompt_text(Conversation((Message("user", ("q",)),), "none"))
