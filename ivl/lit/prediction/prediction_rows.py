"""Lines of a file of predictions: an answered row, or its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ivl.data.processor import Processor
from ivl.data.rows.grounding import parse_boxes
from ivl.lit.prediction.benchmark import score_fields
from ivl.reasoning import split_reasoning
from ivl.types import Conversation

Row = dict[str, Any]


def answered(
    index: int,
    row: Conversation,
    answer: str,
    processor: Processor,
    finish_reason: str,
    notes: Sequence[str] = (),
) -> Row:
    """Return the line of an answered row: prompt, response, and reference. `answer`: with the row's prefix.

    `notes`: parts of the prompt that were left out to make it fit.
    """
    reasoning, response = split_reasoning(answer)
    return {
        "index": index,
        "id": row.id,
        "where": row.where,
        "source": row.source or None,
        "prompt": processor.prompt_text(row),
        "prefix": row.prefix or None,
        "response": response,
        "reasoning": reasoning,
        "finish_reason": finish_reason,
        "notes": list(notes),
        "reference": row.reference,
        "boxes": [{"ref": ref, "boxes": boxes} for ref, boxes in parse_boxes(response)],
        **score_fields(row),
    }


def failed(index: int, row: Conversation | None, where: str, error: str) -> Row:
    """Return the line of a row that could not be answered. `row`: None where it could not be parsed."""
    fields = {"id": row.id, "where": row.where, "source": row.source or None} if row else {"id": None, "where": where}
    return {"index": index, **fields, "error": error}
