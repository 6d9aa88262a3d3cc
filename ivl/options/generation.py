"""Options of answers: sampling, length, and the rows that are answered together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ivl.errors import UserError


@dataclass(frozen=True)
class AnswerLength:
    """Length of an answer."""

    max_new_tokens: int = 128
    """Most tokens of an answer."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of an answer's tokens. Temperature 0 is greedy.

    The repetition penalty acts on the answer alone: the reference feeds embeddings, so its penalty cannot see the
    prompt.
    """

    temperature: float = 0.0
    """Temperature of sampling; 0 is greedy."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Penalty of tokens that already occurred in the answer; above 1 they become less likely."""

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        problems = [f"{name}: expected {text}, found {getattr(self, name)}" for name, fits, text in checks if not fits]
        if problems:
            raise UserError("; ".join(problems))

    def check_beams(self, num_beams: int, logprobs: bool = False) -> None:
        """Raise UserError where `num_beams` does not go with these settings."""
        if num_beams < 1 or (num_beams > 1 and self.temperature > 0):
            raise UserError(
                f"num_beams: expected at least 1, and no more than 1 where tokens are sampled; found {num_beams} with "
                f"temperature {self.temperature}"
            )
        if logprobs and num_beams > 1:
            raise UserError("logprobs: expected false with num_beams above 1, found true")


@dataclass(frozen=True)
class ChatOptions(SamplingParams, AnswerLength):
    """Length and sampling of the answers of a chat."""

    max_new_tokens: int = 1024
    seed: int = 0
    """Seed of the sampling, begun anew for each answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_max_new_tokens(self.max_new_tokens)


@dataclass(frozen=True)
class GenerationOptions(SamplingParams, AnswerLength):
    """Sampling and length of answers, in validation and prediction."""

    min_new_tokens: int = 0
    """No end of the answer before this many tokens."""
    num_beams: int = 1
    """Above 1, answers are searched for with this many beams, one row after another."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside the checkpoint's own end tokens; they are not part of it."""
    seed: int = 0
    """Seed of the sampling; each row has random numbers of its own, so answers do not depend on batching."""
    num_answers: int = 1
    """Answers of each row in prediction, all in its `responses`; above 1 needs a temperature above 0."""
    logprobs: bool = False
    """Write the log-probability of each token of an answer into prediction's rows."""

    def check(self) -> None:
        """Raise UserError where the settings do not go together."""
        self.check_beams(self.num_beams, self.logprobs)
        if self.num_answers < 1 or (self.num_answers > 1 and self.temperature == 0):
            raise UserError(
                f"num_answers: expected 1, or more with a temperature above 0, found {self.num_answers} with "
                f"temperature {self.temperature}: greedy answers would all be the same"
            )


@dataclass(frozen=True)
class Batching:
    """Limits of the rows that are decoded at the same time. Answers are the same for any values."""

    rows: int = 32
    """Most rows that are decoded together."""
    tokens: int = 32768
    """Most tokens in the key-value cache, room for the answers included; one row is always taken."""
    prefill_tokens: int = 8192
    """Most tokens of prompts that are read together; the vision encoder runs once over their tiles."""
    graphs: Literal["auto", "off"] = "auto"
    """auto: the decoding step as CUDA graphs where the model is on one GPU; off: never."""

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"batching: {name}: expected at least 1, found {getattr(self, name)}")
        if self.graphs not in ("auto", "off"):
            raise UserError(f"batching: graphs: expected auto or off, found {self.graphs!r}")


def check_max_new_tokens(max_new_tokens: int) -> None:
    """Raise UserError for an answer of no tokens."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
