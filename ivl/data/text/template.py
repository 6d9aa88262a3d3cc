"""Prompt templates: conversation and tiles per image → token ids and labels, span by span.

A template is an entry of TEMPLATES. Source of the texts: OpenGVLab/InternVL, internvl_chat/internvl/conversation.py.

Added tokens that are recognised, by the author of a text:
- the template: all of them;
- system and user texts: those that are no control tokens (`<think>`, `<tool_response>`), and the grounding tokens
  (`<ref>`, `<box>`, `<quad>` and their ends). `<IMG_CONTEXT>`, `<img>`, `<|im_end|>`, `</s>` and the like written by a
  user are plain characters;
- an assistant's text: all but the image tokens, as the reference reads it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ivl.data.text.tokenizer import GROUNDING_TOKENS, IMAGE_TOKENS, Tokenizer
from ivl.data.text.tokenizer import Span as Piece
from ivl.options.media import frame_text
from ivl.reasoning import BEGUN, CLOSING, OPENING
from ivl.system_text import NONE
from ivl.types import IGNORE, Conversation, Media, Message, UserError

SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class Thoughts:
    """Rules for the thoughts of answers, as a checkpoint's own chat template writes them."""

    opening: str = BEGUN
    closing: str = "\n</think>\n\n"
    in_history: bool = True
    """False: answers before the last question lose their thoughts, and those in a text are written anew by the rules"""
    empty: bool = False
    """Write an empty thought before a last answer that has none"""


@dataclass(frozen=True)
class Template:
    """Texts around the messages of a conversation. `answer` ends where the model's words begin."""

    name: str
    system_message: str
    """Default where neither the row nor the checkpoint has one"""
    system: str
    user: str
    answer: str
    end: str
    """Closes every message; after an answer it is trained on, and stops generation"""
    gap: str = ""
    """Follows `end`, never trained on"""
    lead: str = ""
    """Text between `answer` and an answer; it counts as part of the answer"""
    user_end: str | None = None
    """End of system and user messages; None: `end` + `gap`"""
    strip: bool = False
    """Drop blanks around a message in training. A prompt keeps them: the reference's chat drops none"""
    every_turn: bool = False
    """Keep an answer before the first question, and in training the end of an empty answer; both are learnt from"""
    prefill: str = ""
    """Text after `answer` at the end of a prompt, never before an answer of a row, be it a beginning alone
    (`Conversation.prefix`): `<think>` of thinking models"""
    thoughts: Thoughts = Thoughts()

    @property
    def after_user(self) -> str:
        return self.end + self.gap if self.user_end is None else self.user_end

    @property
    def begun(self) -> str:
        """Text of `prefill` that belongs to the answer: a thought that it begins and leaves open."""
        return self.prefill if OPENING in self.prefill and CLOSING not in self.prefill else ""

    def has_token(self, token: str) -> bool:
        """True for an added token among the template's own words."""
        words = (self.system, self.user, self.answer, self.after_user, self.end)
        return any(token in text for text in words)


_CHATML = ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>")

TEMPLATES: dict[str, Template] = {
    row.name: row
    for row in (
        Template("internlm2-chat", SYSTEM_2, *_CHATML, strip=True),
        Template("Hermes-2", SYSTEM_2, *_CHATML),
        Template("internvl2_5", SYSTEM_2_5, *_CHATML, gap="\n", every_turn=True),
        Template("phi3-chat", SYSTEM_2, "<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>"),
        Template("internvl_zh", "", "", "<human>: ", "<bot>:", "</s>", lead=" ", user_end=" "),
    )
}


def find_template(name: str) -> Template:
    """Template of a config's `template`. Raises UserError listing the known names."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise UserError(
            f"template: {name!r} is not one this program knows; expected one of {', '.join(sorted(TEMPLATES))}"
        ) from None


def release_system_message(folder: Path, template: Template) -> str | None:
    """Default system message of a template in a release's `conversation.py`; None where there is none.

    The V1.5 line and InternVL2 have different ones under one template name. The file is parsed, never executed.
    """
    path = folder / "conversation.py"
    if not path.is_file():
        return None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not Python ({error}); restore it from the release, or remove it") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Conversation":
            values = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            message = values.get("system_message")
            if values.get("name") == template.name and isinstance(message, str):
                return message
    return None


Kind = Literal["template", "user", "answer", "image"]
Span = tuple[Kind, "str | int", bool]
"""Author, text (of an image: the number of its tokens), and True if it is trained on"""


def spans(
    conversation: Conversation,
    tiles: Sequence[Sequence[int]],
    template: Template,
    tokens_per_tile: int,
    system_message: str | None = None,
    frame_prefix: str = "Frame{i}: ",
    times: Sequence[Sequence[float]] = (),
) -> Iterator[Span]:
    """Spans of a conversation as a template writes it.

    `tiles`: for each medium the tiles of its image, or of each frame of its video. `system_message`: the checkpoint's,
    used where the row has none; NONE: no system turn. `times`: for each medium the seconds of its frames, where
    `frame_prefix` has them. A conversation that ends with an answer is written as the reference's trainer does, a
    prompt as its chat does; they differ in blanks and empty answers (`Template.strip` and `every_turn`).
    """
    counts, seconds = iter(tiles), iter(times)
    system = conversation.system
    if system is None:
        system = template.system_message if system_message is None else system_message
    if conversation.tools:
        system = conversation.tools if system in ("", NONE) else f"{system}\n\n{conversation.tools}"
    if system != NONE:
        yield "template", template.system, False
        yield "user", system, False
        yield "template", template.after_user, False
    messages = conversation.messages
    training = messages[-1].role == "assistant"
    last_question = max((n for n, message in enumerate(messages) if _asks(message)), default=-1)
    for n, message in enumerate(messages):
        if n == 0 and message.role == "assistant" and not template.every_turn:
            continue
        parts = _stripped(message) if template.strip and training else message.parts
        if message.role == "user":
            yield "template", template.user, False
            yield from _user_spans(parts, counts, tokens_per_tile, frame_prefix, seconds)
            yield "template", template.after_user, False
            continue
        yield "template", template.answer, False
        text = "".join(part for part in parts if isinstance(part, str))
        text = _with_thought(text, message.reasoning, template.thoughts, n < last_question)
        if text or (template.every_turn and training):
            yield "answer", template.lead + text, message.trained
            yield "template", template.end, message.trained
            yield "template", template.gap, False
    if conversation.messages[-1].role == "user":
        yield "template", template.answer + ("" if conversation.prefix else template.prefill), False
        if conversation.prefix:
            yield "answer", template.lead + conversation.prefix, False


def _asks(message: Message) -> bool:
    """True for a user's question, False for an answer and for a tool's result, as Qwen3's chat template has it."""
    text = message.text
    return message.role == "user" and not (text.startswith("<tool_response>") and text.endswith("</tool_response>"))


def _with_thought(text: str, thought: str | None, rules: Thoughts, earlier: bool) -> str:
    """Write an answer with its thought. `earlier`: a question follows it."""
    if thought is None and not rules.in_history and CLOSING in text:
        # As Qwen3's chat template cuts a text: at its first end of a thought, and at its last
        thought = text.split(CLOSING)[0].split(OPENING)[-1]
        text = text.split(CLOSING)[-1].lstrip("\n")
    if earlier and not rules.in_history:
        return text
    if thought is None and (earlier or not rules.empty):
        return text
    return rules.opening + (thought or "").strip("\n") + rules.closing + text.lstrip("\n")


def _user_spans(
    parts: Sequence[str | Media],
    counts: Iterator[Sequence[int]],
    tokens_per_tile: int,
    frame_prefix: str,
    times: Iterator[Sequence[float]],
) -> Iterator[Span]:
    for n, part in enumerate(parts):
        if isinstance(part, str):
            yield "user", part, False
            continue
        seconds = next(times, ())
        if part.kind == "image":
            yield "image", sum(next(counts)) * tokens_per_tile, False
        else:
            for i, count in enumerate(next(counts), start=1):
                text = frame_text(frame_prefix, i, seconds[i - 1] if seconds else 0.0)
                yield "user", "\n" * (i > 1) + text, False
                yield "image", count * tokens_per_tile, False
            following = parts[n + 1] if n + 1 < len(parts) else ""
            if not (isinstance(following, str) and following.startswith("\n")):
                yield "user", "\n", False


def _stripped(message: Message) -> tuple:
    """Parts of a message without the blanks at both ends."""
    parts = list(message.parts)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return tuple(parts)


def encode(
    conversation: Conversation,
    tiles: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    template: Template,
    tokens_per_tile: int,
    system_message: str | None = None,
    frame_prefix: str = "Frame{i}: ",
    times: Sequence[Sequence[float]] = (),
) -> tuple[list[int], list[int]]:
    """Token ids and labels (IGNORE where not trained on), both of length T. Arguments as in `spans`.

    A token that begins in the template's words and reaches into the answer is not trained on.
    """
    everything = frozenset(tokenizer.added)
    ordinary = {token for token in tokenizer.ordinary - IMAGE_TOKENS if not template.has_token(token)}
    user = (GROUNDING_TOKENS & everything) | ordinary
    read = {"template": everything, "user": user, "answer": everything - IMAGE_TOKENS}
    opening, context, closing = (tokenizer.token_id(t) for t in ("<img>", "<IMG_CONTEXT>", "</img>"))
    pieces: list[Piece] = []
    settings = (template, tokens_per_tile, system_message, frame_prefix, times)
    for kind, content, trained in spans(conversation, tiles, *settings):
        if isinstance(content, str):
            pieces.append((content, read[kind], trained))
        else:
            pieces.append(([opening, *[context] * content, closing], (), trained))
    ids, flags = tokenizer.encode_spans(pieces, bos=True)
    return ids, [token if flag else IGNORE for token, flag in zip(ids, flags, strict=True)]


def written(
    conversation: Conversation,
    tiles: Sequence[Sequence[int]] | None,
    template: Template,
    tokens_per_tile: int,
    system_message: str | None = None,
    frame_prefix: str = "Frame{i}: ",
    times: Sequence[Sequence[float]] = (),
) -> str:
    """Text that `encode` turns into ids, image tokens written out. Arguments as in `spans`.

    `tiles` None: media as their marks.
    """
    if tiles is None:
        messages = (replace(message, parts=(message.text,)) for message in conversation.messages)
        conversation, tiles = replace(conversation, messages=tuple(messages)), ()
    out = ""
    for _, content, _ in spans(conversation, tiles, template, tokens_per_tile, system_message, frame_prefix, times):
        out += content if isinstance(content, str) else "<img>" + "<IMG_CONTEXT>" * content + "</img>"
    return out
