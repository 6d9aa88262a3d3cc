"""Sample answers of validation for TensorBoard, Weights & Biases and other loggers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from PIL.Image import Image
from torchvision.transforms.functional import pil_to_tensor

from ivl.data.media.load import load_image
from ivl.lit.callbacks.images import panel
from ivl.lit.types import as_lit
from ivl.types import Conversation


class Pictures(Callback):
    """At validation, sample answers for TensorBoard and Weights & Biases: a panel of pictures with question, expected
    and given answer and boxes drawn, and the same as text, rows without pictures included.

    Args:
        rows: Number of rows shown, evenly picked from those answered.
    """

    def __init__(self, rows: int = 8):
        self.rows = rows

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        answers = as_lit(module).answers
        if trainer.sanity_checking or not trainer.is_global_zero or not answers:
            return
        illustrated = [a for a in answers if any(m.kind == "image" for m in a["row"].media)]
        cells = [(_picture(a["row"]), a["row"], a["answer"]) for a in self._sample(illustrated)]
        text = _as_text(self._sample(answers))
        for logger in trainer.loggers:
            _show(logger, panel(cells) if cells else None, text, trainer.global_step)

    def _sample(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return answers[:: max(1, len(answers) // self.rows)][: self.rows]


def _show(logger: Logger, picture: Image | None, text: str, step: int) -> None:
    if hasattr(logger, "log_image"):  # Weights & Biases, MLflow and others take pictures as they are
        if picture is not None:
            logger.log_image("answers", [picture], step=step)
        return
    board: Any = getattr(logger, "experiment", None)
    if not hasattr(board, "add_image"):
        return
    board.add_text("answers", text, step)
    if picture is not None:
        board.add_image("answers", pil_to_tensor(picture), step)


def _as_text(answers: list[dict[str, Any]]) -> str:
    """Table of question, expected and generated answer, as Markdown."""
    lines = []
    for answer in answers:
        row = answer["row"]
        cells = (row.where, row.messages[-1].text, row.reference or "", _answer(answer))
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(["| row | question | expected | answer |", "| --- | --- | --- | --- |", *lines])


def _answer(answer: dict[str, Any]) -> str:
    """Format an answer with the reasoning before it."""
    return f"({answer['reasoning']}) {answer['answer']}" if answer["reasoning"] else answer["answer"]


def _picture(row: Conversation) -> Image:
    last = [m for m in row.media if m.kind == "image"][-1]
    return load_image(last.source)
