"""Pairs of answers to one prompt, encoded within the limits of a row; prompt and tiles are the same for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ivl.data.truncation import Encode, EncodedRow
from ivl.types import Conversation, UserError


@dataclass
class EncodedPair:
    """Encoded rows of both answers."""

    chosen: EncodedRow
    rejected: EncodedRow
    shares_media: bool
    """True if the media and their tiles are the same, so that they are opened and computed once"""

    @property
    def num_tokens(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def num_tiles(self) -> int:
        return self.chosen.num_tiles + (0 if self.shares_media else self.rejected.num_tiles)

    @property
    def num_supervised(self) -> int:
        return self.chosen.num_supervised + self.rejected.num_supervised

    @property
    def notes(self) -> list[str]:
        return [*self.chosen.notes, *(note for note in self.rejected.notes if note not in self.chosen.notes)]


def last_answer_alone(conversation: Conversation) -> Conversation:
    """The same conversation, of which only the last answer is learnt from."""
    *before, last = conversation.messages
    if last.marked and not last.trained:
        raise UserError(
            "the last answer says that it is not learnt from, and pairs are compared by it; remove that key"
        )
    before = [replace(message, trained=False, marked=True) for message in before]
    messages = (*before, replace(last, trained=True, marked=True))
    return replace(conversation, messages=messages, rejected=None)


def encode_pair(conversation: Conversation, fit: Callable[[Conversation], EncodedRow], encode: Encode) -> EncodedPair:
    """Encode both answers. `fit`: encodes a conversation within the limits; `encode`: with given limits of media.

    Where one answer must lose tiles or turns of the prompt to fit, both do.
    Raises UserError where there is no second answer, or no difference between the two.
    """
    if conversation.rejected is None:
        raise UserError("no rejected answer to compare with; add rejected_response, or train with model.objective sft")
    chosen, rejected = last_answer_alone(conversation), last_answer_alone(conversation.rejected)
    same_prompt = (chosen.messages[:-1], chosen.system) == (rejected.messages[:-1], rejected.system)
    if same_prompt and chosen.messages[-1].text.strip() == rejected.messages[-1].text.strip():
        raise UserError("the chosen and the rejected answer are the same; nothing to learn, leave the row out")
    rows = [fit(chosen), fit(rejected)]
    if same_prompt:
        rows = _with_one_prompt(rows, encode)
    if (rows[0].ids, rows[0].labels) == (rows[1].ids, rows[1].labels):
        raise UserError(
            f"the two answers differ only after token {len(rows[0].ids)}, where max_length cuts both; raise it, or "
            "leave the row out"
        )
    return EncodedPair(rows[0], rows[1], same_prompt and rows[0].tiles == rows[1].tiles)


def _with_one_prompt(rows: list[EncodedRow], encode: Encode) -> list[EncodedRow]:
    """Encode the row that was shortened less again, with the turns and the limits of the other."""
    prompts = [(row.conversation.messages[:-1], row.tiles) for row in rows]
    if prompts[0] == prompts[1] or any(note.startswith("text") for row in rows for note in row.notes):
        return rows
    shorter = min((0, 1), key=lambda n: (len(rows[n].conversation.messages), rows[n].num_tiles))
    model, other = rows[shorter], rows[1 - shorter]
    messages = (*model.conversation.messages[:-1], other.conversation.messages[-1])
    shortened = encode(replace(other.conversation, messages=messages), model.shapes, model.limits)
    shortened.notes = list(model.notes)
    rows[1 - shorter] = shortened
    return rows
