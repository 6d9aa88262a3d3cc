"""Checks of a row: what its model can take, and where it stands in its file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ivl.architecture.families import ReleasedModel
from ivl.types import Conversation, UserError


def check_abilities(conversation: Conversation, model: ReleasedModel, name: str | None) -> None:
    """Raise UserError for images in several turns, or a video, where a model does not take them.

    `name` None: the model is known by its files alone.
    """
    name = name or "a checkpoint of the V1.5 line (its config.json tells)"
    turns = sum(any(not isinstance(p, str) for p in message.parts) for message in conversation.messages)
    if not model.multi_turn_images and turns > 1:
        raise UserError(
            f"{name} takes images in one turn only, found them in {turns}; "
            f"InternVL2 models such as internvl2-2b take them in any"
        )
    if not model.video and any(medium.kind == "video" for medium in conversation.media):
        raise UserError(f"{name} takes no video; InternVL2 models such as internvl2-2b do")


@contextmanager
def prefix_errors(conversation: Conversation) -> Iterator[None]:
    """Put the row's `file:line` before the messages of errors."""
    try:
        yield
    except UserError as error:
        if not conversation.where:
            raise
        raise type(error)(f"{conversation.where}: {error}") from error
