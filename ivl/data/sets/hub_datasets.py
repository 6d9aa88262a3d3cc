"""Data sets by name: fetched from Hugging Face or ModelScope, converted to rows, cached.

Names, repositories, prompts and the choice of answers are those of ms-swift's table of data sets, where it has them.
The listing of a repository gives its tables: ModelScope's `<name>.json` (subset → split → meta, file), or files named
after the split. No code of a repository is executed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, urlencode

import ivl
from ivl.data.cache import default_cache, writable
from ivl.data.media.download import fetch
from ivl.data.media.source import HEAD, kind_of
from ivl.data.row_files.row_file import load_rows
from ivl.hub import huggingface, modelscope
from ivl.options import FetchPolicy
from ivl.storage.files import file_digest
from ivl.storage.parquet import parquet_rows
from ivl.types import UserError

Row = dict[str, Any]
_PAGE = 200
_POLICY = FetchPolicy(total_timeout=24 * 3600.0, max_bytes=64 << 30)
_MOST_UNPACKED = 256 << 30
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


@dataclass(frozen=True)
class NamedSet:
    """Repository of a data set, and the conversion of its records to rows."""

    name: str
    hub: Literal["modelscope", "huggingface"]
    repo: str
    convert: Callable[[Row], Row] = field(repr=False)
    """Converts a record to a row of any format; `images` may hold paths inside `archives`, bytes, or URLs"""
    subset: str = ""
    splits: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    """Files of records; empty: chosen by subset and splits"""
    archives: tuple[str, ...] = ()
    """Zip files that hold the media"""


@dataclass(frozen=True)
class _File:
    path: str
    size: int | None
    sha256: str | None


def _coco(record: Row) -> Row:
    """Row with the first caption; validation records join several by `&&`."""
    caption = record["caption"].split("&&")[0]
    return {"query": "please describe the image.", "response": caption, "images": [record["image"]]}


def _latex(record: Row) -> Row:
    query = "Using LaTeX to perform OCR on the image."
    return {"query": query, "response": record["text"], "images": [record["image"]]}


def _sharegpt(record: Row) -> Row:
    return {key: record[key] for key in ("id", "conversations") if key in record} | {"image": [record["image"]]}


def _llava(record: Row) -> Row:
    return _sharegpt(record | {"image": f"http://images.cocodataset.org/train2017/{record['image']}"})


_COCO, _LATEX = "modelscope/coco_2014_caption", "linxy/LaTeX_OCR"
SETS: dict[str, NamedSet] = {
    row.name: row
    for row in (
        NamedSet("coco-en-2-mini", "modelscope", _COCO, _coco, "coco_2014_caption", ("validation",)),
        NamedSet("coco-en-2", "modelscope", _COCO, _coco, "coco_2014_caption", ("train", "validation")),
        NamedSet("latex-ocr-print", "huggingface", _LATEX, _latex, "full", ("validation", "test")),
        NamedSet(
            "latex-ocr-handwrite", "huggingface", _LATEX, _latex, "synthetic_handwrite", ("train", "validation", "test")
        ),
        NamedSet(
            "sharegpt-4o-image",
            "huggingface",
            "OpenGVLab/ShareGPT-4o",
            _sharegpt,
            tables=("image_conversations/gpt-4o.jsonl",),
            archives=("images.zip",),
        ),
        NamedSet(
            "llava-instruct-150k",
            "huggingface",
            "liuhaotian/LLaVA-Instruct-150K",
            _llava,
            tables=("llava_instruct_150k.json",),
        ),
    )
}


def find(name: str) -> NamedSet | None:
    """Entry of a name in SETS; None where it is not known."""
    return SETS.get(name)


def fetch_rows(name: str, cache_dir: str | Path | None = None, policy: FetchPolicy | None = None) -> Path:
    """File of rows (jsonl) of a data set, from the cache or made; media lie beside it, or behind URLs.

    Downloads stay where something failed, so that another try goes on. `policy`: limits; its cache is not used.
    HF_ENDPOINT and MODELSCOPE_DOMAIN name other servers. Raises UserError where the hub lacks a file of the entry in
    SETS, a file does not match its checksum, or a record cannot be converted.
    """
    from filelock import FileLock

    dataset = SETS[name]
    key = hashlib.blake2b(repr((ivl.__version__, dataset)).encode(), digest_size=6).hexdigest()
    folder = Path(cache_dir or default_cache()) / "named" / f"{name}-{key}"
    if os.path.isfile(folder / "rows.jsonl"):
        return folder / "rows.jsonl"
    folder = writable(folder)
    rows = folder / "rows.jsonl"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of several processes that start together one makes it
        if rows.is_file():
            return rows
        downloads = folder.with_suffix(".downloads")
        policy = replace(policy or _POLICY, cache_dir=str(downloads))
        endpoint = os.environ.get("HF_ENDPOINT" if dataset.hub == "huggingface" else "MODELSCOPE_DOMAIN")
        policy = replace(policy, allow_private=policy.allow_private or bool(endpoint))
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{name}.part"))
        try:
            _make(dataset, temporary, policy)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(downloads, ignore_errors=True)
    return rows


def _make(dataset: NamedSet, folder: Path, policy: FetchPolicy) -> None:
    listing = {file.path: file for file in _listing(dataset, policy)}
    tables, archives = _wanted(dataset, listing, policy)
    for name in archives:
        _unpack(_download(dataset, listing[name], policy), folder / "media", name)
    count = 0
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as out:
        for table in tables:
            path = _download(dataset, listing[table], policy)
            for n, record in enumerate(_records(path, table), start=1):
                where = f"{dataset.repo}: {table}:{n}"
                try:
                    row = dataset.convert(record)
                except (KeyError, TypeError, AttributeError) as error:
                    fields = sorted(record) if isinstance(record, dict) else type(record).__name__
                    raise UserError(
                        f"{where}: expected the field {error}, found {fields}; the set has changed"
                    ) from None
                key = "images" if "images" in row else "image"
                row[key] = [_stored(image, f"{count}", folder, where) for image in row[key]]
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    if not count:
        raise UserError(f"{dataset.repo}: no records in {', '.join(tables)}")


# The hub


def _base(dataset: NamedSet) -> str:
    if dataset.hub == "modelscope":
        return f"{modelscope.endpoint()}/api/v1/datasets/{dataset.repo}/repo"
    return (huggingface.custom_endpoint() or "https://huggingface.co").rstrip("/")


def _url(dataset: NamedSet, path: str) -> str:
    if dataset.hub == "modelscope":
        return f"{_base(dataset)}?{urlencode({'Revision': 'master', 'FilePath': path})}"
    return f"{_base(dataset)}/datasets/{dataset.repo}/resolve/main/{quote(path)}"


def _listing(dataset: NamedSet, policy: FetchPolicy) -> Iterator[_File]:
    if dataset.hub == "huggingface":
        for entry in _json_at(f"{_base(dataset)}/api/datasets/{dataset.repo}/tree/main?recursive=true", policy):
            if entry.get("type") == "file":
                yield _File(entry["path"], entry.get("size"), (entry.get("lfs") or {}).get("oid"))
        return
    page, count = 1, _PAGE
    while count == _PAGE:
        query = {"Revision": "master", "Recursive": "True", "Root": "/", "PageNumber": page, "PageSize": _PAGE}
        answer = _json_at(f"{_base(dataset)}/tree?{urlencode(query)}", policy)
        if answer.get("Code") != 200 or not isinstance(answer.get("Data"), dict):
            raise UserError(f"{dataset.repo}: modelscope does not list it ({answer.get('Message')})")
        files = answer["Data"].get("Files") or []
        for entry in files:
            if entry.get("Type") != "tree":
                yield _File(entry["Path"], entry.get("Size"), entry.get("Sha256") or None)
        page, count = page + 1, len(files)


def _json_at(url: str, policy: FetchPolicy) -> Any:
    path = fetch(url, policy)
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{url}: expected JSON, found something else; is this the hub's address?") from None
    finally:
        path.unlink()  # a listing may be another tomorrow


def _download(dataset: NamedSet, file: _File, policy: FetchPolicy) -> Path:
    def check(path: Path) -> None:
        if file.sha256 and file_digest(path, hashlib.sha256()) != file.sha256:
            raise UserError(f"{dataset.repo}: {file.path} does not match the hub's checksum; run again")

    size = "" if file.size is None else f" ({file.size / 1e6:,.1f} MB)"
    print(f"{dataset.name}: {file.path}{size} from {dataset.hub}", file=sys.stderr, flush=True)
    return fetch(_url(dataset, file.path), policy, check)


def _wanted(dataset: NamedSet, listing: dict[str, _File], policy: FetchPolicy) -> tuple[list[str], list[str]]:
    """Paths of the tables and archives of a data set."""
    tables, archives = list(dataset.tables), list(dataset.archives)
    listing_name = f"{dataset.repo.split('/')[1]}.json"
    if not tables and listing_name in listing:
        splits = json.loads(_download(dataset, listing[listing_name], policy).read_bytes()).get(dataset.subset, {})
        parts = [splits.get(split) or {} for split in dataset.splits]
        tables = [part["meta"] for part in parts if part.get("meta")]
        archives = [part["file"] for part in parts if part.get("file")]
    for split in dataset.splits if not tables else ():
        pattern = re.compile(rf"(?:.*/)?{split}(?:[-_./].*)?\.(?:parquet|jsonl|csv)")
        named = [path for path in sorted(listing) if pattern.fullmatch(path)]
        tables += [path for path in named if dataset.subset in PurePosixPath(path).parts] or named
    missing = [path for path in (*tables, *archives) if path not in listing] or ([] if tables else dataset.splits)
    if missing:
        raise UserError(
            f"{dataset.repo}: {dataset.hub} has no {', '.join(missing)}; it has {', '.join(sorted(listing)[:20])}. "
            f"Download the data set by hand and give its rows as a file"
        )
    return tables, archives


# Downloaded files


def _records(path: Path, name: str) -> Iterator[Row]:
    suffix = PurePosixPath(name).suffix
    if suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as opened:
            # in ModelScope's tables a column of files is called image:FILE
            yield from ({key.split(":")[0]: value for key, value in row.items()} for row in csv.DictReader(opened))
    elif suffix == ".parquet":
        yield from parquet_rows(path, name)
    else:
        yield from (record for _, record in load_rows(path))


def _unpack(path: Path, folder: Path, name: str) -> None:
    """Extract a zip file below `folder`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in members:
                parts = PurePosixPath(member.filename.replace("\\", "/")).parts
                if not parts or ".." in parts or parts[0].startswith("/") or ":" in parts[0]:
                    raise UserError(f"{name}: holds {member.filename!r}, a path outside of it; it is not unpacked")
            if sum(member.file_size for member in members) > _MOST_UNPACKED:
                raise UserError(f"{name}: unpacks to more than {_MOST_UNPACKED >> 30} GB; it is not unpacked")
            for member in members:
                archive.extract(member, folder)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{name}: cannot be unpacked ({error}); run again") from None


def _stored(image: Any, number: str, folder: Path, where: str) -> str:
    """Path of a picture for a row: bytes are written to a file, a name is looked up in the unpacked archives."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        path = folder / "media" / f"{number}{_SUFFIXES.get(kind_of(image[:HEAD]) or '', '.img')}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
        return f"media/{path.name}"
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return image
    if not isinstance(image, str) or ".." in PurePosixPath(image).parts:
        raise UserError(f"{where}: expected a picture or its path, found {str(image)[:80]!r}")
    picture = next((path for path in _places(folder / "media", image) if path.is_file()), None)
    if picture is None:
        raise UserError(f"{where}: its picture {image} is in none of the archives; the set has changed")
    return picture.relative_to(folder).as_posix()


def _places(media: Path, name: str) -> Iterator[Path]:
    """Candidate paths of a picture in an unpacked archive, also below folders that are alone at their level."""
    name = name.lstrip("/")
    yield media / name
    while media.is_dir():
        inside = list(media.iterdir())
        if len(inside) != 1 or not inside[0].is_dir():
            return
        media = inside[0]
        yield media / name
        yield media / PurePosixPath(name).name
