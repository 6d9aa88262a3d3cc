"""The store of features: what is put is found, what is not whole is not, and the limit holds."""

import os
import time

import pytest
import torch

from ivl.data.media.feature_store import FeatureStore, key_of


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path, "model", 10_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_is_found_bit_for_bit(store, dtype):
    features = torch.randn(2, 4, 8).to(dtype)
    assert store.get("ab", 2) is None
    assert store.put("ab", features) and store.put("ab", features)
    found = store.get("ab", 2)
    assert found.dtype == dtype and torch.equal(found, features)
    assert FeatureStore(store.folder, "other", 10_000).get("ab", 2) is None


def test_a_view_of_a_larger_tensor_is_stored_alone(store):
    whole = torch.randn(100, 4, 8)
    store.put("ab", whole[3:5])
    assert torch.equal(store.get("ab", 2), whole[3:5])
    assert store.path("ab").stat().st_size < 600


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "tiles"])
def test_what_is_damaged_is_missing_and_made_again(store, damage):
    features = torch.randn(2, 4, 8)
    store.put("ab", features)
    path = store.path("ab")
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[-5] ^= 1
    path.write_bytes({"cut": data[:-40], "empty": b""}.get(damage, data))
    assert store.get("ab", 3 if damage == "tiles" else 2) is None
    assert not path.exists()
    assert store.put("ab", features) and torch.equal(store.get("ab", 2), features)


def test_nothing_is_left_where_writing_fails(store, monkeypatch):
    monkeypatch.setattr(
        "ivl.data.media.feature_store.save_file", lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    )
    assert not store.put("ab", torch.zeros(1, 4, 8))
    assert not [path for path in store.folder.rglob("*") if path.is_file()]


def test_the_limit_holds_and_what_is_there_stays(store):
    kept = [store.put(f"{n:02x}", torch.full((1, 16, 16), float(n))) for n in range(20)]  # 1 kB each, and a header
    assert kept == sorted(kept, reverse=True) and 5 < sum(kept) < 10
    assert sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file()) <= 10_000
    assert store.get("00", 1) is not None


def test_a_second_process_sees_what_the_first_used(store):
    for n in range(20):
        store.put(f"{n:02x}", torch.zeros(1, 16, 16))
    assert not FeatureStore(store.folder, "model", 10_000).put("ff", torch.zeros(1, 16, 16))


def test_features_of_other_models_make_room_oldest_first(store):
    old = FeatureStore(store.folder, "old", 10_000)
    for n in range(6):
        old.put(f"{n:02x}", torch.zeros(1, 16, 16))
        os.utime(old.path(f"{n:02x}"), (n, n))
    assert all(store.put(f"{n:02x}", torch.zeros(1, 16, 16)) for n in range(5))
    there = [n for n in range(6) if old.path(f"{n:02x}").exists()]
    assert 0 < len(there) < 6 and there == list(range(6 - len(there), 6))


def test_keys_tell_bytes_and_settings_apart():
    assert len({key_of(b"a", (1,)), key_of(b"b", (1,)), key_of(b"a", (2,))}) == 3
    assert key_of(b"a", (1,)) == key_of(b"a", (1,))


# -- keys of files -----------------------------------------------------------------------------------------------------


class Reading:
    """Reads a file, and counts how often."""

    def __init__(self, path):
        self.path, self.count = path, 0

    def __call__(self):
        self.count += 1
        return self.path.read_bytes()


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr("ivl.data.media.feature_store.SETTLED", -1e9)


def test_a_file_is_read_once_for_all_processes_and_models(store, tmp_path, settled):
    path = tmp_path / "a.png"
    path.write_bytes(b"picture")
    read = Reading(path)
    assert store.key(path, read, (1,)) == key_of(b"picture", (1,)) == store.key(path, read, (1,))
    assert FeatureStore(store.folder, "other", 10).key(path, read, (1,)) == key_of(b"picture", (1,))
    assert read.count == 1
    assert store.key(path, read, (2,)) == key_of(b"picture", (2,)) and read.count == 2
    assert store.key(None, read, (1,)) == key_of(b"picture", (1,)) and read.count == 3
    assert store.key(tmp_path / "gone", lambda: None, (1,)) is None


@pytest.mark.parametrize("way", ["written over", "moved over"])
def test_a_file_that_changed_is_read_again_even_with_its_size_and_time_kept(store, tmp_path, settled, way):
    path = tmp_path / "a.png"
    path.write_bytes(b"picture")
    read, before = Reading(path), os.stat(path)
    store.key(path, read, ())
    time.sleep(0.05)  # more than a tick of the file system's clock
    new = path if way == "written over" else tmp_path / "b.png"
    new.write_bytes(b"another")
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns and os.stat(path).st_size == before.st_size
    assert store.key(path, read, ()) == key_of(b"another", ()) and read.count == 2


def test_a_file_that_may_still_change_is_not_remembered(store, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"picture")
    read = Reading(path)
    for count in (1, 2):
        assert store.key(path, read, ()) == key_of(b"picture", ()) and read.count == count
    monkeypatch.setattr("ivl.data.media.feature_store.SETTLED", -1e9)

    def changing():
        path.write_bytes(b"picture, and more")
        return b"picture"

    store.key(path, changing, ())
    path.write_bytes(b"picture")
    assert store.key(path, read, ()) == key_of(b"picture", ())
    assert read.count == 3


def test_where_there_are_no_links_files_are_read(store, tmp_path, settled, monkeypatch):
    def refuse(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "symlink", refuse)
    path = tmp_path / "a.png"
    path.write_bytes(b"picture")
    read = Reading(path)
    assert store.key(path, read, ()) == store.key(path, read, ()) and read.count == 2
