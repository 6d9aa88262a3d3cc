"""Scores of answer files: table with intervals, record, HTML report (`python -m ivl score`)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ivl.errors import printable
from ivl.eval import own, predictions, report, stats
from ivl.eval.benchmarks.tasks import DECODING, TASKS, Task, fingerprint, task
from ivl.eval.own_fields import fill
from ivl.eval.rules import RULES, Scored
from ivl.options import ScoreOptions
from ivl.storage.files import write_text

_PUBLISHED = (
    "prompt", "open_prompt", "max_tiles", "max_new_tokens", "min_new_tokens", "frames", "frame_prefix",
    "source", "note",
)  # fmt: skip


def main(options: ScoreOptions) -> int:
    """Score files of answers. Returns 0. Raises UserError for a user's mistake."""
    options = replace(options, files=[predictions.file_of(path) for path in options.files])
    if options.task == "own":
        return _score_own(options)
    benchmark, files = task(options.task), options.files
    rows = [predictions.read(path, options.fields_of(n)) for n, path in enumerate(files, 1)]
    if options.rows:
        rows = [
            predictions.join(path, answers, options.rows, benchmark, options.partial)
            for path, answers in zip(files, rows)
        ]
    rows = [rows[0], *(predictions.align(rows[0], path, answers) for path, answers in zip(files[1:], rows[1:]))]
    scored = [RULES[benchmark.rule].run(answers, options.mode) for answers in rows]
    summary = record(options.task, options.mode, files, rows, scored, options.resamples, options.seed)
    _save(options, summary, table(summary))
    if options.html:
        report.write(options.html, summary, rows[0], scored[0])
        print(options.html)
    return 0


def _score_own(options: ScoreOptions) -> int:
    files = options.files
    rows = [predictions.read(path, options.fields_of(n), fill) for n, path in enumerate(files, 1)]
    if options.rows:
        truth = options.rows
        rows = [predictions.join(path, answers, truth, None, options.partial) for path, answers in zip(files, rows)]
    rows = [rows[0], *(own.align(rows[0], path, answers) for path, answers in zip(files[1:], rows[1:]))]
    scores = [own.score_rows(answers) for answers in rows]
    summary = own.record(files, rows, scores, options.resamples, options.seed)
    _save(options, summary, own.table(summary))
    if options.html:
        names = [path.name for path in files]
        totals = [file["scores"][own.ALL] for file in summary["files"]]
        title = " and ".join(names)
        report.write_own(options.html, title, totals, rows, scores, names if len(files) > 1 else ())
        print(options.html)
    return 0


def _save(options: ScoreOptions, summary: dict[str, Any], text: str) -> None:
    """Write the record, and print it."""
    out = options.out or options.files[0].with_suffix(".scores.json")
    write_text(out, json.dumps(summary, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    print(printable(text))
    print(f"\n{out}")


def record(
    name: str,
    mode: str,
    files: Sequence[Path],
    rows: Sequence[list[predictions.Row]],
    scored: Sequence[Scored],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Record of the scores of one or more files, without times and folders: equal inputs make equal records."""
    benchmark, first = task(name), rows[0]
    rule = RULES[benchmark.rule]
    summary: dict[str, Any] = {
        "task": name,
        "title": benchmark.title,
        "mode": mode,
        "metric": rule.metric,
        "published": {key: getattr(benchmark, key) for key in _PUBLISHED} | {"decoding": DECODING},
        "post_processing": rule.post,
        "data": {"fingerprint": fingerprint(first), "rows": len(first), "of": benchmark.count},
        "interval": {"level": stats.LEVEL, "resamples": resamples, "seed": seed},
        "files": [_file_record(benchmark, *parts, resamples, seed) for parts in zip(files, rows, scored)],
        "comparison": [],
    }
    for path, other in zip(files[1:], scored[1:]):
        gap = stats.difference(scored[0], other, resamples, seed)
        values = {key: None if value is None else round(value, 6) for key, value in vars(gap).items()}
        summary["comparison"].append({"file": path.name, "less": files[0].name, **values})
    return summary


def _file_record(
    benchmark: Task, path: Path, rows: Sequence[predictions.Row], scored: Scored, resamples: int, seed: int
) -> dict[str, Any]:
    low, high = stats.interval(scored, resamples, seed)
    categories = scored.by_category() if len(scored.categories) > 1 else {}
    prompts = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "score": round(float(scored.total()), 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "categories": {key: round(value, 6) for key, value in categories.items()},
        "further": {key: round(value, 6) for key, value in scored.extra.items()},
        "run": {key: rows[0].get(key) for key in predictions.RUN},
        "prompt": report.short_prompt(prompts[0]) if prompts else None,
        "asked_as_published": sum(_has_published_words(benchmark, text) for text in prompts) if prompts else None,
    }


def _has_published_words(benchmark: Task, prompt: str) -> bool:
    """True if all fixed words of the benchmark's prompt are in a prompt."""
    forms = filter(None, (benchmark.prompt, benchmark.open_prompt, benchmark.chinese_prompt))
    return any(all(part.strip() in prompt for part in re.split(r"\{\w+\}", form)) for form in forms)


def table(summary: dict[str, Any]) -> str:
    """Format a record for people."""
    data, digits = summary["data"], RULES[TASKS[summary["task"]].rule].decimals
    part = "" if data["of"] in (None, data["rows"]) else f" of {data['of']}: a part of the benchmark"
    lines = [f"{summary['title']} · {summary['mode']} · {data['rows']} rows{part}", ""]
    files = summary["files"]
    parts = [(kind, name) for kind in ("categories", "further") for name in files[0][kind]]
    width = max(len(name) for name in [*(file["file"] for file in files), *(name for _, name in parts)])
    column = max(12, len(summary["metric"]))
    lines.append(f"  {'':{width}}  {summary['metric']:>{column}}  95 % interval")
    lines += [f"  {file['file']:{width}}  {file['score']:>{column}.{digits}f}  {_span(file, digits)}" for file in files]
    if parts and len(files) > 1:
        lines += ["", f"  {'':{width}}  " + "  ".join(f"{file['file'][-column:]:>{column}}" for file in files)]
    for kind, name in parts:
        values = (file[kind].get(name, float("nan")) for file in files)
        lines.append(
            f"  {printable(name, ' '):{width}}  " + "  ".join(f"{value:>{column}.{digits}f}" for value in values)
        )
    for gap in summary["comparison"]:
        text = f"  {gap['file']} less {gap['less']}: {gap['value']:+.{digits}f}  {_span(gap, digits)}  p {gap['p']:.3g}"
        lines.append(text + ("" if gap["mcnemar"] is None else f"  McNemar p {gap['mcnemar']:.3g}"))
    for file in summary["files"]:
        if file["asked_as_published"] not in (None, data["rows"]):
            other = data["rows"] - file["asked_as_published"]
            lines.append(f"  note: {other} prompts of {file['file']} are not worded as published")
    return "\n".join(lines)


def _span(values: dict[str, Any], digits: int) -> str:
    return f"[{values['low']:.{digits}f}, {values['high']:.{digits}f}]"
