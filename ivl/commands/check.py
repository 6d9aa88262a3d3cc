"""Check of data before a run: problems, lengths, duplicates (`python -m ivl check`)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import yaml
from jsonargparse import ArgumentParser

from ivl.commands.rendered import rendered
from ivl.data.index.index import Index, answers_needed, concat, progress_bar, reasons
from ivl.data.index.index_build import build_index
from ivl.data.learnt_turns import check_pairs
from ivl.data.processor import Processor
from ivl.data.sets.dataset import Mixture, MixtureSource
from ivl.data.sets.sources import open_sources
from ivl.options import CheckOptions, DataOptions
from ivl.run import Run
from ivl.storage.files import atomic_path
from ivl.types import UserError, plural, printable

SPLITS = ("train", "val", "test", "predict")
_SHOWN, _DRAWN = 10, 12


@dataclass
class OptionRows:
    """Rows of one option, with their index."""

    name: str
    rows: Mixture
    index: Index

    def where(self, number: int) -> str:
        return self.rows.where(number)

    @property
    def usable(self) -> np.ndarray:
        """Rows that can be trained on, (rows,) bool."""
        return self.index.records["usable"]


def main(options: CheckOptions) -> int:
    """Check data. Returns 0, or 2 where anything is wrong."""
    options, data = read_options(options)
    processor = _processor(options, data)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    sources = {name: files for name in SPLITS if (files := getattr(data, name))}
    if data.mixture:
        if "train" in sources:
            raise UserError("--data.train and --data.mixture: expected one of them, found both")
        sources = {"train": data.mixture} | sources
    if not sources:
        raise UserError("nothing to check; give --data.train FILE (val, test, predict), --config FILE or --run RUN")
    option_rows, errors = [], []
    for name, files in sources.items():
        parts, problems = _parts(name, files, processor, data, options.cache_dir)
        errors += problems
        if parts:
            option_rows.append(_index_rows(name, parts, options))
    with atomic_path(out / "report.txt") as path, open(path, "w", encoding="utf-8") as report:
        for problem in errors:
            _emit(problem, report)
        for one in option_rows:
            _report_rows(one, options.show, report)
        overlap = _report_overlap(option_rows, options.show, report)
    wrong = len(errors) + overlap + sum(len(one.index.problems) for one in option_rows)
    good = [one for one in option_rows if one.usable.any()]
    if good:
        _draw_examples(good[0], processor, out / "sheet.png", data.seed)
    print(f"\n{wrong or 'no'} problem{'s' * (wrong != 1)}; all of it is in {out / 'report.txt'}")
    return 2 if wrong else 0


# Options


def read_options(options: CheckOptions) -> tuple[CheckOptions, DataOptions]:
    """Return options with what the run and the configs say of model and objective, and the options of data.

    A later config counts more than one before it, and what is typed more than all.
    """
    sections = [_sections(Run.named(options.run, "--run").config, f"--run {options.run}")] if options.run else []
    sections += [_sections(_config(path), f"--config {path}") for path in options.config]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataOptions, "data")
    start = parser.get_defaults()
    for section in sections:
        start = parser.merge_config(parser.parse_object({"data": section.data}, defaults=False), start)
    pretrained = [name for name in (*(section.pretrained for section in sections), options.pretrained) if name]
    options = replace(
        options,
        pretrained=pretrained[-1] if pretrained else "",
        pairs=options.pairs or any(section.pairs for section in sections),
    )
    return options, parser.instantiate(parser.parse_args(options.data, namespace=start)).data


@dataclass(frozen=True)
class Sections:
    """Sections of a fit's config that describe the data."""

    data: dict[str, Any]
    pretrained: str | None
    pairs: bool


def _config(path: str) -> dict[str, Any]:
    """Return the content of a config."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"--config {path}: expected a fit's config, found {type(config).__name__}")
    return config


def _sections(config: dict[str, Any], where: str) -> Sections:
    """Return what a config says of the data. Writes the demo where the config asks for it."""
    model, data = config.get("model") or {}, config.get("data") or {}
    options = [one.name for one in fields(DataOptions)]
    if unknown := sorted(set(data) - {*options, "pretrained"}):
        raise UserError(f"{where}: data.{unknown[0]}: no such option; expected one of {', '.join(options)}")
    if config.get("demo"):
        from ivl.demo import prepare

        prepare(Path(config["demo"]))
    return Sections(
        {key: value for key, value in data.items() if key in options},
        model.get("pretrained") or data.get("pretrained"),
        model.get("objective", "sft") != "sft",
    )


def _processor(options: CheckOptions, data: DataOptions) -> Processor:
    if not options.pretrained:
        raise UserError("--model.pretrained: not given; expected a checkpoint's folder or name, such as internvl2-2b")
    processor = Processor.load(options.pretrained, data)
    processor.pairs = options.pairs
    if options.pairs:
        check_pairs(data.learn)
    return processor


# Reading


def _parts(
    name: str, files: Any, processor: Processor, data: DataOptions, cache_dir: str | None
) -> tuple[list[MixtureSource], list[str]]:
    """Sources of an option, and the errors of those that cannot be read at all."""
    parts, errors = [], []
    for source in [files] if isinstance(files, str) else files:
        try:
            parts += open_sources(
                source,
                processor,
                data.media_root,
                as_prompt=name == "predict",
                seed=data.seed,
                cache_dir=cache_dir,
                limits=data.file_limits,
                columns=data.columns,
            )
        except UserError as error:
            errors.append(f"data.{name}: {error}")
    return parts, errors


def _index_rows(name: str, parts: list[MixtureSource], options: CheckOptions) -> OptionRows:
    indexes = []
    for part in parts:
        with progress_bar(f"{name}: lengths of {part.name}", part.rows) as progress:
            media: Literal["header", "decode"] = "decode" if options.media else "header"
            index = build_index(part.rows, options.workers, media, options.probe_urls, options.cache_dir, progress)
        indexes.append(index if name == "predict" else answers_needed(part.rows, index))
    return OptionRows(name, Mixture(parts), concat(indexes))


# The report


def _print(text: str) -> None:
    print(printable(text))


def _emit(text: str, report: TextIO) -> None:
    """Print a text and write it to the report."""
    _print(text)
    report.write(printable(text) + "\n")


def _report_rows(one: OptionRows, show: int, report: TextIO) -> None:
    problems, dropped, count = one.index.problems, one.index.dropped, len(one.index)
    _emit(
        f"\n# data.{one.name}: {plural(count, 'row')}, {len(problems)} with a problem, {len(dropped)} left out", report
    )
    if len(one.rows.parts) > 1 or any(n != len(part.rows) for n, part in zip(one.rows.counts, one.rows.parts)):
        _emit(one.rows.describe(), report)
    for title, texts in (("problems", problems), ("left out, as on_too_long is drop", dropped)):
        if not texts:
            continue
        _emit(f"\n{title}:", report)
        lines = [text.replace("\n", " ") for _, text in sorted(texts.items())]
        _print("\n".join(lines[:show]))
        report.write("\n".join(lines) + "\n")
        if len(lines) > show:
            _print(f"… and {len(lines) - show} more in the report")
            for reason, times in reasons(texts.values()).most_common(show):
                _emit(f"{times:8} {reason}", report)
    if changed := one.index.describe_changes():
        _emit(f"\nrows that max_length changes: {changed} (of {count})", report)
    if unread_keys := one.index.unread_keys():
        _emit("\nkeys that are not read:", report)
        lines = [f"{count:8} {printable(name, ' ')} ({one.where(row)})" for name, count, row in unread_keys]
        _print("\n".join(lines[:show]) + (f"\n… and {len(lines) - show} more in the report" if lines[show:] else ""))
        report.write("\n".join(lines) + "\n")
    turned, plain = (one.index.records[name] for name in ("turned", "plain"))
    lists = [[one.where(int(n)) for n in np.flatnonzero(flags)] for flags in (turned, plain)]
    _list("rows whose boxes turn with their pictures, as EXIF says", lists[0], report)
    _list(f"rows with pictures or frames of one colour ({plain.sum(dtype=int)} of them)", lists[1], report)
    if unsure := int((~one.index.records["exact"] & one.usable).sum()):
        _emit(
            f"\nrows with media behind URLs, counted with the most tiles there can be: {unsure} (--probe_urls)", report
        )
    _report_weights(one, report)
    if one.usable.any():
        _emit("\n" + distributions(one.index), report)
        if np.ptp(one.index.tokens[one.usable]):  # else no row is longer than another
            longest = np.argsort(-one.index.tokens, kind="stable")[: min(5, int(one.usable.sum()))]
            lengths = [f"{_lengths(one.index, int(n)):>24}  {one.where(int(n))}" for n in longest]
            _emit("\nlongest rows:\n" + "\n".join(lengths), report)
    _report_duplicates(one, report)


def _report_weights(one: OptionRows, report: TextIO) -> None:
    """Report weights in the loss, where one of a row or a source is not 1."""
    usable, of_rows = one.usable, one.index.records["weight"]
    of_sources = np.concatenate([np.full(len(part.rows), part.rows.loss_weight) for part in one.rows.parts])
    weights = (of_rows * of_sources)[usable]
    if not len(weights) or (weights == 1).all():
        return
    tokens = one.index.supervised[usable]
    share = float((weights * tokens)[weights != 1].sum() / (weights * tokens).sum())
    _emit(
        f"\nrows whose weight in the loss is not 1: {int((weights != 1).sum())}, from {weights.min():g} to "
        f"{weights.max():g}; they are {share:.1%} of the loss of an epoch in which each row is seen once",
        report,
    )


def _list(title: str, lines: list[str], report: TextIO) -> None:
    """Print rows of one kind: their count and the first of them; the report gets all."""
    if lines:
        _emit(f"\n{title}: {len(lines)}", report)
        _print("\n".join(lines[:_SHOWN]) + ("\n…" if len(lines) > _SHOWN else ""))
        report.write("\n".join(lines) + "\n")


def _lengths(index: Index, number: int) -> str:
    return f"{index.tokens[number]} tokens, {plural(int(index.tiles[number]), 'tile')}"


def distributions(index: Index) -> str:
    """Table of least, median, 99th percentile, most and sum over the usable rows."""
    usable = index.records["usable"]
    titles = {"media": "images and videos"}
    lines = [f"{'':20}{'least':>9}{'median':>9}{'99 %':>9}{'most':>9}{'all':>14}"]
    for name in ("tokens", "tiles", "turns", "media", "boxes"):
        values = index.records[name][usable]
        points = np.percentile(values, [0, 50, 99, 100], method="nearest")
        total = int(values.sum(dtype=np.int64))
        lines.append(f"{titles.get(name, name):20}" + "".join(f"{int(v):9}" for v in points) + f"{total:14}")
    share = 100 * index.supervised[usable] / index.tokens[usable]
    total_share = 100 * index.supervised[usable].sum(dtype=np.int64) / index.tokens[usable].sum(dtype=np.int64)
    points = np.percentile(share, [0, 50, 99, 100], method="nearest")
    return "\n".join([*lines, f"{'trained on, %':20}" + "".join(f"{v:9.1f}" for v in points) + f"{total_share:14.1f}"])


def _report_duplicates(one: OptionRows, report: TextIO) -> None:
    """List duplicates: rows with the media and text of an earlier one."""
    usable = np.flatnonzero(one.usable)
    _, first, back = np.unique(one.index.records["same"][usable], return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[back] != np.arange(len(usable)))
    lines = [f"{one.where(usable[n])}: as {one.where(usable[first[back[n]]])}" for n in repeats]
    _list("rows that repeat an earlier one (same media, same text)", lines, report)


def _report_overlap(option_rows: list[OptionRows], show: int, report: TextIO) -> int:
    """Report rows of val or test that are trained on as well, as problems. Returns their count."""
    train = next((one for one in option_rows if one.name == "train"), None)
    count = 0
    for one in option_rows if train else ():
        if train is None or one.name not in ("val", "test"):
            continue
        trained = np.flatnonzero(train.usable)
        texts, first = np.unique(train.index.records["same"][trained], return_index=True)
        held = np.flatnonzero(np.isin(one.index.records["same"], texts) & one.usable)
        if not len(held):
            continue
        _emit(f"\nrows of data.{one.name} that are in data.train as well: {len(held)}", report)
        same = trained[first[np.searchsorted(texts, one.index.records["same"][held])]]
        lines = [
            f"{one.where(int(n))}: trained on as {train.where(int(row))}; take it out of one of them"
            for n, row in zip(held, same)
        ]
        _print("\n".join(lines[:show]) + (f"\n… and {len(lines) - show} more in the report" if lines[show:] else ""))
        report.write("\n".join(lines) + "\n")
        count += len(held)
    return count


# Pictures


def _draw_examples(one: OptionRows, processor: Processor, sheet: Path, seed: int) -> None:
    """Print one row as it is trained on, and draw a contact sheet of some rows."""
    from ivl.commands.contact_sheet import cell
    from ivl.lit.callbacks.images import grid

    candidates = np.flatnonzero(one.usable & one.index.records["exact"])  # nothing is fetched to be shown
    drawn = np.sort(np.random.default_rng(seed).permutation(candidates)[:_DRAWN])
    shown = next((n for n in drawn if one.index.records["boxes"][n]), drawn[0]) if len(drawn) else None
    cells = []
    for number in drawn:
        rows, inner = one.rows.at(int(number))
        try:
            conversation = rows.conversation(inner)
            if number == shown:
                example = processor(conversation, max_tiles=rows.max_tiles)
                print(f"\nas it is trained on: {rows.where(inner)}\n{rendered(example, processor)}")
                if example.rejected is not None:
                    print(f"\nits rejected answer:\n{rendered(example.rejected, processor)}")
            about = f"{Path(rows.where(inner)).name}  {_lengths(one.index, int(number))}"
            cells.append(cell(conversation, about, processor, rows.max_tiles))
        except UserError as error:  # a fault that only decoding shows; --media counts it as a problem
            print(f"\nnot shown: {error}")
    if cells:
        with atomic_path(sheet) as path:
            grid(cells).save(path, "PNG")
        print(f"\ncontact sheet of {plural(len(cells), 'row')}: {sheet}")
