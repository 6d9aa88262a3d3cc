"""Annotation files in the shapes the benchmarks publish, a few questions each, with pictures of a few pixels."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from ivl.eval.benchmarks.convert import MME_TASKS, MVBENCH


def jpeg(size=(40, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "JPEG")
    return out.getvalue()


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _vqa(root: Path) -> None:
    ten = [{"answer": "2", "answer_id": n} for n in range(1, 10)] + [{"answer": "3", "answer_id": 10}]
    files = {
        "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
        "okvqa": ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
    }
    for folder, (questions, annotations) in files.items():
        put(root / folder / questions, {"questions": [{"image_id": 42, "question": "How many?", "question_id": 420}]})
        put(root / folder / annotations, {"annotations": [{"question_id": 420, "image_id": 42, "answers": ten}]})
        put(root / folder / "val2014/COCO_val2014_000000000042.jpg", jpeg())
    texts = {"question": "How many?", "image_id": "ab", "question_id": 9, "answers": [a["answer"] for a in ten]}
    put(root / "textvqa/TextVQA_0.5.1_val.json", {"data": [texts]})
    put(root / "textvqa/train_images/ab.jpg", jpeg())
    put(root / "vizwiz/annotations/val.json", [{"image": "v.jpg", "question": "How many?", "answers": ten}])
    put(root / "vizwiz/val/v.jpg", jpeg())
    put(root / "gqa/testdev_balanced_questions.json", {"7": {"imageId": "n1", "question": "Is it?", "answer": "yes"}})
    put(root / "gqa/images/n1.jpg", jpeg())
    book = {"imageURL": "x/y.jpg", "questions": ["Who?", "What?"], "answers": ["Me", "A book"], "split": 3}
    put(root / "ocrvqa/dataset.json", {"01": book, "02": book | {"split": 1}})
    put(root / "ocrvqa/images/01.jpg", jpeg())


def _documents(root: Path) -> None:
    row = {
        "question": "Which?\nA. x\nB. y",
        "question_id": 0,
        "image": "data/ai2diagram/AI2D_TEST/0.png",
        "answer": "A",
    }
    put(root / "ai2diagram/test_vlmevalkit.jsonl", lines(row))
    put(root / "ai2diagram/AI2D_TEST/0.png", jpeg())
    for half in ("human", "augmented"):
        chart = {"imgname": "1.png", "query": "How much?", "label": "12"}
        put(root / f"chartqa/ChartQA Dataset/test/test_{half}.json", [chart])
    put(root / "chartqa/ChartQA Dataset/test/png/1.png", jpeg())
    page = {"questionId": 5, "question": "When?", "image": "documents/p.png", "answers": ["May 1", "1 May"]}
    put(root / "docvqa/val/val_v1.0.json", {"dataset_name": "docvqa", "data": [page]})
    put(root / "docvqa/val/documents/p.png", jpeg())
    page = {"questionId": 6, "question": "When?", "image_local_name": "6.jpeg", "answers": ["May 1"]}
    put(root / "infographicsvqa/infographicsVQA_val_v1.0_withQT.json", {"data": [page]})
    put(root / "infographicsvqa/infographicsvqa_images/6.jpeg", jpeg())
    row = {"id": 3, "dataset_name": "svt", "image_path": "svt/1.jpg", "question": "what is written?", "answers": "STOP"}
    formula = row | {"answers": ["a^2"], "type": "Handwritten Mathematical Expression Recognition"}
    put(root / "OCRBench/OCRBench.json", [row | {"type": "Regular Text Recognition"}, formula])
    put(root / "OCRBench/OCRBench_Images/svt/1.jpg", jpeg())


def _sets(root: Path) -> None:
    for n, task in enumerate(MME_TASKS):
        folder = root / "mme/MME_Benchmark_release_version" / task
        texts, images = (folder / "questions_answers_YN", folder / "images") if n % 2 else (folder, folder)
        put(texts / "0001.txt", "Is it a dog?\tYes\nIs it a cat?\tNo\n")
        put(images / "0001.jpg", jpeg())
    asked = "Is there a dog in the image?"
    for category in ("random", "popular", "adversarial"):
        labels = [{"question_id": k, "image": "c.jpg", "text": asked, "label": ("yes", "no")[k]} for k in (0, 1)]
        put(root / f"pope/coco/coco_pope_{category}.json", lines(*labels))
    text = f"{asked}\nAnswer the question using a single word or phrase."
    rows = [
        {"question_id": 10 * n + k, "image": "c.jpg", "text": text, "category": category}
        for n, category in enumerate(("adversarial", "popular", "random"))
        for k in range(2)
    ]
    put(root / "pope/llava_pope_test.jsonl", lines(*rows))
    put(root / "pope/val2014/c.jpg", jpeg())
    image = base64.b64encode(jpeg()).decode()
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
    first = f'3\tWhich?\tLook.\tcat\t"a ""hot"" dog"\t\t\tA\tlogic\t{image}\n'
    second = f'1000003\tWhich?\tLook.\t"a ""hot"" dog"\tcat\t\t\tB\tlogic\t{image}\n'
    for name in ("mmbench_dev_20230712", "mmbench_dev_cn_20231003", "CCBench_legacy"):
        put(root / f"mmbench/{name}.tsv", head + first + second)
    problem = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look.", "image": "image.png"}
    others = {"2": problem | {"split": "test", "image": None}, "3": problem | {"split": "train"}}
    put(root / "scienceqa/problems.json", {"1": problem | {"split": "test"}, **others})
    put(root / "scienceqa/images/test/1/image.png", jpeg())
    row = {"question_id": 11, "image": "SEED-Bench-image/1_2", "text": "Which?\nA. x\nB. y", "answer": "B"}
    put(root / "SEED/seed.jsonl", lines(row))
    put(root / "SEED/SEED-Bench-image/1_2", jpeg())


def _kit_tables(root: Path) -> None:
    image = base64.b64encode(jpeg()).decode()
    head = "index\tquestion\thint\tA\tB\tanswer\tcategory\tl2-category\timage\n"
    cells = "Which?\tLook.\tcat\tdog\tB\tlogic\tall"
    two = f"2\t是什么?\t\tcat\tdog\tA\tlogic\tall\t\"['{image}', '{image}']\"\n"
    three = "3\tHow many?\t\ttwo\tnine\tA\tcount\tall\t1\n"
    for name in ("MMStar", "RealWorldQA", "BLINK", "MMT-Bench_VAL", "VStarBench"):
        put(root / f"LMUData/{name}.tsv", f"{head}1\t{cells}\t{image}\n" + two + three)
    head = "index\tquestion\tanswer\tcategory\tl2-category\timage\n"
    rows = (
        ("VD_illusion_x_0_0_0", "No", image),
        ("VD_illusion_x_0_0_1", "Yes", image),
        ("VD_illusion_x_0_1_0", "Yes", ""),
    )
    put(
        root / "LMUData/HallusionBench.tsv",
        head + "".join(f"{name}\tIs it?\t{answer}\tVD\tillusion\t{cell}\n" for name, answer, cell in rows),
    )
    head = "index\tquestion\tquestion_type\tanswer_type\tchoices\tanswer\tanswer_option\ttask\timage\n"
    first = f"1\tHint: letter.\tmulti_choice\ttext\t\"['cat', 'dog']\"\tdog\tB\tfigures\t{image}\n"
    put(root / "LMUData/MathVista_MINI.tsv", f"{head}{first}2\tHow many?\tfree_form\tinteger\t\t14\t\tcount\t{image}\n")


def _pictures(root: Path) -> None:
    name = "val2014/COCO_val2014_000000000042.jpg"
    put(root / "coco/annotations/coco_karpathy_test.json", [{"image": name, "caption": ["a red field"]}])
    captions = [{"image_id": 42, "id": n, "caption": text} for n, text in enumerate(("a red field", "all is red"))]
    put(root / "coco/annotations/coco_karpathy_test_gt.json", {"annotations": captions, "images": [{"id": 42}]})
    put(root / "coco" / name, jpeg())
    put(root / "flickr30k/flickr30k_test_karpathy.json",
        {"images": [{"id": 42, "image": "Images/1.jpg"}], "annotations": captions})  # fmt: skip
    put(root / "flickr30k/Images/1.jpg", jpeg())
    put(root / "nocaps/nocaps_val_4500_captions.json",
        {"images": [{"id": 42, "file_name": "1.jpg"}], "annotations": captions})  # fmt: skip
    put(root / "nocaps/images/1.jpg", jpeg())
    row = {"image": "data/coco/" + name, "sent": "the thing", "bbox": [4, 3, 20, 15.0], "width": 40, "height": 30}
    for name, splits in {"refcoco": "val testA testB", "refcoco+": "val testA testB", "refcocog": "val test"}.items():
        for split in splits.split():
            put(root / f"refcoco/{name}_{split}.jsonl", lines(row))


def _videos(root: Path) -> None:
    for task in MVBENCH:
        row = {
            "video": "v.mp4",
            "question": "What?",
            "candidates": ["walk", "run "],
            "answer": "run ",
            "start": 1,
            "end": 2,
        }
        put(root / f"MVBench/json/{task.lower().replace(' ', '_').replace('-', '_')}.json", [row])


def _tables(root: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def table(path: Path, rows: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    row = {"id": "validation_Art_Theory_1", "question": "Which <image 1>?", "options": "['cat', 'dog ']", "answer": "B"}
    row |= {"question_type": "multiple-choice", "image_1": {"bytes": jpeg(), "path": "1.png"}, "image_2": None}
    asked = {"id": "validation_Art_Theory_2", "options": "[]", "answer": "['6.5', 'six']", "question_type": "open"}
    rows = [row, row | asked | {"image_2": {"bytes": jpeg(), "path": "2.png"}}]
    table(root / "MMMU/Art_Theory/validation-00000-of-00001.parquet", rows)
    row = {"video_id": "1", "duration": "short", "videoID": "abc", "question_id": "1-1", "question": "What?"}
    row |= {"options": ["A. walk.", "B. run.", "C. sit.", "D. lie."], "answer": "B"}
    table(root / "Video-MME/videomme/test-00000-of-00001.parquet", [row])


def write(root: Path, tables: bool) -> None:
    """All benchmarks below a data folder; those kept in parquet tables only where asked."""
    for part in (_vqa, _documents, _sets, _kit_tables, _pictures, _videos, *([_tables] if tables else [])):
        part(root)
