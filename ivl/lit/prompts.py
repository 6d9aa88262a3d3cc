"""Prompts of prediction: rows to be answered, as loader workers make them."""

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
"""Index that marks the end of the prompts"""


@dataclass
class Prompt:
    """Row to be answered, or the error that prevents it."""

    index: int
    example: Example | None = None
    conversation: Conversation | None = None
    where: str = ""
    error: str = ""


def processor_of_prompts(processor: Processor, most: int | None, max_new_tokens: int) -> Processor:
    """Copy a processor with the limit of prompts: `most`, or by default the model's context.

    A prompt that has to be shortened for the context leaves room for its answer.
    """
    context = processor.config.llm.get("max_position_embeddings")
    prompt_processor = copy(processor)
    prompt_processor.max_length = most
    if most is None and context:
        prompt_processor.max_length, prompt_processor.answer_room = context - 1, min(max_new_tokens, context // 2)
    return prompt_processor


def report_prompts(index: Index, keep_errors: bool) -> None:
    """Log the number of prompts that are longer than their limit.

    Raises UserError where a prompt cannot be used and errors are not kept.
    """
    problems = sorted((index.problems | index.dropped).items())
    if problems and not keep_errors:
        others = f" (and {len(problems) - 1} more rows; `ivl check` lists them)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0][1]}{others}; or set --data.on_error skip")
    if changed := index.describe_changes():
        rank_zero_info(f"prompts longer than their limit: {changed} (of {len(index)})")


class Prompts(Dataset):
    """Dataset of prompts. Errors are raised unless `keep_errors`."""

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
