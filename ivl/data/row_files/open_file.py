"""Opening of files of rows by their suffix, and of objects in stores by their local copies."""

from __future__ import annotations

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


def _open_local(path: Path, cache_dir: str | Path | None, limits: FileLimits | None) -> RowFile | TableFile:
    if ".tar" in path.suffixes:
        raise UserError(
            f"{path}: a tar file (webdataset) has no random access, which shuffling, packing and exact resume need; "
            f'convert it once: pip install datasets; python -c "from datasets import load_dataset; load_dataset('
            f"'webdataset', data_files='{path}', split='train').to_parquet('{path.stem}.parquet')\"; then give that, "
            "with its columns, such as {images: jpg, response: txt}"
        )
    return TableFile(path, cache_dir, limits) if path.suffix in SUFFIXES else RowFile(path, cache_dir, limits)
