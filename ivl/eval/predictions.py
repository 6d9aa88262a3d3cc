"""Reader of answer files, of this program or another tool, with checks.

One JSON object a line (or a JSON list of them): `id`, `response`, and the ground truth: `reference` or `answers`, and
what a benchmark's rule asks for besides (`options`, `category`, `group`, `box`, `size`). `index` and `of`, where given,
are a row's place and the number of rows of the run; the fields of `RUN` say how the answers were made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivl.eval.benchmarks.tasks import Task
from ivl.reasoning import split_reasoning, without_reasoning
from ivl.types import TRUTH, UserError, first_few

Row = dict[str, Any]
RUN = ("model", "max_tiles", "frames", "decoding")
"""Settings of the run that made the answers: the same in all rows of a file."""
NAME = "predictions.jsonl"
"""File that predict writes in the folder of a run."""
_TRUTH = (*TRUTH, "images", "videos")


def file_of(path: Path) -> Path:
    """Return the file of answers: of a run's folder, the one that predict wrote there. Raises UserError."""
    if not path.is_dir():
        return path
    if not (path / NAME).is_file():
        raise UserError(f"{path}: no {NAME}; expected a file of answers, or a folder that predict wrote one in")
    return path / NAME


def read(
    path: Path, names: Mapping[str, str] | None = None, fill: Callable[[Row, Path], None] | None = None
) -> list[Row]:
    """Read the rows of a file, each with `where` (file:row), `id` as text, and the answer's thought as `reasoning`.

    `names`: field of this program → field of another tool; `fill` does so for names that are known.
    Raises UserError, naming the rows, for a file that was cut off, for rows that come twice, lack an answer, or were
    made by different models or settings.
    """
    rows = _read_records(path)
    for row in rows:
        if row.get("error") is not None and row.get("response") is None:
            raise UserError(f"{row['where']}: was not answered ({row['error']}); mend it and predict again")
        row.update({field: row.get(foreign) for field, foreign in (names or {}).items()})
        if fill is not None:
            fill(row, path.parent)
        if not isinstance(row.get("response"), str):
            kind = "none" if row.get("response") is None else type(row["response"]).__name__
            raise UserError(
                f"{row['where']}: response: expected a text, found {kind}; is it called otherwise? "
                f"--field response=NAME; the row has {', '.join(sorted(set(row) - {'where', 'asked_at', 'line'}))}"
            )
        # What a model thinks before it answers is not judged.
        reasoning, row["response"] = split_reasoning(row["response"])
        row["reasoning"] = reasoning or row.get("reasoning")
        if isinstance(row.get("reference"), str):
            row["reference"] = without_reasoning(row["reference"])
        row["id"] = str(next(row[k] for k in ("id", "asked_at", "index", "line") if row.get(k) is not None))
    if not rows:
        raise UserError(f"{path}: no rows; expected one answer a line")
    _check_unique_ids(path, rows)
    _check_complete(path, rows)
    _check_one_run(rows)
    return rows


def _read_records(path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected answers, one JSON object a line")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected answers in UTF-8") from error
    if text.lstrip().startswith("["):
        try:
            items = list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise UserError(f"{path}: the JSON list is cut off or broken ({error})") from error
    else:
        items = [(n, _object(path, n, line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for n, item in items:
        if not isinstance(item, dict):
            raise UserError(f"{path}:{n}: expected a JSON object, found {type(item).__name__}")
    return [{**item, "asked_at": item.get("where"), "line": n, "where": f"{path.name}:{n}"} for n, item in items]


def _object(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{path}:{number}: not valid JSON ({error}), the row begins {line[:50]!r}; if the file was cut off, "
            "predict again"
        ) from error


def _check_unique_ids(path: Path, rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        lines.setdefault((str(row.get("source") or ""), row["id"]), []).append(str(row["line"]))
    twice = [f"{name} (rows {', '.join(numbers)})" for (_, name), numbers in lines.items() if len(numbers) > 1]
    if twice:
        raise UserError(f"{path}: {len(twice)} ids come more than once: {first_few(twice)}; keep one answer for each")


def _check_complete(path: Path, rows: Sequence[Row]) -> None:
    wanted = {row["of"] for row in rows if row.get("of") is not None}
    if len(wanted) > 1:
        raise UserError(f"{path}: rows of runs of {first_few([str(n) for n in sorted(wanted)])} rows are mixed")
    missing = [str(n) for n in sorted(set(range(*wanted)) - {row.get("index") for row in rows})] if wanted else []
    if missing:
        raise UserError(
            f"{path}: {len(rows)} rows of a run of {wanted.pop()}; missing are rows {first_few(missing)} "
            "(counted from 0); predict again"
        )


def _check_one_run(rows: Sequence[Row]) -> None:
    first = rows[0]
    for row in rows:
        for key in RUN:
            if row.get(key) != first.get(key):
                raise UserError(
                    f"{row['where']}: {key} is {row.get(key)!r} but {first.get(key)!r} in {first['where']}; "
                    "expected the answers of one run"
                )


def join(path: Path, rows: list[Row], truth: Path, task: Task | None, partial: bool = False) -> list[Row]:
    """Join the ground truth by id from a file of data rows, or from the folder of the benchmark's official files.

    `task`: None for rows of the user's own. `partial`: answers to some of the questions only are enough. Raises
    UserError naming rows that one side lacks.
    """
    if task is None and truth.is_dir():
        raise UserError(f"--rows {truth}: expected a file of rows; a folder of official files takes --task")
    records = task.rows(truth) if task is not None and truth.is_dir() else _read_records(truth)
    known = {str(row.get("id", row.get("line"))): row for row in records}
    unknown = [row["id"] for row in rows if row["id"] not in known]
    if unknown:
        raise UserError(f"{path}: {len(unknown)} answers to no question of {truth}: {first_few(unknown)}")
    answered = {row["id"] for row in rows}
    missing = [name for name in known if name not in answered]
    if missing and not partial:
        raise UserError(
            f"{path}: {len(missing)} of {len(known)} questions of {truth} have no answer: {first_few(missing)}; "
            "predict again, or --partial to score those there are"
        )
    return [_with_truth(row, known[row["id"]]) for row in rows]


def _with_truth(row: Row, known: Row) -> Row:
    truth = {key: known[key] for key in _TRUTH if known.get(key) is not None}
    gold = known.get("response") or known.get("reference") or _last_answer(known)
    gold = without_reasoning(gold) if isinstance(gold, str) else gold
    return row | truth | ({} if gold is None else {"reference": gold})


def _last_answer(row: Row) -> Any:
    """Last answer of a row of `messages`; None for other rows."""
    answers = [m for m in row.get("messages") or [] if isinstance(m, dict) and m.get("role") == "assistant"]
    return answers[-1].get("content") if answers else None


def align(first: Sequence[Row], path: Path, rows: Sequence[Row]) -> list[Row]:
    """Sort `rows` into the order of `first`. Raises UserError naming the questions that only one file answers."""
    place = {row["id"]: row for row in rows}
    unmatched = sorted({row["id"] for row in first} ^ set(place))
    if unmatched:
        raise UserError(
            f"{path}: not the same questions as the first file; only one of them has {first_few(unmatched)}; "
            "comparing takes the same questions"
        )
    return [place[row["id"]] for row in first]
