"""Published answers, logits and scores of released models, compared with those computed here.

    python benchmarks/released.py                                # InternVL3-1B-hf and InternVL2_5-2B-MPO-hf
    python benchmarks/released.py InternVL3-8B --mmstar MMStar_MINI.tsv
    python benchmarks/released.py InternVL3-1B-hf --folder InternVL3-1B-hf=DIR --images DIR --device cuda:1

Needs: the program installed, a GPU (8 GB for the first line, 24 GB for InternVL3-8B), and either a network or
`--folder` with `--images`. Weights are looked up by name as with every command, pictures at their addresses.
MMStar_MINI.tsv is VLMEvalKit's, from the address in its vlmeval/dataset/image_mcq.py.

Prints a line for each case: `pass`, or `FAIL` with what was expected and found, or why it could not be asked; at the
end "N of M cases passed". Exit status: 0 where all passed, 1 where one did not, 2 for a mistake in the command.

Answers and logits are those that transformers' slow tests state for float16 on NVIDIA GPUs, the score is that of
VLMEvalKit's continuous integration. An answer may be any of those stated for different GPUs. `--device cpu --dtype
float32` takes minutes an answer; an answer that differs late or logits by more than 0.1 say little there.
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
from ivl.types import UserError

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


def name_of(url: str) -> str:
    """Name of a picture's file."""
    return url.rsplit("/", 1)[1]


def row_of(case: Case, images: Path | None) -> dict:
    """Row of a case, without a system turn as transformers' processor writes it."""
    if case.image is None:
        return {"query": case.question, "system": False}
    image = case.image if images is None else str(images / name_of(case.image))
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


def options(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command, so that nothing is loaded for one that cannot end."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    known = [*CASES, *MMSTAR]
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(CASES), help=", ".join(known))
    parser.add_argument("--folder", action="append", default=[], metavar="MODEL=DIR", help="weights of a model, here")
    names = sorted({name_of(case.image) for cases in CASES.values() for case in cases if case.image})
    parser.add_argument("--images", type=Path, metavar="DIR", help=f"folder with {', '.join(names)}; no network then")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--dtype", default="float16", help="default: float16, as published")
    parser.add_argument("--mmstar", type=Path, metavar="FILE", help="MMStar_MINI.tsv of VLMEvalKit")
    args = parser.parse_args(argv)
    args.folders = dict(text.partition("=")[::2] for text in args.folder)
    for name in [*args.models, *args.folders]:
        if name not in known:
            parser.error(f"{name}: nothing is published of it here; expected one of {', '.join(known)}")
    for name, folder in args.folders.items():
        if not Path(folder, "config.json").is_file():
            parser.error(f"--folder {name}={folder}: has no config.json; expected --folder MODEL=DIR, a checkpoint's")
    if lost := [name for name in names if args.images and not (args.images / name).is_file()]:
        parser.error(f"--images {args.images}: has no {lost[0]}; expected {', '.join(names)}")
    if MMSTAR.keys() & set(args.models) and (args.mmstar is None or not args.mmstar.is_file()):
        parser.error(f"{', '.join(MMSTAR)}: needs --mmstar, the table of its score; found {args.mmstar}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no GPU; --device cpu --dtype float32 tries it without")
    return args


def check_model(name: str, source: str, args: argparse.Namespace) -> list[bool]:
    """Ask a model all its cases, and print a line for each. Returns True for those that passed."""
    if name in MMSTAR:
        score = mmstar(source, args.mmstar, args.device)
        near = abs(score - MMSTAR[name]) <= POINTS
        return [verdict(f"{name}: MMStar_MINI", [] if near else [f"{score}, published {MMSTAR[name]}"])]
    model = InternVL.from_pretrained(source, dtype=args.dtype, device=args.device)
    processor, passed = Processor.from_pretrained(source), []
    for case in CASES[name]:
        try:
            found = failures(case, model, processor, args.images)
        except UserError as error:
            found = [f"could not be asked: {error}"]
        passed.append(verdict(f"{name}: {case.question} {case.image or ''}".rstrip(), found))
    return passed


def main(argv: list[str] | None = None) -> int:
    args, passed = options(argv), list[bool]()
    for name in args.models:
        try:
            passed += check_model(name, args.folders.get(name, f"OpenGVLab/{name}"), args)
        except (UserError, subprocess.CalledProcessError) as error:
            passed.append(verdict(name, [f"could not be run: {error}"]))
    print(f"{sum(passed)} of {len(passed)} cases passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
