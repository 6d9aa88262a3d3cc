"""Turns that are learnt from, by `data.learn` and by what a row says itself."""

from __future__ import annotations

from dataclasses import replace

from ivl.options.data import Learn
from ivl.types import Conversation, UserError


def with_learnt_turns(conversation: Conversation, learn: Learn) -> Conversation:
    """Return the conversation with `trained` of each answer as `learn` says; a turn that its row marks stays so."""
    if learn == "all":
        return conversation
    last = max((n for n, message in enumerate(conversation.messages) if message.role == "assistant"), default=-1)
    messages = tuple(
        message if message.marked else replace(message, trained=learn == "last_answer" and n == last)
        for n, message in enumerate(conversation.messages)
    )
    return replace(conversation, messages=messages)


def nothing_learnt(conversation: Conversation, learn: Learn) -> str:
    """Reason why no answer of a row is learnt from, for a message; empty where one is."""
    answers = [message for message in conversation.messages if message.role == "assistant"]
    if any(message.trained for message in answers):
        return ""
    if learn != "all" and not any(message.marked for message in answers):
        return f"data.learn is {learn}, and no turn says that it is learnt from"
    return "its turns say that none is learnt from"


def check_pairs(learn: Learn) -> None:
    """Raise UserError for a choice of turns that means nothing for pairs of answers."""
    if learn == "marked":
        raise UserError(
            "data.learn: marked, and model.objective compares pairs by their last answers; leave it out, or train with "
            "model.objective sft"
        )
