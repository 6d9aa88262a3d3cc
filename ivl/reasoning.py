"""Reasoning of thinking models: `<think>…</think>` split from the answer proper."""

from __future__ import annotations

from collections.abc import Iterator

OPENING, CLOSING = "<think>", "</think>"
BEGUN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"
"""Beginnings of an answer that the program writes for the model: a thought is begun, or there is none."""


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


class ReasoningStream:
    """Incremental form of `split_reasoning`: pieces of an answer → pieces of its thought and of the answer proper.

    A thought begins an answer, or follows another thought. Text that may be the beginning of a mark is held back until
    the next piece.
    """

    def __init__(self, begun: bool = False) -> None:
        """`begun`: the prompt ends inside a thought."""
        self.in_thought = begun
        self._text = ""
        self._ended = False
        """True once the answer proper has words: what follows is no thought."""

    def add(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Yield (True for a thought, text) of all that is certain."""
        self._text += piece
        while self._text:
            if self._ended:
                yield False, self._take(len(self._text))
            elif self.in_thought:
                at = self._text.find(CLOSING)
                if at < 0:
                    if certain := len(self._text) - _begun_mark(self._text, CLOSING):
                        yield True, self._take(certain)
                    return
                if at:
                    yield True, self._take(at)
                self._take(len(CLOSING))
                self.in_thought = False
            elif (words := self._text.lstrip()).startswith(OPENING):
                self._text = words.removeprefix(OPENING)
                self.in_thought = True
            elif OPENING.startswith(words):
                return
            else:
                self._ended = True

    def rest(self) -> Iterator[tuple[bool, str]]:
        """Yield the text held back at the end of an answer."""
        if self._text.strip():
            yield self.in_thought, self._take(len(self._text))

    def _take(self, count: int) -> str:
        text, self._text = self._text[:count], self._text[count:]
        return text


def _begun_mark(text: str, mark: str) -> int:
    """Return the length of the longest end of a text that begins a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
