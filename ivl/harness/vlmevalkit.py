"""Adapter of VLMEvalKit: `IvlChat` answers its messages with a model of this program.

    from functools import partial
    from vlmeval.config import supported_VLM
    supported_VLM["mine"] = partial(IvlChat, pretrained="merged")

Questions are written as its own InternVL adapter writes them for most data sets: one picture before the text, several
by their numbers.
"""

from __future__ import annotations

from typing import Any

from vlmeval.vlm.base import BaseModel

from ivl.harness.answers import Answerer

Item = dict[str, str]


def question_of(message: list[Item]) -> tuple[str, list[str], list[str]]:
    """Question, images and videos of a message."""
    images = [item["value"] for item in message if item["type"] == "image"]
    videos = [item["value"] for item in message if item["type"] == "video"]
    texts = [item["value"] for item in message if item["type"] == "text"]
    if len(images) == 1:
        return "<image>\n" + "<video>\n" * len(videos) + "\n".join(texts), images, videos
    words, number = "", 0
    for item in message:
        number += item["type"] == "image"
        words += item["value"] if item["type"] == "text" else f"<Image-{number}>" if item["type"] == "image" else ""
    marks = "".join(f"Image-{n}: <image>\n" for n in range(1, len(images) + 1))
    words = words.replace("".join(f"<Image-{n}>" for n in range(1, len(images) + 1)), "") if images else words
    return marks + "<video>\n" * len(videos) + words, images, videos


class IvlChat(BaseModel):
    """Model of this program for VLMEvalKit."""

    INTERLEAVE = True

    def __init__(self, pretrained: str, **options: Any) -> None:
        """Load a model. `options`: those of `ivl.harness.answers.Answerer`."""
        super().__init__()
        self.answerer = Answerer(pretrained, **options)

    def generate_inner(self, message: list[Item], dataset: str | None = None) -> str:
        """Answer a message."""
        question, images, videos = question_of(message)
        return self.answerer.answer(question, images, videos)
