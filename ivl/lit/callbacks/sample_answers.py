"""Sample answers of validation for TensorBoard, Weights & Biases and other trackers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from PIL.Image import Image
from torchvision.transforms.functional import pil_to_tensor

from ivl.data.media.load import load_image
from ivl.finetune.objectives import PairOfAnswers
from ivl.lit.callbacks.answer_panel import answer_panel, in_true_share
from ivl.lit.callbacks.images import pair_panel, reward_text
from ivl.lit.trackers import Table, Tracked, csv
from ivl.lit.types import as_lit
from ivl.types import Conversation


class Pictures(Callback):
    """At validation, sample answers for TensorBoard and other trackers: a panel of pictures and frames with question,
    expected and given answer and boxes drawn, and the same as text, rows without pictures included. Of pairs of answers
    another panel: both answers, their log-probabilities before training and now, and their rewards.

    Args:
        rows: Number of rows shown, right and wrong ones in the share that they have of all answers.
    """

    def __init__(self, rows: int = 8):
        self.rows = rows

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        lit = as_lit(module)
        if lit.answers:
            table = _answers_table(in_true_share(lit.answers, self.rows))
            _show(trainer, table, answer_panel(lit.answers, self.rows))
        if lit.pairs:
            pairs = [(_picture(pair.row), pair) for pair in self._sample([p for p in lit.pairs if _has_picture(p.row)])]
            _show(trainer, _pairs_table(self._sample(lit.pairs)), pair_panel(pairs) if pairs else None)

    def _sample(self, pairs: list[PairOfAnswers]) -> list[PairOfAnswers]:
        """Pairs evenly picked, at most `rows` of them."""
        return pairs[:: max(1, len(pairs) // self.rows)][: self.rows]


def _show(trainer: Trainer, table: Table, picture: Image | None) -> None:
    for logger in trainer.loggers:
        _log(logger, table, picture, trainer.global_step)


def _log(logger: Logger, table: Table, picture: Image | None, step: int) -> None:
    if isinstance(logger, csv | Tracked):
        logger.log_answers(table, picture, step)
    elif hasattr(logger, "log_image"):  # Lightning's loggers of Weights & Biases and others take pictures as they are
        if hasattr(logger, "log_table"):
            logger.log_table(f"{table.name}/table", columns=list(table.columns), data=table.rows, step=step)
        if picture is not None:
            logger.log_image(table.name, [picture], step=step)
        return
    board: Any = getattr(logger, "experiment", None)
    if not hasattr(board, "add_image"):
        return
    board.add_text(table.name, table.markdown(), step)
    if picture is not None:
        board.add_image(table.name, pil_to_tensor(picture), step)


def _answers_table(answers: list[dict[str, Any]]) -> Table:
    """Table of question, expected and generated answer."""
    rows = [[a["row"].where, a["row"].messages[-1].text, a["row"].reference or "", _answer(a)] for a in answers]
    return Table("answers", ("row", "question", "expected", "answer"), rows)


def _pairs_table(pairs: list[PairOfAnswers]) -> Table:
    """Table of question, both answers and their numbers."""
    rows = []
    for pair in pairs:
        texts = pair.row.messages[-2].text, pair.row.messages[-1].text, pair.rejected.messages[-1].text
        numbers = [reward_text(*values) for values in zip(pair.before, pair.now, pair.rewards)]
        rows.append([pair.row.where, texts[0], texts[1], numbers[0], texts[2], numbers[1]])
    columns = ("row", "question", "chosen", "numbers of the chosen", "rejected", "numbers of the rejected")
    return Table("pairs", columns, rows)


def _answer(answer: dict[str, Any]) -> str:
    """Format an answer with the reasoning before it."""
    return f"({answer['reasoning']}) {answer['answer']}" if answer["reasoning"] else answer["answer"]


def _has_picture(row: Conversation) -> bool:
    return any(medium.kind == "image" for medium in row.media)


def _picture(row: Conversation) -> Image:
    last = [m for m in row.media if m.kind == "image"][-1]
    return load_image(last.source)
