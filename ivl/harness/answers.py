"""Answers to single questions, for the adapters: a model and its processor, a conversation of one turn each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ivl.chat import Chat
from ivl.data.processor import Processor
from ivl.model.internvl import InternVL
from ivl.options import ChatOptions
from ivl.reasoning import split_reasoning


class Answerer:
    """Model that answers one question at a time, greedily unless asked otherwise."""

    def __init__(
        self,
        pretrained: str,
        device: str = "",
        dtype: str = "",
        max_tiles: int | None = None,
        system: str | None = None,
        **settings: Any,
    ) -> None:
        """Load a model by folder or name.

        `device`: "" for a GPU where there is one; `dtype`: "" for bfloat16 on a GPU, float32 on a CPU; `settings`: of
        `ivl.options.ChatOptions`.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        self.model = InternVL.from_pretrained(pretrained, device=device, dtype=dtype)
        self.processor = Processor.from_pretrained(pretrained, max_tiles=max_tiles)
        self.system = system
        self.settings = ChatOptions(**settings)

    def answer(
        self,
        question: str,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        stop: Sequence[str] = (),
        **settings: Any,
    ) -> str:
        """Return the answer without its thought, up to the first of the texts `stop`."""
        chat = Chat(self.model, self.processor, self.system, replace(self.settings, **settings))
        answer = split_reasoning(chat.ask(question, images, videos))[1]
        return answer[: min((at for text in stop if text and (at := answer.find(text)) >= 0), default=len(answer))]
