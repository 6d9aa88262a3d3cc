"""Rows to be answered, as loader workers make them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import Dataset

from ivl.data.dataset import Rows
from ivl.types import Conversation, Example, UserError

LAST = -1
"""Stands for a prompt after which there are none"""


@dataclass
class Prompt:
    """A row to be answered, or what is wrong with it."""

    index: int
    example: Example | None = None
    conversation: Conversation | None = None
    where: str = ""
    error: str = ""


class Prompts(Dataset):
    """Rows to be answered, one by one. Where errors are not kept they are raised."""

    def __init__(self, rows: Rows, keep_errors: bool):
        self.rows, self.keep_errors = rows, keep_errors

    def __getitem__(self, index: int) -> Prompt:
        if index == LAST:
            return Prompt(LAST)
        prompt = Prompt(index, where=self.rows.where(index))
        try:
            prompt.conversation = self.rows.conversation(index)
            prompt.example = self.rows[index]
        except UserError as error:
            if not self.keep_errors:
                raise
            prompt.error = str(error)
        return prompt
