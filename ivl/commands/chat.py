"""Conversation in the terminal, line by line: `python -m ivl chat --model NAME`.

    a typed line → a word of command, or a question with its media → the answer, token by token

Ctrl-C stops an answer, or drops the line that is being typed; Ctrl-D ends the session.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import torch

from ivl.architecture.families import find_model
from ivl.chat import PLAIN_TAG, Chat
from ivl.commands.export import Trained, read_run
from ivl.data.media.source import is_url
from ivl.data.processor import Processor
from ivl.finetune.adapter import peft_adapter as adapting
from ivl.hub import resolve, resolve_adapter
from ivl.model.internvl import InternVL
from ivl.options import ChatSessionOptions, FetchPolicy, MediaPolicy
from ivl.parallel.devices import device_of
from ivl.reasoning import ReasoningStream
from ivl.system_text import system_text
from ivl.types import UserError, printable

WORDS = r"""Type a question; <image> or <video> in it asks for a path or URL, <img>PATH</img> names one.
\<image>: the tag as plain characters, to ask about it   Find <ref>the dog</ref>: its box, in thousandths
clear: a new conversation   reset-system: another system message   multi-line, single-line: how questions end
/think on, /think off: thoughts shown or folded   /help: these lines
exit or quit: leave (also Ctrl-D)   Ctrl-C: stop an answer"""

WORDS_ALONE = ("exit", "quit", "clear", "reset-system", "single-line", "/think on", "/think off", "/help")
"""Words of command that need no end of a question of several lines."""

LINE = "-" * 50
CUT = {
    "length": "the answer is cut off at max_new_tokens {}; a larger --max_new_tokens lets it go on",
    "context": "the answer is cut off, since the model's context is full; `clear` begins anew",
}
"""Finish reason of an answer that is cut off → the note printed under it."""
_COMMAND = re.compile(r"/[a-z][a-z_-]*|/think .*")
"""Lines that look like words of command"""
_MARK = re.compile(r"<(image|video)>")
_NAMED = {"image": "Input an image path or URL <<< ", "video": "Input a video path or URL <<< "}
_ANY = "Input a media path or URL <<< "

FETCHING = FetchPolicy(timeout=10, total_timeout=120, retries=1)
"""Shorter timeouts for interactive use."""


class Session:
    """Loop over typed lines, until the end of the session."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.several_lines = False
        self.shows_thoughts = True
        abilities = chat.processor.abilities
        self.asks_for_media = abilities is not None and not abilities.multi_turn_images
        """Prompt for media with the first question: the model takes images in one turn only, so nobody writes marks."""

    def run(self) -> None:
        """Read lines until `exit`, `quit` or the end of the input."""
        print(WORDS)
        while True:
            try:
                text = self._read("<<<[M] " if self.several_lines else "<<< ")
                if text.strip().lower() in ("exit", "quit"):
                    return
                self._handle(text)
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return

    def _handle(self, text: str) -> None:
        """Run one command word, or answer one question of one or more lines."""
        word = text.strip().lower()
        if not word:
            return
        if word == "clear":
            self.chat.clear()
            print("A new conversation.")
        elif word == "reset-system":
            system = self._read("<<<[S] ")
            self.chat.clear()
            self.chat.system = system_text(system)
            print("A new conversation with this system message.")
        elif word in ("/help", "/?"):
            print(WORDS)
        elif word.split() in (["/think", "on"], ["/think", "off"]):
            self.shows_thoughts = word.endswith("on")
            print("Thoughts are shown." if self.shows_thoughts else "Thoughts are folded to one line.")
        elif word in ("multi-line", "single-line"):
            self.several_lines = word == "multi-line"
            print("A question ends with a line that ends in #." if self.several_lines else "A question is one line.")
        elif _COMMAND.fullmatch(word):
            print(f"{word}: no such command; /help lists them. A question that begins with / needs a second word.")
        else:
            try:
                self._answer(text)
            except (UserError, torch.OutOfMemoryError) as error:
                sys.stdout.flush()
                print(f"error: {_line(error)}", file=sys.stderr, flush=True)

    def _read(self, prompt: str) -> str:
        line = input(prompt)
        _remember(line)
        if not self.several_lines or " ".join(line.lower().split()) in WORDS_ALONE:
            return line
        lines = [line]
        while not lines[-1].rstrip().endswith("#"):
            lines.append(input("... "))
            _remember(lines[-1])
        return "\n".join(lines).rstrip().removesuffix("#")

    def _answer(self, text: str) -> None:
        media: dict[str, list[str]] = {"image": [], "video": []}
        marked = PLAIN_TAG.sub("", text)
        for kind in _MARK.findall(marked):
            needed = f"the <{kind}> of the question needs one; \\<{kind}> is the tag as plain characters"
            media[kind].append(self._path(_NAMED[kind], needed))
        if self.asks_for_media and not self.chat.history and not any(media.values()) and "<img>" not in marked:
            media["image"] = [path for path in [self._path(_ANY)] if path]
        pieces = self.chat.stream(text, media["image"], media["video"])
        printer = AnswerPrinter(self.shows_thoughts)
        try:
            for piece in pieces:
                printer.print(piece)
            printer.finish()
        except KeyboardInterrupt:
            pieces.close()
            printer.finish()
            print(" [stopped]", end="")
        print(f"\n{LINE}")
        for note in self.chat.notes:
            print(f"note: {printable(note, ' ')}")
        if (reason := self.chat.finish_reason) in CUT:
            print(f"note: {CUT[reason].format(self.chat.settings.max_new_tokens)}")

    def _path(self, prompt: str, needed: str = "") -> str:
        """Ask for a path or URL until there is such a file, so that the question need not be typed again."""
        while True:
            line = input(prompt)
            _remember(line)
            path = typed_path(line)
            if not path and needed:
                raise UserError(f"no path given, and {needed}")
            if not path or is_url(path) or path.startswith("data:") or os.path.exists(path):
                return path
            print(f"error: {printable(path, ' ')}: no such file; give another path, or none to drop the question")


def typed_path(line: str) -> str:
    """Path in a typed or dragged line: in quotes, with `\\ ` for a blank, with `~`, or as a file: URL."""
    line = line.strip()
    if len(line) > 1 and line[0] == line[-1] and line[0] in "'\"":
        line = line[1:-1]
    elif line.startswith("file://"):
        line = unquote(urlsplit(line).path)
    elif os.sep == "/" and "\\" in line and not os.path.exists(line):
        line = re.sub(r"\\(.)", r"\1", line)
    return str(Path(line).expanduser()) if line.startswith("~") else line


DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class AnswerPrinter:
    """Prints an answer piece by piece: its thought dimmed, or folded to one line."""

    def __init__(self, shows_thoughts: bool) -> None:
        self.shows_thoughts = shows_thoughts
        self._dims = sys.stdout.isatty()
        self._stream = ReasoningStream()
        self._thought = 0
        """Characters of the thought so far"""
        self._answered = False

    def print(self, piece: str) -> None:
        for is_thought, text in self._stream.add(piece):
            self._write(is_thought, text)

    def finish(self) -> None:
        """Print what was held back."""
        for is_thought, text in self._stream.rest():
            self._write(is_thought, text)

    def _write(self, is_thought: bool, text: str) -> None:
        if is_thought and not self._thought and not (text := text.lstrip()):
            return
        if not is_thought and self._thought and not self._answered:
            print("\n" * (2 if self.shows_thoughts else 1), end="")
            text = text.lstrip()
        self._answered |= not is_thought
        if not is_thought:
            print(printable(text), end="", flush=True)
        elif self.shows_thoughts:
            shown = printable(text)
            print(f"{DIM}{shown}{PLAIN}" if self._dims else shown, end="", flush=True)
        elif not self._thought:
            print("(thinking; /think on shows it)", end="", flush=True)
        self._thought += len(text) if is_thought else 0


def _line(error: Exception) -> str:
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    return f"out of memory ({' '.join(str(error).split())[:120]}); `clear`, ask with fewer tiles, or use more devices"


# -- lines typed before ------------------------------------------------------------------------------------------


def history_file() -> Path:
    """File with the history of lines, by the XDG rules."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ivl" / "chat_history"


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # not everywhere a part of Python; then lines are typed without editing
        return None
    return readline


def _recall() -> None:
    """Load the lines of earlier sessions for the arrow keys."""
    readline, path = _readline(), history_file()
    if readline is None or not sys.stdin.isatty():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.set_history_length(-1)
        readline.set_auto_history(False)
        readline.read_history_file(path)
    except OSError as error:
        print(f"note: {path}: lines are not kept ({error.strerror})")


def _remember(line: str) -> None:
    """Append a line to the history at once: other sessions lose nothing, nor does a killed one."""
    readline = _readline()
    if readline is None or not line.strip() or not sys.stdin.isatty():
        return
    readline.add_history(line)
    try:
        readline.append_history_file(1, history_file())
    except OSError:
        return  # `_recall` printed a note at the start


# -- the command -------------------------------------------------------------------------------------------------


def chat(options: ChatSessionOptions) -> Session:
    """Load a model for a session in the terminal."""
    trained = _trained(options)
    gpu = torch.cuda.is_available()
    where = ("cuda" if gpu else "cpu") if options.device == "auto" else options.device
    split = any(one is not None for one in (options.devices, options.device_max_memory, options.device_map))
    on_cpu = not split and device_of(where).type == "cpu"
    dtype = ("float32" if on_cpu else "bfloat16") if options.dtype == "auto" else options.dtype
    loaded = InternVL.from_pretrained(
        resolve(trained.base),
        dtype,
        where,
        options.attention,
        options.quantize or trained.quantize,
        options.devices,
        options.device_max_memory,
        options.device_map,
    )
    loaded = trained.onto(loaded)
    if split:
        print(f"layers over devices: {loaded.hf_device_map}")
    processor = Processor.from_pretrained(
        trained.base,
        max_tiles=trained.max_tiles if options.max_tiles is None else options.max_tiles,
        max_length=None,
        policy=MediaPolicy(fetch=FETCHING),
        **trained.processing | ({} if options.thinking is None else {"thinking": options.thinking}),
    )
    # A folder that was downloaded by hand keeps the model's name, and with it the model's abilities.
    processor.released = processor.released or find_model(Path(trained.base).name)
    return Session(Chat(loaded, processor, options.system, options.settings, options.max_length))


def _trained(options: ChatSessionOptions) -> Trained:
    if options.ckpt_path is not None:
        return read_run(options.ckpt_path, "--ckpt_path", options.model)
    if options.adapter is not None:
        folder = resolve_adapter(options.adapter)
        base = adapting.base_of(folder, options.model, "--model")
        if note := adapting.other_base(folder, base):
            print(f"note: {printable(note, ' ')}")
        return Trained(base, adapter=folder, where=options.adapter)
    return Trained(str(options.model))


def main(options: ChatSessionOptions) -> int:
    """Run the command. Returns 0. Raises UserError for a user's mistake."""
    session = chat(options)
    _recall()
    session.run()
    return 0
