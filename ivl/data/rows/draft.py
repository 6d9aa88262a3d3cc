"""Draft of a conversation, as a row's format reads it, before media and boxes are put in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ivl.data.rows.keys import thought_of
from ivl.data.rows.row_reader import Row, optional_text, text_of
from ivl.system_text import NONE
from ivl.types import Media, UserError
from ivl.types import shortened as short

Role = Literal["user", "assistant"]


@dataclass
class Turn:
    """Turn of one speaker; a tool's result is a user's."""

    role: Role
    content: list[str | Media]
    learnt: bool | None = None
    """True or False where the row says if it is learnt from"""
    is_prefix: bool = False
    """True for the beginning of the answer that is asked for"""
    thought: list[str | Media] = field(default_factory=list)
    """Text of the thought before an answer, if any"""
    is_tool: bool = False
    """True for a call of a tool, or a tool's result"""

    @property
    def reasoning(self) -> str | None:
        return "".join(part for part in self.thought if isinstance(part, str)) if self.thought else None


@dataclass
class Draft:
    """Conversation as a format reads it."""

    turns: list[Turn]
    system: str | None = None
    media_first: bool = False
    """Put media without marks into the first user's turn, not the last"""
    media: dict[str, list[Media]] = field(default_factory=dict)

    @property
    def is_prompt(self) -> bool:
        """True if an answer, or the rest of one, is asked for."""
        return self.turns[-1].role == "user" or self.turns[-1].is_prefix


def thought_parts(entry: Row, name: str, turn: Turn) -> list[str | Media]:
    """Content of a turn's thought: none, or one text."""
    answer = "".join(part for part in turn.content if isinstance(part, str)) if turn.role == "assistant" else None
    thought = thought_of(entry, name, answer)
    if thought is not None and turn.is_prefix:
        raise UserError(f"{name or 'row'}: a thought apart, and the beginning of an answer; write both in its text")
    return [] if thought is None else [text_of(thought, f"{name}: thought")]


def system_of(row: Row) -> str | None:
    """Text of the row's key `system`, None where it has none; false: no system turn."""
    return NONE if row.get("system") is False else optional_text(row, "system")


def one_system(of_row: str | None, of_turn: str, name: str) -> str:
    """System message of a turn. Raises UserError where the row's key `system` differs from it."""
    if of_row and of_row != of_turn:
        raise UserError(f"system and {name}: two system messages, {short(of_row)} and {short(of_turn)}; keep one")
    return of_turn
