"""Table of the benchmarks InternVL reports: prompt, answer length, scoring rule.

Prompts, tiles and lengths are those of OpenGVLab/InternVL `internvl_chat/eval` (commit 2410d1d) and, where its README
sends people there, of open-compass/VLMEvalKit (commit e8e78f0). Decoding is greedy with one beam everywhere, and the
system message is the checkpoint's own. Benchmarks that need a judge model are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.errors import UserError
from ivl.eval.benchmarks import convert, kit_tables
from ivl.eval.benchmarks.convert import Record

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_CAPTION = "Provide a one-sentence caption for the provided image."
_REGION = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{question}</ref>"
_WATCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n\nQuestion: {question}\nOptions:{options}\nOnly give the best option."
)
_FRAMES = (
    "\nThese are the frames of a video. Select the best answer to the following multiple-choice question based on the "
    "video. Respond with only the letter (A, B, C, or D) of the correct option.\nQuestion: {question} \n" + _LETTER
)
DECODING = {"do_sample": False, "num_beams": 1}


@dataclass(frozen=True)
class Task:
    """One benchmark: prompt, media, answer length and scoring rule."""

    title: str
    prompt: str
    """Template with {question} and {options}, after the media."""
    rule: str
    """Key of `ivl.eval.rules.RULES`."""
    max_new_tokens: int
    records: Callable[[Path], Iterator[Record]]
    """Data folder → records, from the official files"""
    files: tuple[str, ...]
    """Files that `records` reads, below the data folder."""
    source: str
    """Source of prompt, tiles and lengths."""
    max_tiles: int = 6
    """Most tiles of an image, without the thumbnail; of a video: of each frame"""
    min_new_tokens: int = 1
    option: str = "\n{letter}. {text}"
    open_prompt: str | None = None
    """Prompt of a question without options, instead of `prompt`."""
    chinese_prompt: str | None = None
    """Prompt of a question with options that holds a Chinese character, instead of `prompt`."""
    frames: int | None = None
    """Number of frames of a video, evenly spread."""
    frame_prefix: str = "Frame{i}: "
    count: int | None = None
    """Number of questions of the whole benchmark, where it is known for certain."""
    note: str = ""
    """Difference of prompt or media from the script."""

    def row(self, record: Record) -> dict[str, Any]:
        """Convert a record to a row of our data format: question with prompt and media marks, and ground truth."""
        record = {k: v for k, v in record.items() if v is not None}
        question = record.pop("question")
        if hint := record.pop("hint", None):
            question = f"{hint}\n{question}"
        options = record.get("options") or {}
        written = "".join(self.option.format(letter=letter, text=text) for letter, text in options.items())
        prompt = self.prompt
        if self.open_prompt and not options:
            prompt = self.open_prompt
        elif self.chinese_prompt and re.search(r"[\u4e00-\u9fff]", question + written):
            prompt = self.chinese_prompt
        text = prompt.format(question=question, options=written)
        return {"id": record.pop("id"), "query": self._marks(record) + text, **record}

    def _marks(self, record: Record) -> str:
        if "videos" in record:
            return "<video>\n"
        images = len(record["images"])
        return "<image>\n" if images == 1 else "".join(f"Image-{n}: <image>\n" for n in range(1, images + 1))

    def rows(self, root: str | Path) -> Iterator[dict[str, Any]]:
        """Yield all rows of the benchmark from the data folder `root`. Raises UserError where something is missing."""
        try:
            yield from map(self.row, self.records(Path(root)))
        except KeyError as error:
            raise UserError(
                f"{self.title}: a record has no {error}; expected the official {', '.join(self.files)} in {root}"
            ) from error


def task(name: str, option: str = "--task") -> Task:
    """Return a benchmark by its name. Raises UserError that lists them."""
    if name not in TASKS:
        raise UserError(f"{option} {name}: no such benchmark; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def fingerprint(rows: Iterable[dict[str, Any]]) -> str:
    """Digest of questions and expected answers, in any order of the rows; of pictures only the number counts."""
    fields = ("id", "answers", "options", "category", "group", "box", "size")
    lines = sorted(json.dumps({k: row.get(k) for k in fields}, sort_keys=True, ensure_ascii=False) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


_VQA = "internvl_chat/eval/vqa/evaluate_vqa.py"
_KIT = "VLMEvalKit vlmeval/vlm/internvl"
_PHRASE = "{question} " + _SHORT
_CHOOSE = "{question}{options}\n" + _LETTER
_CHOOSE_ZH = "{question}{options}\n请直接回答选项字母。"

TASKS: dict[str, Task] = {
    "vqav2": Task(
        "VQAv2 val", _PHRASE, "vqa", 10, convert.vqav2, source=_VQA, count=214_354,
        files=("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "vqav2/v2_mscoco_val2014_annotations.json",
               "vqav2/val2014/"),
    ),
    "okvqa": Task(
        "OKVQA val", _PHRASE, "vqa", 10, convert.okvqa, source=_VQA, count=5_046,
        files=("okvqa/OpenEnded_mscoco_val2014_questions.json", "okvqa/mscoco_val2014_annotations.json",
               "okvqa/val2014/"),
    ),
    "textvqa": Task(
        "TextVQA val", _PHRASE, "vqa", 10, convert.textvqa, source=_VQA, count=5_000,
        files=("textvqa/TextVQA_0.5.1_val.json", "textvqa/train_images/"),
    ),
    "vizwiz": Task(
        "VizWiz val",
        "{question} When the provided information is insufficient, respond with 'Unanswerable'. " + _SHORT,
        "vqa", 10, convert.vizwiz, source=_VQA, count=4_319,
        files=("vizwiz/annotations/val.json", "vizwiz/val/"),
    ),
    "gqa": Task(
        "GQA testdev balanced", _PHRASE, "gqa", 10, convert.gqa, source=_VQA, count=12_578,
        files=("gqa/testdev_balanced_questions.json", "gqa/images/"),
    ),
    "ocrvqa": Task(
        "OCR-VQA test", _PHRASE, "exact", 100, convert.ocrvqa, source=_VQA,
        files=("ocrvqa/dataset.json", "ocrvqa/images/"),
    ),
    "ai2d": Task(
        "AI2D test", "{question}", "exact", 10, convert.ai2d, source=_VQA, count=3_088,
        files=("ai2diagram/test_vlmevalkit.jsonl", "ai2diagram/AI2D_TEST/"),
    ),
    "chartqa": Task(
        "ChartQA test", _PHRASE, "relaxed", 100, convert.chartqa, source=_VQA, max_tiles=12, count=2_500,
        files=("chartqa/ChartQA Dataset/test/test_human.json", "chartqa/ChartQA Dataset/test/test_augmented.json",
               "chartqa/ChartQA Dataset/test/png/"),
    ),
    "docvqa": Task(
        "DocVQA val", _PHRASE, "anls", 100, convert.docvqa, source=_VQA, max_tiles=18, count=5_349,
        files=("docvqa/val/val_v1.0.json", "docvqa/val/documents/"),
    ),
    "infovqa": Task(
        "InfographicVQA val", _PHRASE, "anls", 100, convert.infovqa, source=_VQA, max_tiles=24, count=2_801,
        files=("infographicsvqa/infographicsVQA_val_v1.0_withQT.json", "infographicsvqa/infographicsvqa_images/"),
    ),
    "mme": Task(
        "MME", _PHRASE, "mme", 20, convert.mme, source="internvl_chat/eval/mme/eval.py", count=2_374,
        min_new_tokens=0,
        files=("mme/MME_Benchmark_release_version/",),
    ),
    "pope": Task(
        "POPE", "{question}", "pope", 100, convert.pope, source="internvl_chat/eval/pope/evaluate_pope.py",
        files=("pope/llava_pope_test.jsonl", "pope/coco/coco_pope_{random,popular,adversarial}.json", "pope/val2014/"),
    ),
    "mmbench_en": Task(
        "MMBench dev, English", _CHOOSE, "circular", 100, convert.mmbench_en,
        source="internvl_chat/eval/mmbench/evaluate_mmbench.py", files=("mmbench/mmbench_dev_20230712.tsv",),
    ),
    "mmbench_cn": Task(
        "MMBench dev, Chinese", _CHOOSE_ZH, "circular", 100, convert.mmbench_cn,
        source="internvl_chat/eval/mmbench/evaluate_mmbench.py", files=("mmbench/mmbench_dev_cn_20231003.tsv",),
    ),
    "ccbench": Task(
        "CCBench dev", _CHOOSE_ZH, "circular", 100, convert.ccbench,
        source="internvl_chat/eval/mmbench/evaluate_mmbench.py", files=("mmbench/CCBench_legacy.tsv",),
    ),
    "scienceqa": Task(
        "ScienceQA test, questions with a picture", _CHOOSE, "scienceqa", 100, convert.scienceqa, count=2_017,
        source="internvl_chat/eval/scienceqa/evaluate_scienceqa.py",
        files=("scienceqa/problems.json", "scienceqa/images/test/"),
    ),
    "mmmu": Task(
        "MMMU val", _CHOOSE, "mmmu", 10, convert.mmmu, source="internvl_chat/eval/mmmu/evaluate_mmmu.py", count=900,
        files=("MMMU/*/validation-*.parquet",), open_prompt="{question}\n" + _SHORT,
        note="the script puts the tiles of all pictures behind one <image> and gives those after the first one tile "
        "each; here each has a mark of its own and up to max_tiles",
    ),
    "seed": Task(
        "SEED-Bench, image", "{question}", "letter", 100, convert.seed, files=("SEED/seed.jsonl", "SEED/"),
        source="internvl_chat/eval/seed/evaluate_seed.py",
    ),
    "ocrbench": Task(
        "OCRBench", "{question}\n" + _SHORT, "ocrbench", 4096, convert.ocrbench, max_tiles=24, count=1_000,
        min_new_tokens=0,
        source=_KIT, files=("OCRBench/OCRBench.json", "OCRBench/OCRBench_Images/"),
    ),
    "coco": Task(
        "COCO captions, Karpathy test", _CAPTION, "captions", 30, convert.coco, min_new_tokens=8, count=5_000,
        source="internvl_chat/eval/caption/evaluate_caption.py",
        files=("coco/annotations/coco_karpathy_test.json", "coco/annotations/coco_karpathy_test_gt.json",
               "coco/val2014/"),
    ),
    "flickr30k": Task(
        "Flickr30k captions, Karpathy test", _CAPTION, "captions", 30, convert.flickr30k, min_new_tokens=8,
        source="internvl_chat/eval/caption/evaluate_caption.py", count=1_000,
        files=("flickr30k/flickr30k_test_karpathy.json", "flickr30k/Images/"),
    ),
    "nocaps": Task(
        "NoCaps captions, val", _CAPTION, "captions", 30, convert.nocaps, min_new_tokens=8, count=4_500,
        source="internvl_chat/eval/caption/evaluate_caption.py",
        files=("nocaps/nocaps_val_4500_captions.json", "nocaps/images/"),
    ),
    **{
        name: Task(
            title, _REGION, "refcoco", 100, records, source="internvl_chat/eval/refcoco/evaluate_grounding.py",
            files=tuple(f"refcoco/{name}_{split}.jsonl" for split in splits),
        )
        for name, title, records, splits in (
            ("refcoco", "RefCOCO", convert.refcoco, ("val", "testA", "testB")),
            ("refcoco+", "RefCOCO+", convert.refcoco_plus, ("val", "testA", "testB")),
            ("refcocog", "RefCOCOg", convert.refcocog, ("val", "test")),
        )
    },
    "mvbench": Task(
        "MVBench", _WATCH, "mvbench", 1000, convert.mvbench, option="\n({letter}) {text}", max_tiles=1, frames=16,
        source="internvl_chat/eval/mvbench/evaluate_mvbench.py", count=4_000,
        files=("MVBench/json/*.json", "MVBench/video/"),
    ),
    "videomme": Task(
        "Video-MME without subtitles", _FRAMES, "videomme", 4096, convert.videomme, max_tiles=1, frames=16,
        min_new_tokens=0, frame_prefix="Frame-{i}: ", source=f"{_KIT}, vlmeval/dataset/videomme.py", count=2_700,
        files=("Video-MME/videomme/test-00000-of-00001.parquet", "Video-MME/video/"),
        note="VLMEvalKit takes frame i of n at i / (n + 1) of the video, here at the middle of the n-th parts",
    ),
    "hallusionbench": Task(
        "HallusionBench, questions with a picture",
        "{question} Please answer yes or no. " + _SHORT, "hallusionbench", 4096, kit_tables.hallusionbench,
        min_new_tokens=0, source=_KIT, files=("LMUData/HallusionBench.tsv",), count=951,
    ),
    "mathvista": Task(
        "MathVista testmini", "{question}", "mathvista", 4096, kit_tables.mathvista, option="", min_new_tokens=0,
        source=_KIT, files=("LMUData/MathVista_MINI.tsv",), count=1_000,
        note="VLMEvalKit lets a judge model extract answers that its rules cannot read; here rules alone read them",
    ),
    **{
        name: Task(
            title, _CHOOSE, "mcq", 4096, kit_tables.choices(file), min_new_tokens=0, chinese_prompt=_CHOOSE_ZH,
            source=_KIT, files=(f"LMUData/{file}.tsv",), count=count,
        )
        for name, title, file, count in (
            ("mmstar", "MMStar", "MMStar", 1_500),
            ("realworldqa", "RealWorldQA", "RealWorldQA", 765),
            ("blink", "BLINK val", "BLINK", 1_901),
            ("mmt_bench", "MMT-Bench val", "MMT-Bench_VAL", 3_127),
            ("vstar", "V* Bench", "VStarBench", 191),
        )
    },
}  # fmt: skip
