"""Rows to be answered, as loader workers make them."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.data.sets.index import Index
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


def processor_of_prompts(processor: Processor, most: int | None, max_new_tokens: int) -> Processor:
    """The processor with the limit of prompts, which is not that of training rows: `most`, or the model's context.

    A prompt that has to be shortened for the context leaves room for its answer.
    """
    context = processor.config.llm.get("max_position_embeddings")
    made = copy(processor)
    made.max_length = most
    if most is None and context:
        made.max_length, made.answer_room = context - 1, min(max_new_tokens, context // 2)
    return made


def report_prompts(index: Index, keep_errors: bool) -> None:
    """Say how many prompts do not fit their limit as they are.

    Raises UserError where a prompt cannot be used and errors are not kept.
    """
    problems = sorted((index.problems | index.dropped).items())
    if problems and not keep_errors:
        more = f" (and {len(problems) - 1} more rows; `ivl check` lists them)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0][1]}{more}; or set --data.on_error skip")
    if changed := index.describe_changes():
        rank_zero_info(f"prompts longer than their limit: {changed} (of {len(index)})")


class Prompts(Dataset):
    """Rows to be answered, one by one. Where errors are not kept they are raised."""

    def __init__(self, rows: RowDataset, keep_errors: bool):
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
