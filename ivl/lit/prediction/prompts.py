"""Prompts of prediction: rows to be answered, as loader workers make them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from itertools import islice

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from ivl.data.index.index import Index
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.types import Batch, Conversation, Example, UserError

GROUP = 4096
"""Prompts of a batch of prediction: its rows are returned together, so their number bounds the memory they take"""


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
        prompt = Prompt(index, where=self.rows.where(index))
        try:
            prompt.conversation = self.rows.conversation(index)
            prompt.example = self.rows[index]
        except UserError as error:
            if not self.keep_errors:
                raise
            prompt.error = str(error)
        return prompt


def prompts_of(batch: Batch, processor: Processor, indices: Iterable[int]) -> Iterator[Prompt]:
    """Make the prompts of a batch of rows, whose answers become references."""
    for index, conversation in zip(indices, batch.rows):
        prompt = conversation.as_prompt()
        yield Prompt(index, processor(prompt), prompt, prompt.where)


class PromptGroups:
    """Batches of prediction: iterators over up to `size` prompts, which are read as they are answered.

    A batch of tensors would hold the pixels of all its rows, and few rows in it would leave the engine idle at its end.
    """

    def __init__(self, prompts: Iterable[Prompt], count: int, size: int = GROUP) -> None:
        """`prompts`: a loader of `count` prompts."""
        self.prompts, self.count, self.size = prompts, count, size

    def __len__(self) -> int:
        return max(1, -(-self.count // self.size))  # without a batch Lightning would end nothing

    def __iter__(self) -> Iterator[Iterator[Prompt]]:
        prompts = iter(self.prompts)
        return (islice(prompts, self.size) for _ in range(len(self)))
