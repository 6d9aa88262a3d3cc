"""Where what is worked out once is kept, and that it is kept whole."""

from pathlib import Path

import pytest

from ivl.data.cache import default_cache
from ivl.storage.files import atomic_file


def test_the_folder_follows_the_xdg_rules(monkeypatch, tmp_path):
    assert Path.home() not in default_cache().parents, "tests leave the user's own alone"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "ivl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "ivl"


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as out:
        out.write(b"one")
        out.flush()
        assert not path.exists()
    assert path.read_bytes() == b"one"

    def torn() -> None:
        with atomic_file(path) as out:
            out.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        torn()
    assert [f.read_bytes() for f in path.parent.iterdir()] == [b"one"]
