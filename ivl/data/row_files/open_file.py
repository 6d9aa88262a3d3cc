"""Opening of files of rows by their suffix, and of objects in stores by their local copies."""

from __future__ import annotations

import re
from pathlib import Path

from ivl.data.object_store import fetch_rows, is_object, parent_of
from ivl.data.row_files.row_file import RowFile
from ivl.data.row_files.table_file import SUFFIXES, TableFile
from ivl.options import FileLimits
from ivl.types import UserError


def open_file(
    place: str | Path, cache_dir: str | Path | None = None, limits: FileLimits | None = None
) -> RowFile | TableFile:
    """Open a file of rows by its suffix; of an object in a store its local copy, named by its address.

    Raises UserError where it is none.
    """
    if not isinstance(place, str) or not is_object(place):
        return _open_local(Path(place), cache_dir, limits)
    copy = fetch_rows(place, cache_dir)
    try:
        file = _open_local(copy, cache_dir, limits)
    except UserError as error:
        raise UserError(str(error).replace(str(copy), place)) from None
    file.name, file.folder = place, parent_of(place)
    return file


TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2|txz)$")
"""Ending of a tar file, which webdataset has"""


def tar_remedy(path: Path, files: str) -> str:
    """Message about a tar file, or a folder of them, with the command that converts it. `files`: path or pattern."""
    return (
        f"{path}: a tar file (webdataset) has no random access, which shuffling, packing and exact resume need; "
        f'convert it once: pip install datasets; python -c "from datasets import load_dataset; rows = load_dataset('
        f"'webdataset', data_files='{files}', split='train'); rows.add_column('query', ['Describe it.'] * len(rows))"
        f".to_parquet('{TAR.sub('', path.name)}.parquet')\"; then give that, with --data.columns "
        "'{images: jpg, response: txt}', or as its files are called (data_files='shards/*.tar' converts many at once)"
    )


def _open_local(path: Path, cache_dir: str | Path | None, limits: FileLimits | None) -> RowFile | TableFile:
    if TAR.search(path.name):
        raise UserError(tar_remedy(path, str(path)))
    return TableFile(path, cache_dir, limits) if path.suffix in SUFFIXES else RowFile(path, cache_dir, limits)
