"""Adapter of lmms-eval: its model `ivl`, found by the entry point of this package.

python -m lmms_eval --model ivl --model_args pretrained=merged --tasks mme
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from ivl.harness.answers import Answerer

MANIFEST = ModelManifest("ivl", simple_class_path="ivl.harness.lmms_eval.Ivl")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


class Ivl(lmms):
    """Model of this program for lmms-eval."""

    def __init__(self, pretrained: str, batch_size: int | str = 1, **options: Any) -> None:
        """Load a model. `batch_size` is read and not used: rows are answered one by one."""
        super().__init__()
        self.answerer = Answerer(pretrained, **options)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer requests one by one, greedily or as each asks."""
        return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, wanted: dict[str, Any], visual: Any, number: Any, task: str, split: str) -> str:
        media = visual(self.task_dict[task][split][number]) or []
        videos = [medium for medium in media if isinstance(medium, str) and medium.lower().endswith(VIDEOS)]
        images = [medium for medium in media if not any(medium is video for video in videos)]
        marks = " ".join(["<image>"] * len(images) + ["<video>"] * len(videos))
        settings = {"max_new_tokens": wanted["max_new_tokens"]} if "max_new_tokens" in wanted else {}
        if wanted.get("do_sample") and wanted.get("temperature"):
            settings["temperature"] = wanted["temperature"]
        until = wanted.get("until") or ()
        stop = [until] if isinstance(until, str) else until
        question = f"{marks}\n{context}" if marks else context
        return self.answerer.answer(question, images, videos, stop, **settings)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refuse: these benchmarks are asked in words."""
        raise NotImplementedError("log-likelihoods are not computed; choose tasks whose output_type is generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise NotImplementedError("tasks of several rounds are not answered; choose those of one question")
