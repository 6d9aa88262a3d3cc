"""Published answers, logits and scores of released models, compared with those computed here.

    python benchmarks/released.py [MODEL ...] [--folder MODEL=DIR] [--images DIR] [--device cuda] [--mmstar FILE.tsv]

One line for each case, `pass` or `FAIL` with what was expected and found; exit status 1 where any failed. MODEL is
InternVL3-1B-hf, InternVL2_5-2B-MPO-hf (both by default) or InternVL3-8B (`--mmstar`: VLMEvalKit's MMStar_MINI.tsv).
Weights come by name as with every command, or from `--folder`; pictures from their URLs, or by name from `--images`.

The answers and logits are those that transformers' slow tests state for float16 on NVIDIA GPUs, the score is that of
VLMEvalKit's continuous integration. An answer may be any of those stated for different GPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ivl import InternVL, Processor
from ivl.data.processor import Processor as ProcessorType

COCO = "http://images.cocodataset.org/val2017/000000039769.jpg"
VIEW = "https://llava-vl.github.io/static/images/view.jpg"
GATE = "https://www.ilankelman.org/stopsigns/australia.jpg"


@dataclass(frozen=True)
class Case:
    """Question to a model, and what is published about its answer."""

    question: str
    image: str | None = None
    answers: tuple[str, ...] = ()
    """Any of these, of at most `tokens` tokens"""
    tokens: int = 25
    logits: tuple[float, ...] = ()
    """First logits of the first token of the answer"""
    tolerance: float = 0.1


ARCHWAY = (
    'The image shows a street scene with a traditional Chinese archway, known as a "Chinese Gate" or "Chinese Gate of'
)
CHINESE_GATE = (
    "The image shows a street scene with a traditional Chinese gate in the background, "
    "adorned with red and gold colors and Chinese characters"
)
DESCRIBE, HAIKU = "Please describe the image explicitly.", "Write a haiku for this image"
CASES: dict[str, list[Case]] = {
    "InternVL3-1B-hf": [
        Case(
            DESCRIBE,
            COCO,
            ("The image shows two cats lying on a pink surface, which appears to be a bed or couch.",),
            20,
            (11.9531, 14.7031, 14.2734, 10.6562, 6.9219),
        ),
        Case(
            "Write a haiku",
            None,
            (
                "Whispers of dawn,\nSilent whispers of night,\nPeace in the stillness.",
                "Whispers of dawn,\nSilent whispers of the night,\nNew day's light.",
            ),
            200,
        ),
        Case(HAIKU, VIEW, ("Silky lake,  \nWooden pier,  \nNature's peace.",)),
        Case(
            "Describe this image",
            GATE,
            (ARCHWAY,),
        ),
    ],
    "InternVL2_5-2B-MPO-hf": [
        Case(
            DESCRIBE,
            COCO,
            ("The image shows two cats sleeping on a pink couch. They are lying side by side, with their",),
            20,
            (-9.8750, -0.4861, 1.4648, -10.3359, -10.3359),
        ),
        Case(
            "Write a haiku",
            None,
            (
                "Autumn leaves fall,\nNature's breath, a gentle sigh,\nSilent whispers.",
                "Autumn leaves fall,\nNature's breath, a silent sigh,\nWinter's chill approaches.",
            ),
            200,
        ),
        Case(
            HAIKU,
            VIEW,
            ("Majestic snow-capped peaks,\nWooden dock stretches to the sea,\nSilent water mirrors.",),
        ),
        Case(
            "Describe this image",
            GATE,
            (CHINESE_GATE,),
        ),
    ],
}
MMSTAR = {"InternVL3-8B": 70.0}
"""Per cent of MMStar_MINI"""
POINTS = 1.0


def row_of(case: Case, images: Path | None) -> dict:
    """Row of a case, without a system turn as transformers' processor writes it."""
    if case.image is None:
        return {"query": case.question, "system": False}
    image = case.image if images is None else str(images / case.image.rsplit("/", 1)[1])
    return {"query": f"<image>\n{case.question}", "images": [image], "system": False}


@torch.no_grad()
def failures(case: Case, model: InternVL, processor: ProcessorType, images: Path | None = None) -> list[str]:
    """What differs from what is published; empty where nothing does."""
    batch = processor.collate([processor(row_of(case, images))]).to(model.device)
    found = []
    if case.logits:
        logits = model(batch.input_ids, tiles=batch.tiles).logits[0, -1, : len(case.logits)].float().cpu()
        if (logits - torch.tensor(case.logits)).abs().max() > case.tolerance:
            found.append(f"logits {[round(x, 4) for x in logits.tolist()]}, published {list(case.logits)}")
    if case.answers:
        answer = processor.decode(model.generate(batch, max_new_tokens=case.tokens)[0])
        if answer not in case.answers:
            found.append(f"{answer!r}, published {' or '.join(map(repr, case.answers))}")
    return found


def mmstar(model: str, table: Path, device: str) -> float:
    """Score of a model on a table of MMStar, by the program's own commands."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "LMUData").mkdir()
        (root / "LMUData/MMStar.tsv").symlink_to(table.resolve())
        out = root / "mmstar.jsonl"
        run = [sys.executable, "-m", "ivl"]
        accelerator = "cpu" if device == "cpu" else "gpu"
        asked = ["--data.task", "mmstar", "--data.task_root", str(root), "--predictions.file", str(out)]
        options = ["--model.pretrained", model, "--trainer.accelerator", accelerator]
        subprocess.run([*run, "predict", *options, *asked], check=True)
        subprocess.run([*run, "score", str(out), "--task", "mmstar"], check=True)
        scores = json.loads(out.with_suffix(".scores.json").read_text())
        return float(scores["files"][0]["score"])


def verdict(name: str, found: list[str]) -> bool:
    """Print a line for a case; True if it passed."""
    print(f"{'FAIL' if found else 'pass'}  {name}" + "".join(f"\n      {text}" for text in found), flush=True)
    return not found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(CASES))
    parser.add_argument("--folder", action="append", default=[], metavar="MODEL=DIR")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--mmstar", type=Path, help="MMStar_MINI.tsv of VLMEvalKit")
    args = parser.parse_args(argv)
    folders = dict(text.split("=", 1) for text in args.folder)
    passed = []
    for name in args.models:
        if name not in CASES and name not in MMSTAR:
            parser.error(f"{name}: nothing is published of it here; expected one of {', '.join([*CASES, *MMSTAR])}")
        source = folders.get(name, f"OpenGVLab/{name}")
        if name in MMSTAR:
            if args.mmstar is None:
                parser.error(f"{name}: needs --mmstar, the table of its score")
            score = mmstar(source, args.mmstar, args.device)
            near = abs(score - MMSTAR[name]) <= POINTS
            passed.append(verdict(f"{name}: MMStar_MINI", [] if near else [f"{score}, published {MMSTAR[name]}"]))
            continue
        model = InternVL.from_pretrained(source, dtype=args.dtype, device=args.device)
        processor = Processor.from_pretrained(source)
        for case in CASES[name]:
            line = f"{name}: {case.question} {case.image or ''}".rstrip()
            passed.append(verdict(line, failures(case, model, processor, args.images)))
    print(f"{sum(passed)} of {len(passed)} cases passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
