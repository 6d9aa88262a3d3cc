"""Official annotation files → plain records, one function per benchmark.

Each takes the data folder, laid out as internvl_chat's READMEs have it (`data/docvqa/val/…`), and yields records with
`id`, `question`, `images` or `videos`, and the ground truth: `response` (one expected answer), `answers`, `options`,
`category`, `group`, `box`, `size`. `ivl.eval.benchmarks.tasks` writes the prompt from the question.
"""

from __future__ import annotations

import ast
import base64
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ivl.errors import UserError
from ivl.storage.parquet import parquet_rows

Record = dict[str, Any]
LETTERS = "ABCDEFGHIJKLM"


def _open(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the benchmark's official download there")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected the benchmark's official download") from error


def _json(path: Path) -> Any:
    return _parsed(_open(path), str(path))


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_open(path).split("\n"), 1):
        if line.strip():
            yield _parsed(line, f"{path}:{number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); is the download complete?") from error


_MISSING = {"", "NA", "N/A", "NaN", "nan", "NULL", "null", "n/a", "#N/A", "<NA>"}
"""Cells that pandas, the scripts' reader, takes for missing; so an option "NA" is none to them."""


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated file without their missing cells."""
    csv.field_size_limit(sys.maxsize)  # pictures are cells
    for row in csv.DictReader(io.StringIO(_open(path), newline=""), delimiter="\t"):
        yield {key: cell for key, cell in row.items() if cell is not None and cell not in _MISSING}


def _parquet(path: Path) -> list[Record]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the benchmark's official download there")
    return list(parquet_rows(path, str(path)))


def _below(root: Path, path: str) -> str:
    """Resolve a path that the published files write from the folder above `data/`."""
    return str(root / path.removeprefix("./").removeprefix("data/"))


def _uri(data: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _coco_vqa(root: Path, folder: str, questions: str, annotations: str) -> Iterator[Record]:
    answers = {a["question_id"]: a for a in _json(root / folder / annotations)["annotations"]}
    for q in _json(root / folder / questions)["questions"]:
        gold = [a["answer"] for a in answers[q["question_id"]]["answers"]]
        image = root / folder / "val2014" / f"COCO_val2014_{q['image_id']:012d}.jpg"
        yield _vqa(str(q["question_id"]), q["question"], image, gold)


def _vqa(name: str, question: str, image: Path, answers: list[str]) -> Record:
    gold = Counter(answers).most_common(1)[0][0]
    return {"id": name, "question": question, "images": [str(image)], "answers": answers, "response": gold}


def vqav2(root: Path) -> Iterator[Record]:
    questions = "v2_OpenEnded_mscoco_val2014_questions.json"
    return _coco_vqa(root, "vqav2", questions, "v2_mscoco_val2014_annotations.json")


def okvqa(root: Path) -> Iterator[Record]:
    return _coco_vqa(root, "okvqa", "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")


def textvqa(root: Path) -> Iterator[Record]:
    for q in _json(root / "textvqa/TextVQA_0.5.1_val.json")["data"]:
        image = root / "textvqa/train_images" / f"{q['image_id']}.jpg"
        yield _vqa(str(q["question_id"]), q["question"], image, q["answers"])


def vizwiz(root: Path) -> Iterator[Record]:
    for q in _json(root / "vizwiz/annotations/val.json"):
        yield _vqa(q["image"], q["question"], root / "vizwiz/val" / q["image"], [a["answer"] for a in q["answers"]])


def gqa(root: Path) -> Iterator[Record]:
    for name, q in _json(root / "gqa/testdev_balanced_questions.json").items():
        yield _vqa(name, q["question"], root / "gqa/images" / f"{q['imageId']}.jpg", [q["answer"]])


def ocrvqa(root: Path) -> Iterator[Record]:
    for name, book in _json(root / "ocrvqa/dataset.json").items():
        if book["split"] != 3:  # 1 train, 2 validation, 3 test
            continue
        image = root / "ocrvqa/images" / f"{name}{Path(book['imageURL']).suffix}"
        for n, (question, answer) in enumerate(zip(book["questions"], book["answers"])):
            yield _vqa(f"{name}_{n}", question, image, [answer])


def ai2d(root: Path) -> Iterator[Record]:
    for n, q in enumerate(_lines(root / "ai2diagram/test_vlmevalkit.jsonl")):
        yield _vqa(str(q.get("question_id", n)), q["question"], Path(_below(root, q["image"])), [q["answer"]])


def chartqa(root: Path) -> Iterator[Record]:
    folder = root / "chartqa/ChartQA Dataset/test"
    for half in ("human", "augmented"):
        for n, q in enumerate(_json(folder / f"test_{half}.json")):
            yield _vqa(f"{half}_{n}", q["query"], folder / "png" / q["imgname"], [q["label"]]) | {"category": half}


def docvqa(root: Path) -> Iterator[Record]:
    for q in _json(root / "docvqa/val/val_v1.0.json")["data"]:
        yield _vqa(str(q["questionId"]), q["question"], root / "docvqa/val" / q["image"], q["answers"])


def infovqa(root: Path) -> Iterator[Record]:
    folder = root / "infographicsvqa"
    for q in _json(folder / "infographicsVQA_val_v1.0_withQT.json")["data"]:
        image = folder / "infographicsvqa_images" / q["image_local_name"]
        yield _vqa(str(q["questionId"]), q["question"], image, q["answers"])


MME_TASKS = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip


def mme(root: Path) -> Iterator[Record]:
    """Read folders with texts and pictures side by side, or in `questions_answers_YN/` and `images/`."""
    for task in MME_TASKS:
        folder = root / "mme/MME_Benchmark_release_version" / task
        texts = sorted([*folder.glob("*.txt"), *folder.glob("questions_answers_YN/*.txt")])
        if not texts:
            raise UserError(f"{folder}: no .txt files; expected MME's questions and answers, two a picture")
        for text in texts:
            beside = folder / "images" if text.parent != folder else folder
            image = next((p for p in sorted(beside.glob(f"{text.stem}.*")) if p.suffix != ".txt"), None)
            if image is None:
                raise UserError(f"{text}: no picture {text.stem}.jpg or .png in {beside}")
            for n, line in enumerate(_open(text).splitlines()):
                question, gold = line.split("\t")
                yield {
                    "id": f"{task}/{text.stem}/{n}",
                    "question": question,
                    "images": [str(image)],
                    "response": gold,
                    "category": task,
                    "group": text.stem,
                }


def pope(root: Path) -> Iterator[Record]:
    """Match LLaVA's prompts with POPE's labels, in order within a category as the script does."""
    labels = {name: list(_lines(root / f"pope/coco/coco_pope_{name}.json")) for name in _POPE}
    at: Counter[str] = Counter()
    for q in _lines(root / "pope/llava_pope_test.jsonl"):
        category = q["category"]
        gold = labels[category][at[category]]
        at[category] += 1
        if not q["text"].startswith(gold["text"]):
            raise UserError(
                f"pope: question {q['question_id']} ({category}) is not {gold['text']!r} of POPE's own file"
            )
        yield {
            "id": f"{category}/{q['question_id']}",
            "question": q["text"],
            "images": [str(root / "pope/val2014" / q["image"])],
            "response": gold["label"],
            "category": category,
        }


_POPE = ("random", "popular", "adversarial")


def _mmbench(path: Path) -> Iterator[Record]:
    for row in _table(path):
        yield {
            "id": row["index"],
            "question": row["question"],
            "hint": row.get("hint"),
            "options": {letter: row[letter] for letter in "ABCDE" if letter in row},
            "images": [_uri(base64.b64decode(row["image"]))],
            "response": row.get("answer"),
            "category": row.get("category", ""),
            "group": str(int(row["index"]) % 1_000_000),
        }


def mmbench_en(root: Path) -> Iterator[Record]:
    return _mmbench(root / "mmbench/mmbench_dev_20230712.tsv")


def mmbench_cn(root: Path) -> Iterator[Record]:
    return _mmbench(root / "mmbench/mmbench_dev_cn_20231003.tsv")


def ccbench(root: Path) -> Iterator[Record]:
    return _mmbench(root / "mmbench/CCBench_legacy.tsv")


def scienceqa(root: Path) -> Iterator[Record]:
    for name, q in _json(root / "scienceqa/problems.json").items():
        if q["split"] == "test" and q["image"]:
            yield {
                "id": name,
                "question": q["question"],
                "hint": q["hint"] or None,
                "options": dict(zip("ABCDE", q["choices"])),
                "images": [str(root / "scienceqa/images/test" / name / q["image"])],
                "response": LETTERS[q["answer"]],
                "category": q.get("subject", ""),
            }


def mmmu(root: Path) -> Iterator[Record]:
    """Read MMMU, the first picture doubled in size as the script has it; needs pyarrow."""
    files = sorted((root / "MMMU").glob("*/validation-*.parquet"))
    if not files:
        raise UserError(
            f"{root / 'MMMU'}: no */validation-*.parquet; expected the MMMU data set's folders, one a subject"
        )
    for file in files:
        for q in _parquet(file):
            pictures = [q[f"image_{n}"]["bytes"] for n in range(1, 8) if q.get(f"image_{n}")]
            with Image.open(io.BytesIO(pictures[0])) as first:
                doubled = first.convert("RGB").resize((first.width * 2, first.height * 2), Image.Resampling.BILINEAR)
            png = io.BytesIO()
            doubled.save(png, "PNG")
            options = [option.strip() for option in ast.literal_eval(q["options"])]
            gold = q["answer"]
            answers = ast.literal_eval(gold) if gold.startswith("[") else [gold]
            yield {
                "id": q["id"],
                "question": q["question"].strip(),
                "options": dict(zip(LETTERS, options)),
                "images": [_uri(png.getvalue(), "png"), *map(_uri, pictures[1:])],
                "answers": answers,
                "response": answers[0],
                "category": "_".join(q["id"].split("_")[1:-1]),
            }


def seed(root: Path) -> Iterator[Record]:
    for q in _lines(root / "SEED/seed.jsonl"):
        yield _vqa(str(q["question_id"]), q["text"], root / "SEED" / q["image"], [q["answer"]])


def ocrbench(root: Path) -> Iterator[Record]:
    for n, q in enumerate(_json(root / "OCRBench/OCRBench.json")):
        answers = q["answers"] if isinstance(q["answers"], list) else [q["answers"]]
        image = root / "OCRBench/OCRBench_Images" / q["image_path"]
        yield _vqa(str(n), q["question"], image, answers) | {"category": q["type"]}


def _captions(images: list[Record], annotations: list[Record], folder: Path) -> Iterator[Record]:
    captions: dict[Any, list[str]] = {}
    for a in annotations:
        captions.setdefault(a["image_id"], []).append(a["caption"])
    for image in images:
        name = image.get("file_name") or image["image"]
        yield _vqa(str(image["id"]), "", folder / name, captions[image["id"]])


def coco(root: Path) -> Iterator[Record]:
    folder = root / "coco"
    images = [
        {"id": int(entry["image"].split("_")[-1].removesuffix(".jpg")), "image": entry["image"]}
        for entry in _json(folder / "annotations/coco_karpathy_test.json")
    ]
    return _captions(images, _json(folder / "annotations/coco_karpathy_test_gt.json")["annotations"], folder)


def flickr30k(root: Path) -> Iterator[Record]:
    file = _json(root / "flickr30k/flickr30k_test_karpathy.json")
    return _captions(file["images"], file["annotations"], root / "flickr30k")


def nocaps(root: Path) -> Iterator[Record]:
    file = _json(root / "nocaps/nocaps_val_4500_captions.json")
    return _captions(file["images"], file["annotations"], root / "nocaps/images")


def _refcoco(root: Path, name: str, *splits: str) -> Iterator[Record]:
    for split in splits:
        for n, q in enumerate(_lines(root / f"refcoco/{name}_{split}.jsonl")):
            w, h, box = q["width"], q["height"], q["bbox"]
            written = [round(value / side * 1000) for value, side in zip(box, (w, h, w, h))]
            yield {
                "id": f"{split}/{n}",
                "question": q["sent"],
                "images": [_below(root, q["image"])],
                "box": box,
                "size": [w, h],
                "response": f"<ref>{q['sent']}</ref><box>[{written}]</box>",
                "category": split,
            }


def refcoco(root: Path) -> Iterator[Record]:
    return _refcoco(root, "refcoco", "val", "testA", "testB")


def refcoco_plus(root: Path) -> Iterator[Record]:
    return _refcoco(root, "refcoco+", "val", "testA", "testB")


def refcocog(root: Path) -> Iterator[Record]:
    return _refcoco(root, "refcocog", "val", "test")


MVBENCH = {
    "Action Sequence": "star/Charades_v1_480",
    "Action Prediction": "star/Charades_v1_480",
    "Action Antonym": "ssv2_video",
    "Fine-grained Action": "Moments_in_Time_Raw/videos",
    "Unexpected Action": "FunQA_test/test",
    "Object Existence": "clevrer/video_validation",
    "Object Interaction": "star/Charades_v1_480",
    "Object Shuffle": "perception/videos",
    "Moving Direction": "clevrer/video_validation",
    "Action Localization": "sta/sta_video",
    "Scene Transition": "scene_qa/video",
    "Action Count": "perception/videos",
    "Moving Count": "clevrer/video_validation",
    "Moving Attribute": "clevrer/video_validation",
    "State Change": "perception/videos",
    "Fine-grained Pose": "nturgbd",
    "Character Order": "perception/videos",
    "Egocentric Navigation": "vlnqa",
    "Episodic Reasoning": "tvqa/frames_fps3_hq",
    "Counterfactual Inference": "clevrer/video_validation",
}
"""Task → its folder of videos below MVBench/video; in Episodic Reasoning a folder of frames, 3 a second, is a video"""
_CUT = {"Action Sequence", "Action Prediction", "Object Interaction", "Action Localization", "Episodic Reasoning"}


def mvbench(root: Path) -> Iterator[Record]:
    for task, folder in MVBENCH.items():
        name = task.lower().replace(" ", "_").replace("-", "_")
        for n, q in enumerate(_json(root / f"MVBench/json/{name}.json")):
            texts = q["candidates"]
            letters = dict(zip(texts, LETTERS))  # of equal texts the last one's, as the script has it
            options = dict(zip(LETTERS, [*texts[:-1], texts[-1].rstrip()]))
            cut = {key: q[key] for key in ("start", "end") if key in q and task in _CUT}
            yield {
                "id": f"{name}/{n}",
                "question": q["question"],
                "options": options,
                "videos": [str(root / "MVBench/video" / folder / q["video"])],
                **cut,
                "response": f"({letters[q['answer']]}) {q['answer']}",
                "category": task,
            }


def videomme(root: Path) -> Iterator[Record]:
    """Read Video-MME; needs pyarrow."""
    for q in _parquet(root / "Video-MME/videomme/test-00000-of-00001.parquet"):
        yield {
            "id": q["question_id"],
            "question": q["question"] + "\n" + "\n".join(q["options"]),
            "options": {option[0]: option[2:].strip() for option in q["options"]},
            "videos": [str(root / "Video-MME/video" / f"{q['videoID']}.mp4")],
            "response": q["answer"],
            "category": q["duration"],
        }
