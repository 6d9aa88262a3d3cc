"""Reasoning of thinking models: `<think>…</think>` split from the answer proper."""

from __future__ import annotations

OPENING, CLOSING = "<think>", "</think>"


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Split an answer into its thought (None where there is none) and the answer proper, which alone is scored.

    All before the last `</think>` is thought, also where `<think>` stood in the prompt. An answer that opens `<think>`
    and was cut off before its end is all thought: the answer proper is empty, not a guess.
    """
    before, mark, after = text.rpartition(CLOSING)
    if after.lstrip().startswith(OPENING):
        before, mark, after = text, CLOSING, ""
    if not mark:
        return None, text
    return before.strip().removeprefix(OPENING).strip(), after.strip()


def without_reasoning(text: str) -> str:
    """Return the answer proper."""
    return split_reasoning(text)[1]
