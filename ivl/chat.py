"""Conversation with a model, turn by turn: `Chat`, `inference` and `inference_stream`.

The template writes the full conversation at every turn, and the tokens of an earlier prefix are not computed again
(`ivl.inference.prefix_cache`): an answer is that of a fresh prompt, at the price of the new tokens. `inference` and
`inference_stream` are the functions of the reference document.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Generator, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from ivl.data.media.tiler import MediaCache
from ivl.data.processor import Processor
from ivl.inference.engine import Engine
from ivl.inference.generate import stream_request
from ivl.inference.graphs import StepRunner
from ivl.inference.prefix_cache import PrefixCache
from ivl.inference.request import Request
from ivl.inference.sampling import FinishReason, StoppingCriteria
from ivl.model.internvl import InternVL
from ivl.options import ChatOptions
from ivl.reasoning import split_reasoning
from ivl.system_text import system_text
from ivl.types import Conversation, Message, UserError

Settings = ChatOptions
"""Options of the answers: length and sampling."""

PLAIN_TAG = re.compile(r"\\<(?=/?(?:image|video|img)>)")
r"""Backslash and bracket of `\<image>`, `\<video>` or `\<img>` in a question: the tag as plain characters."""
TAG = re.compile(r"<(?=/?(?:image|video|img)>)")
"""Bracket of such a tag"""
_HIDDEN = "<\0"
"""Bracket of a plain tag while media are put in place of marks; no text is typed with it."""


class Chat:
    """Conversation with a model. `ask` returns an answer, `stream` yields its text; both add it to the history.

    An answer that is stopped (`stream` closed, or interrupted) stays in the history as far as it came, and a turn
    that fails leaves no trace.
    """

    def __init__(
        self,
        model: InternVL,
        processor: Processor,
        system: str | None = None,
        settings: Settings | None = None,
        max_length: int | None = None,
    ) -> None:
        """Start a conversation.

        `system`: system message instead of the checkpoint's, or a name of `ivl.system_text`. `max_length`: most tokens
        of a conversation with its last question, instead of the model's context. A limit of the processor does not
        count: nothing is left out to make a question fit.
        """
        self.model = model
        self.processor = copy(processor)
        self.processor.max_length = None
        self.system = system_text(system)
        self.settings = settings or Settings()
        context = model.language_model.config.max_position_embeddings
        self.max_length = context if max_length is None else min(max_length, context)
        self.context = context
        self.finish_reason: FinishReason | None = None
        """Reason why the last answer ended: stop, length (`max_new_tokens`) or context (the model's is full). None: it
        was stopped from outside."""
        self.notes: Sequence[str] = ()
        """Marks in the last question that have no effect."""
        self.prefix_cache = PrefixCache()
        """Keys and values of the tokens that the model has read."""
        self._runner = StepRunner(model.language_model, model.device)
        self._messages: tuple[Message, ...] = ()
        self._opened = MediaCache()

    @property
    def reasoning(self) -> str | None:
        """Thought of the last answer, None where it has none; `response` is the rest."""
        return self._split()[0]

    @property
    def response(self) -> str:
        """Last answer without its thought."""
        return self._split()[1]

    def _split(self) -> tuple[str | None, str]:
        return split_reasoning(self._messages[-1].text if self._messages else "")

    @property
    def history(self) -> list[list[str]]:
        r"""Pairs [question, answer] of the turns, as `inference` takes them.

        Media as their marks, tags that are plain characters of a question as `\<image>`, answers with their thoughts.
        """
        questions = [_as_typed(message) for message in self._messages[::2]]
        return [list(pair) for pair in zip(questions, (message.text for message in self._messages[1::2]))]

    def clear(self) -> None:
        """Start anew, with the same system message."""
        self._messages = ()
        self._opened = MediaCache()
        self.prefix_cache.forget()

    def ask(self, query: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), prefix: str = "") -> str:
        r"""Return the answer to a question about these media and the conversation so far, with its thought if any.

        `<image>` and `<video>` in the question are the places of media; without marks they come first. `images`:
        paths, URLs, `data:` URIs, bytes or PIL images; a path may also be written as `<img>path</img>`. `\<image>` is
        the tag as plain characters, to ask about it.
        `prefix`: beginning of the answer, from which the model goes on.
        Raises UserError for media that cannot be opened or do not match the marks, and where there is no room left.
        """
        return "".join(self.stream(query, images, videos, prefix))

    def stream(
        self, query: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), prefix: str = ""
    ) -> Generator[str, None, None]:
        """Yield pieces of the answer, a prefix first; together they are the answer of `ask`."""
        return self._answer(self._message(query, images, videos), prefix)

    def _message(self, query: str, images: Sequence[Any], videos: Sequence[Any]) -> Message:
        shown = PLAIN_TAG.sub(_HIDDEN, query)
        for mark, media in (("<image>", images), ("<video>", videos)):
            if mark in shown and not media:
                kind = mark.strip("<>")
                raise UserError(f"{shown.count(mark)} {mark} marks but no {kind}; add the {kind} or drop a mark")
        conversation = _parsed(self.processor, query, (), images, videos)
        self.notes = conversation.unread
        return conversation.messages[-1]

    def _answer(self, message: Message, prefix: str = "") -> Generator[str, None, None]:
        conversation = Conversation((*self._messages, message), self.system, prefix=prefix)
        example = self.processor(conversation, opened=self._opened)
        self._check_room(len(example))
        engine = self._engine()
        request = Request(0, example.input_ids, example.tiles, seed=self.settings.seed)
        begun = "" if prefix else self.processor.template.begun
        decoder, self.finish_reason = StreamDecoder(self.processor, begun, prefix), None
        try:
            if prefix:
                yield prefix
            for token in stream_request(engine, request):
                if token not in engine.criteria.eos_ids and (piece := decoder.add(token)):
                    yield piece
            if piece := decoder.rest():
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._add_turn(message, decoder.text)
            raise
        self.finish_reason = request.answer.finish_reason
        self._add_turn(message, decoder.text, empty=True)

    def _engine(self) -> Engine:
        """Return an engine for one answer, on the conversation's cache."""
        settings = self.settings
        criteria = StoppingCriteria([*self.processor.stop_ids, *self.model.eos_ids])
        return Engine(
            self.model,
            criteria,
            settings,
            settings.max_new_tokens,
            prefix_cache=self.prefix_cache,
            runner=self._runner,
        )

    def _check_room(self, length: int) -> None:
        """Raise UserError where a conversation of that many tokens is too long to be answered."""
        if length > self.max_length or length >= self.context:
            limit = "the model's context" if self.max_length == self.context else "max_length"
            raise UserError(
                f"the conversation has {length} tokens with this question, and {limit} is {self.max_length}; start "
                "anew (clear), or use fewer tiles"
            )

    def _add_turn(self, message: Message, answer: str, empty: bool = False) -> None:
        if answer or empty:
            self._messages = (*self._messages, message, Message("assistant", (answer,)))


def _parsed(
    processor: Processor,
    query: str,
    history: Sequence[Sequence[str]],
    images: Sequence[Any],
    videos: Sequence[Any],
) -> Conversation:
    r"""Return a conversation whose questions have `\<image>` for a tag that is plain characters."""
    turns = [[PLAIN_TAG.sub(_HIDDEN, question), answer] for question, answer in history]
    row = {"query": PLAIN_TAG.sub(_HIDDEN, query), "history": turns, "images": list(images), "videos": list(videos)}
    conversation = processor.parse(row)
    return replace(conversation, messages=tuple(_with_tags(message) for message in conversation.messages))


def _with_tags(message: Message) -> Message:
    """Return a message whose plain tags have their brackets again."""
    return replace(
        message, parts=tuple(part.replace(_HIDDEN, "<") if isinstance(part, str) else part for part in message.parts)
    )


def _as_typed(message: Message) -> str:
    r"""Text of a question as a user types it: media as marks, tags that are plain characters as `\<image>`."""
    parts = [TAG.sub(r"\\<", part) if isinstance(part, str) else f"<{part.kind}>" for part in message.parts]
    return "".join(parts)


class StreamDecoder:
    """Incremental decoder: token ids → complete characters, without blanks around the answer."""

    def __init__(self, processor: Processor, begun: str = "", prefix: str = "") -> None:
        """`begun`, `prefix`: text of the answer that the prompt ends with, of the template and of a caller."""
        self._begun = begun
        tokenizer = processor.tokenizer
        self.text = prefix
        """Text so far."""
        self._bytes_of = tokenizer.token_bytes
        self._skipped = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        # A character may be spread over several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._blanks = ""

    def add(self, token: int) -> str:
        """Return the text that a token completes."""
        return "" if token in self._skipped else self._emit(self._decoder.decode(self._bytes_of(token)))

    def rest(self) -> str:
        """Return the rest of an answer that ended inside a character."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, new: str) -> str:
        text = self._blanks + new
        if not self.text and (text := text.lstrip()):
            text = self._begun + text
        piece = text.rstrip()
        self._blanks = text[len(piece) :]
        self.text += piece
        return piece


def inference_stream(
    model: InternVL,
    processor: Processor,
    query: str,
    history: Sequence[Sequence[str]] = (),
    system: str | None = None,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    settings: Settings | None = None,
) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield (answer so far, history with it), as the reference document's function. Nothing is remembered.

    `images` are those of the full conversation, in order. Raises UserError as `Chat.ask` does.
    """
    conversation = _parsed(processor, query, history, images, videos)
    chat = Chat(model, processor, system, settings)
    chat._messages = conversation.messages[:-1]
    turns = [list(pair) for pair in history]
    answer = ""
    for piece in chat._answer(conversation.messages[-1]):
        answer += piece
        yield answer, [*turns, [query, answer]]
    if not answer:
        yield answer, [*turns, [query, answer]]


def inference(
    model: InternVL,
    processor: Processor,
    query: str,
    history: Sequence[Sequence[str]] = (),
    system: str | None = None,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    settings: Settings | None = None,
) -> tuple[str, list[list[str]]]:
    """Return (answer, history with it), as the reference document's function. Arguments: see `inference_stream`."""
    *_, last = inference_stream(model, processor, query, history, system, images, videos, settings)
    return last
