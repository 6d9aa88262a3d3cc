"""Scores the generated answers with the published scripts and writes `recorded.json`. Run by hand, never by pytest.

    python tests/eval/record.py INTERNVL VLMEVALKIT

Both are checkouts (OpenGVLab/InternVL at 2410d1d, open-compass/VLMEvalKit at e8e78f0). Their functions are taken out
of their files one by one, since the files themselves import models, CUDA and data sets. Needs scikit-learn, pandas and
torch.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import random
import re
import string
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torchvision.ops.boxes import box_area

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.eval import generated


def take(path: Path, *names: str, **given: Any) -> dict[str, Any]:
    """The named functions, classes and constants of a file, run in a namespace of their own."""
    given = {"re": re, "np": np, "random": random, "Optional": Optional, "os": os, "json": json} | given
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if {getattr(node, "name", None), *targets} & set(names):
            exec(compile(ast.Module([node], []), str(path), "exec"), given)
    return given


class Table:
    """As much of a data frame as OCRBench_eval reads."""

    def __init__(self, rows):
        self.iloc = rows

    def __len__(self):
        return len(self.iloc)


def silent(call, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        value = call(*args, **kwargs)
    return value, out.getvalue()


def _anls(internvl: Path) -> list[float]:
    path = internvl / "vqa/infographicsvqa_eval.py"
    script = take(path, "levenshtein_distance", "evaluate_method", "question_ids_to_exclude")
    script |= {"answer_types": {}, "evidence_types": {}, "reasoning_requirements": {}}
    rows = generated.rows(generated.anls)
    with tempfile.TemporaryDirectory() as folder:
        gold, said = Path(folder, "gold.json"), Path(folder, "said.json")
        data = [{"questionId": i, "question": "", "answers": r["answers"]} for i, r in enumerate(rows)]
        gold.write_text(json.dumps({"data": data}))
        said.write_text(json.dumps([{"questionId": i, "answer": r["prediction"]} for i, r in enumerate(rows)]))
        params = argparse.Namespace(answer_types=False, anls_threshold=0.5)
        result = script["evaluate_method"](gold, said, params)["per_sample_result"]
    return [result[str(i)]["score"] for i in range(len(rows))]


def _refcoco(path: Path) -> list[float]:
    tree = ast.parse(path.read_text())
    loop = next(
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.For) and "predict_bbox" in ast.dump(n) and "output" in ast.dump(n.target)
    )
    pattern = next(n for n in ast.walk(tree) if isinstance(n, ast.Assign) and "PATTERN" in ast.dump(n.targets[0]))
    script = take(path, "box_iou", torch=torch, box_area=box_area)
    exec(compile(ast.Module([pattern], []), "", "exec"), script)
    scores = []
    for row in generated.rows(generated.refcoco):
        output = {"answer": row["prediction"], "gt_bbox": row["box"], "hw": row["size"][::-1]}
        script |= {"merged_outputs": [output], "correct": 0, "total_cnt": 0}
        exec(compile(ast.Module([loop], []), "", "exec"), script)
        scores.append(float(script["correct"]))
    return scores


def _ocrbench(vlmeval: Path) -> list[float]:
    seen: dict[str, Any] = {}
    script = take(
        vlmeval / "dataset/utils/ocrbench.py",
        "OCRBench_eval",
        tqdm=lambda x: x,
        load=lambda rows: Table(rows),
        dump=lambda value, path: seen.update(value),
        get_intermediate_file_path=lambda *a: "",
        logger=type("", (), {"info": staticmethod(lambda *a: None)}),
    )
    scores = []
    for row in generated.rows(generated.ocrbench):
        line = {"prediction": row["prediction"], "answer": repr(row["answers"]), "category": row["category"]}
        script["OCRBench_eval"]([line])
        scores.append(float(seen["Final Score"]))
    return scores


def _mme(internvl: Path) -> dict[str, Any]:
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_score, recall_score

    clean = take(internvl / "mme/eval.py", "post_processing")["post_processing"]
    script = take(
        internvl / "mme/calculation.py",
        "calculate_metrics",
        accuracy_score=accuracy_score,
        confusion_matrix=confusion_matrix,
        precision_score=precision_score,
        recall_score=recall_score,
        eval_type_dict={"Perception": list(generated.TASKS[:3]), "Cognition": list(generated.TASKS[3:])},
    )
    rows = generated.rows(generated.yes_no)
    share = len(rows) // len(generated.TASKS)
    with tempfile.TemporaryDirectory() as folder:
        for i, task in enumerate(generated.TASKS):
            with Path(folder, f"{task}.txt").open("w", encoding="utf-8") as file:
                for row in rows[i * share : (i + 1) * share]:
                    print("x.jpg", "q", row["reference"], clean(row["prediction"]), sep="\t", file=file)
        _, out = silent(script["calculate_metrics"]().process_result, folder)
    scores = {name: float(value) for name, value in re.findall(r"\t (\w+)  score: ([\d.]+)", out)}
    return scores | dict(zip(("perception", "cognition"), map(float, re.findall(r"total score: ([\d.]+)", out))))


def _pope(internvl: Path) -> dict[str, float]:
    script = take(internvl / "pope/eval_pope.py", "eval_pope")["eval_pope"]
    rows = generated.rows(generated.yes_no)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write("\n".join(json.dumps({"label": r["reference"].lower()}) for r in rows))
        file.flush()
        _, out = silent(script, [{"text": r["prediction"]} for r in rows], file.name)
    return {name.lower(): float(value) for name, value in re.findall(r"(\w+)(?: score| ratio)?: ([\d.]+)", out)}


def _yes_no_of_vlmevalkit(vlmeval: Path):
    punctuation = take(vlmeval / "smp/misc.py", "process_punctuation")["process_punctuation"]
    return take(vlmeval / "dataset/utils/yorn.py", "YOrN_Extraction", process_punctuation=punctuation)[
        "YOrN_Extraction"
    ]


def _hallusionbench(vlmeval: Path) -> dict[str, float]:
    from collections import defaultdict

    import pandas as pd

    extract, rows = _yes_no_of_vlmevalkit(vlmeval), generated.rows(generated.hallusionbench)
    script = take(
        vlmeval / "dataset/utils/yorn.py", "Hallusion_rating", pd=pd, defaultdict=defaultdict, load=lambda table: table
    )
    table = pd.DataFrame(
        {
            "index": [f"a_b_c_{r['set']}_{r['figure']}_{r['question']}" for r in rows],
            "l2-category": [r["l2"] for r in rows],
            "score": [r["reference"] == extract(r["prediction"]) for r in rows],
        }
    )
    overall = script["Hallusion_rating"](table).iloc[0]
    return {name: float(overall[name]) for name in ("aAcc", "fAcc", "qAcc")}


def main(internvl: Path, vlmeval: Path) -> None:
    vqa = take(
        internvl / "vqa/evaluate_vqa.py",
        "relaxed_correctness",
        "evaluate_relaxed_accuracy",
        "evaluate_exact_match_accuracy",
    )
    soft = take(
        internvl / "vqa/textvqa_eval.py", "EvalAIAnswerProcessor", "TextVQAAccuracyEvaluator", tqdm=lambda x, **_: x
    )
    soft = soft["TextVQAAccuracyEvaluator"]()
    options = take(internvl / "mmbench/evaluate_mmbench.py", "post_process")["post_process"]
    brackets = take(internvl / "scienceqa/evaluate_scienceqa.py", "post_process")["post_process"]
    video = take(internvl / "mvbench/evaluate_mvbench.py", "check_ans")["check_ans"]
    mme = take(vlmeval / "dataset/utils/videomme.py", "extract_characters_regex")["extract_characters_regex"]
    infer = take(
        vlmeval / "utils/matching_util.py",
        "can_infer", "can_infer_option", "can_infer_text", "_VERBOSE_ANSWER_RE",
        cp=__import__("copy"), string=string,
    )["can_infer"]  # fmt: skip
    open_ = take(
        internvl / "mmmu/eval_utils.py",
        "check_is_number", "normalize_str", "extract_numbers", "parse_open_response", "eval_open",
    )  # fmt: skip

    def as_entry(row):
        return {"answer": row["prediction"], "annotation": row["answers"]}

    def or_none(call, *args):
        try:
            return call(*args)
        except IndexError:  # the scripts stop at an empty answer and at "(B"
            return None

    choices = generated.rows(generated.choice)
    read = _yes_no_of_vlmevalkit(vlmeval)
    check = take(vlmeval / "dataset/utils/mathvista.py", "post_check")["post_check"]

    def as_line(row):
        """A line of the table after a judge that extracts nothing: its result is the whole answer."""
        return {"question_type": "free_form", "prediction": row["prediction"], "res": row["prediction"], **row}

    def free_form(row):
        try:
            return float(check(as_line(row) | {"prediction": row["prediction"]}))
        except ValueError:
            return 0.0

    recorded = {
        "vqa": [
            soft.eval_pred_list([{"pred_answer": r["prediction"], "gt_answers": r["answers"]}])
            for r in generated.rows(generated.vqa)
        ],
        "anls": _anls(internvl),
        "relaxed": [float(vqa["evaluate_relaxed_accuracy"]([as_entry(r)])) for r in generated.rows(generated.relaxed)],
        "exact": [vqa["evaluate_exact_match_accuracy"]([as_entry(r)]) for r in generated.rows(generated.exact)],
        "ocrbench": _ocrbench(vlmeval),
        "choice": [or_none(options, r["prediction"], r["options"]) for r in choices],
        "scienceqa": [or_none(brackets, r["prediction"], r["options"]) for r in choices],
        "infer": [infer(r["prediction"], dict(r["options"])) or "" for r in choices],
        "videomme": [mme(r["prediction"]) for r in choices],
        "mvbench": [float(video(r["prediction"], r["reference"])) for r in generated.rows(generated.mvbench)],
        "mmmu": [
            float(open_["eval_open"](r["answers"], open_["parse_open_response"](r["prediction"])))
            for r in generated.rows(generated.mmmu)
        ],
        "yes_no": [read(r["prediction"]) for r in generated.rows(generated.hallusionbench)],
        "hallusionbench": _hallusionbench(vlmeval),
        "mathvista": [free_form(r) for r in generated.rows(generated.mathvista)],
        "refcoco": _refcoco(internvl / "refcoco/evaluate_grounding.py"),
        "mme": _mme(internvl),
        "pope": _pope(internvl),
    }
    lines = [f"  {json.dumps(rule)}: {json.dumps(scores, separators=(',', ':'))}" for rule, scores in recorded.items()]
    Path(__file__).with_name("recorded.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "internvl_chat/eval", Path(sys.argv[2]) / "vlmeval")
