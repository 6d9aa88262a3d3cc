"""Pairs of a right and a wrong answer from a model's own answers (`python -m ivl pairs ANSWERS.jsonl --rows ROWS`).

    predict with --model.generation.num_answers 8 and a temperature  →  pairs  →  fit with an objective of preferences

The offline half of what InternVL's own releases do: several answers a question, scored by a rule, right against wrong.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ivl.data.media.source import is_url
from ivl.data.row_files.row_file import RowFile
from ivl.data.rows.formats import parse
from ivl.options import PairRule, PairsOptions
from ivl.reasoning import CLOSING, OPENING
from ivl.storage.files import atomic_file
from ivl.types import Conversation, Media, UserError, printable

Row = dict[str, Any]


def main(options: PairsOptions) -> int:
    """Write the pairs. Returns 0. Raises UserError for a user's mistake."""
    out = options.out
    if out.exists():
        raise UserError(f"{out}: exists already; name another file with --out or remove it")
    counts: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        for pair in pairs(options.answers, options.rows, options, out.parent, counts):
            file.write(json.dumps(pair, ensure_ascii=False).encode() + b"\n")
        if not counts["pairs"]:
            raise UserError(f"{options.answers}: no row has a right and a wrong answer\n{_summary(counts)}")
    print(_summary(counts))
    print(f"\n{out}\n\nNext:\n  python -m ivl fit --config CONFIG --config tune/mpo --data.train {out}")
    return 0


def pairs(
    answers: Path, rows: Sequence[Path], rule: PairRule, folder: Path, counts: Counter[str] | None = None
) -> Iterator[Row]:
    """Yield rows with `rejected_response`, for each answered row that has a right and a wrong answer.

    Args:
        answers: lines of `predict` with `responses`; `index` is the row's number over all files of `rows`.
        folder: where the pairs will be written: relative paths of media are made to start there.
        counts: is filled with rows, answers, right, wrong, cut (ended by the limit of length, never taken) and pairs.

    Raises UserError where the answers are not those of the rows, or a row has one answer alone or no reference.
    """
    from ivl.lit.metrics import score

    counts = Counter() if counts is None else counts
    files = [RowFile(path) for path in rows]
    first = [sum(len(file) for file in files[:n]) for n in range(len(files) + 1)]
    lines = RowFile(answers)
    for n in range(len(lines)):
        line, where = lines[n], lines.where(n)
        if line.get("error") is not None:
            counts["not answered"] += 1
            continue
        index = line.get("index")
        if not isinstance(index, int) or not 0 <= index < first[-1]:
            raise UserError(
                f"{where}: index: expected a number below {first[-1]}, found {index!r}; are these its rows?"
            )
        file = max(k for k in range(len(files)) if first[k] <= index)
        row, place = files[file][index - first[file]], files[file].where(index - first[file])
        conversation = _parsed(row, files[file].folder, place, line, where)
        scored: dict[str, float] = {}
        for text in _texts(line, where, counts):
            values = score(conversation, text, [rule.metric])
            if rule.metric not in values:
                raise UserError(f"{place}: {rule.metric} does not apply to its reference; choose another --metric")
            scored[text] = values[rule.metric]
            counts["answers"] += 1
        counts["rows"] += 1
        counts["right"] += sum(value >= rule.right for value in scored.values())
        counts["wrong"] += sum(value <= rule.wrong for value in scored.values())
        for right, wrong in _right_and_wrong(scored, str(conversation.reference), rule, index):
            counts["pairs"] += 1
            yield _pair(row, conversation, right, wrong, folder)


def _parsed(row: Any, root: str, place: str, line: Row, where: str) -> Conversation:
    """Prompt of a row with its reference. Raises UserError where there is none, or another one than was asked of."""
    conversation = parse(row, place, root).as_prompt()
    if conversation.reference is None:
        raise UserError(f"{place}: no reference to score answers by; expected a response")
    if line.get("reference") is not None and line["reference"] != conversation.reference:
        raise UserError(
            f"{where}: was asked of a row with the reference {line['reference']!r}, but {place} has "
            f"{conversation.reference!r}; give --rows the files that were answered, in their order"
        )
    return conversation


def _texts(line: Row, where: str, counts: Counter[str]) -> Iterator[str]:
    """Different answers of a row, with their thoughts; one that the limit of length cut off is left out."""
    responses = line.get("responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(
            f"{where}: one answer alone; expected several in responses: predict with "
            f"--model.generation.num_answers 8 --model.generation.temperature 1"
        )
    seen = set()
    for response in responses:
        if response.get("finish_reason") == "length":
            counts["cut"] += 1
            continue
        text, thought = response["response"], response.get("reasoning")
        text = f"{OPENING}\n{thought}\n{CLOSING}\n\n{text}" if thought else text
        if text.strip() and text not in seen:
            seen.add(text)
            yield text


def _right_and_wrong(scored: dict[str, float], reference: str, rule: PairRule, index: int) -> Iterator[tuple[str, str]]:
    """Pairs of a right and a wrong answer, each answer as seldom as can be."""
    right = [text for text, value in scored.items() if value >= rule.right]
    wrong = [text for text, value in scored.items() if value <= rule.wrong]
    if not right and rule.reference:
        right = [reference]
    rng = Random(f"{rule.seed} {index}")
    for texts in (right, wrong):
        rng.shuffle(texts)
    if right and wrong:
        most = min(rule.per_row, len(right) * len(wrong))
        turns = range(len(wrong))
        couples = dict.fromkeys((r, wrong[(n + turn) % len(wrong)]) for turn in turns for n, r in enumerate(right))
        yield from list(couples)[:most]


def _pair(row: Row, prompt: Conversation, right: str, wrong: str, folder: Path) -> Row:
    """Return a row of messages with two answers, its relative paths of media as seen from `folder`."""
    media: dict[str, list[Any]] = {"images": [], "videos": []}
    for medium in prompt.media:
        media[f"{medium.kind}s"].append(_written(medium, folder, prompt.where))
    messages = [{"role": message.role, "content": message.text} for message in prompt.messages]
    system = row.get("system", prompt.system)
    named = {"id": prompt.id, "source": prompt.source or None, "system": system}
    return {
        **{key: value for key, value in named.items() if value is not None},
        "messages": [*messages, {"role": "assistant", "content": right}],
        "rejected_response": wrong,
        **{key: values for key, values in media.items() if values},
    }


def _written(medium: Media, folder: Path, where: str) -> Any:
    source = medium.source
    if not isinstance(source, str):
        raise UserError(f"{where}: a picture's bytes cannot be written to a file of lines; give rows that name files")
    if not is_url(source) and source[:5] != "data:":
        source = Path(os.path.relpath(source, folder)).as_posix()
    times = {key: value for key, value in (("start", medium.start), ("end", medium.end)) if value is not None}
    return {"path": source, **times} if times else source


def _summary(counts: Counter[str]) -> str:
    answers = max(counts["answers"], 1)
    shares = f"{counts['right'] / answers:.1%} right, {counts['wrong'] / answers:.1%} wrong"
    lines = [f"{counts['rows']} rows, {counts['answers']} different answers: {shares}; {counts['pairs']} pairs"]
    if counts["cut"]:
        lines.append(f"{counts['cut']} answers were cut off by the limit of length and left out")
    if counts["not answered"]:
        lines.append(f"{counts['not answered']} rows have an error instead of an answer")
    return printable("\n".join(lines))
