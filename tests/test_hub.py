"""The hubs, over HTTP against a small local server: what is fetched, resumed, checked, refused, and left alone."""

import json
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from ivl import hub
from ivl.__main__ import main
from ivl.architecture.families import find_model
from ivl.finetune.adapter.adapter_config import AdapterConfig
from ivl.hub import huggingface, modelscope, resolve
from ivl.hub.files import UNFINISHED, missing_files
from ivl.types import UserError
from tests.hub_server import COMMIT, Hub, serve
from tests.tiny import config, write_checkpoint

REPO = "OpenGVLab/InternVL2-2B"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
CONFIG = json.dumps(config("LlamaForCausalLM", "300m", "internvl_zh", {"a": 1}, {}, {})).encode()
KEPT = {
    "config.json": CONFIG,
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS))}).encode(),
    SHARDS[0]: bytes(range(256)) * 400,
    SHARDS[1]: b"second" * 9000,
    "tokenizer.model": b"\x0a\x0b",
    "tokenizer_config.json": b"{}",
    "merges.txt": b"",
    "chat_template.jinja": b"{{ messages }}",
    "conversation.py": b"raise SystemExit('a checkpoint\\'s code was run')",
}
LEFT_OUT = {
    "README.md": b"# card",
    "training_args.bin": b"a pickle",
    "pytorch_model.bin": b"another",
    "examples/image1.jpg": b"\xff\xd8",
    "runs/config.json": b"{}",
}


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of both hubs, and no login of the machine's user."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(modelscope.time, "sleep", lambda _: None)
    return tmp_path


@pytest.fixture
def server(caches, monkeypatch):
    with serve(Hub(REPO, KEPT | LEFT_OUT)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.url)
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


BOTH = pytest.mark.parametrize("place", ["huggingface", "modelscope"])


def test_a_folder_is_taken_as_it_is(server, tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path), hub="modelscope", offline=True) == tmp_path
    assert server.log == []


def test_a_folder_wins_over_a_name(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "internvl2-2b").mkdir()
    assert resolve("internvl2-2b") == Path("internvl2-2b")


@BOTH
def test_what_is_needed_is_downloaded_and_no_more(server, place):
    folder = resolve("internvl2-2b", hub=place)
    assert contents(folder) == KEPT
    assert missing_files(folder) == []
    asked = {path.rpartition("/")[2].rpartition("FilePath=")[2] for m, path, _ in server.log if m == "GET"}
    assert not asked & set(LEFT_OUT)


FOLDER = "InternVL2-8B-Pretrain"


@BOTH
@pytest.mark.parametrize("name", [f"OpenGVLab/InternVL2-Pretrain-Models:{FOLDER}", "internvl2-8b-pretrain"])
def test_a_folder_of_a_repository_with_several_models(caches, monkeypatch, place, name):
    files = {f"{FOLDER}/{file}": content for file, content in KEPT.items()}
    others = {"config.json": b"{}", "InternVL2-1B-Pretrain/config.json": b"{}", f"{FOLDER}/examples/config.json": b"{}"}
    with serve(Hub("OpenGVLab/InternVL2-Pretrain-Models", files | others)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
        folder = resolve(name, hub=place)
        assert folder.name == FOLDER and contents(folder) == KEPT
        assert not [path for path in folder.parent.iterdir() if path.name not in (FOLDER, ".msc")]
        server.log.clear()
        assert resolve(name, hub=place) == resolve(name, hub=place, offline=True) == folder
        assert server.log == []


@pytest.mark.parametrize("name", ["a/b:../c", "a/b:c/d", "a/b:", "a/b:c:d", "b:c"])
def test_a_folder_of_a_repository_is_one_name(server, name):
    with pytest.raises(UserError, match="neither a folder nor a known model"):
        resolve(name)
    assert server.log == []


@BOTH
def test_the_second_time_nothing_is_asked(server, place):
    first = resolve(REPO, hub=place)
    server.log.clear()
    assert resolve("internvl2-2b", hub=place) == first
    assert resolve("internvl2-2b", hub=place, offline=True) == first
    assert server.log == []


@BOTH
def test_a_copy_of_either_hub_serves_both(server, place):
    folder = resolve("internvl2-2b", hub=place)
    server.log.clear()
    other = "modelscope" if place == "huggingface" else "huggingface"
    assert resolve("internvl2-2b", hub=other) == folder
    assert server.log == []


@BOTH
def test_a_copy_that_other_programs_left_is_used(server, caches, place):
    if place == "huggingface":
        repo = caches / "hf" / "models--OpenGVLab--InternVL2-2B"
        folder = repo / "snapshots" / COMMIT
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
    else:
        folder = caches / "ms" / "OpenGVLab" / "InternVL2-2B"  # where older versions of its package put models
    folder.mkdir(parents=True)
    for name, content in KEPT.items():
        (folder / name).write_bytes(content)
    assert resolve("internvl2-2b") == folder
    (folder / SHARDS[1]).unlink()
    assert resolve("internvl2-2b", hub="modelscope") != folder
    assert len(server.log) > 0


@BOTH
@pytest.mark.parametrize("how", ["name", "argument", "choice"])
def test_a_revision_is_asked_for(server, place, how, monkeypatch):
    monkeypatch.setattr(hub, "_settings", hub._HubSettings())
    revision = COMMIT if place == "huggingface" else "master"
    if how == "choice":
        hub.choose(revision=revision)
        assert hub.with_revision("internvl2-2b") == f"internvl2-2b@{revision}"
        assert hub.with_revision("internvl2-2b@v1") == "internvl2-2b@v1"
    name = f"internvl2-2b@{revision}" if how == "name" else "internvl2-2b"
    folder = resolve(name, hub=place, revision=revision if how == "argument" else None)
    assert contents(folder) == KEPT
    assert revision in folder.name and any(revision in path for _, path, _ in server.log)


@pytest.mark.parametrize("revision", ["../x", "a b", "", "x?y"])
def test_a_revision_that_is_none_is_refused(server, revision):
    if revision:
        with pytest.raises(UserError, match="revision: expected the name of a branch or a tag"):
            resolve(f"internvl2-2b@{revision}")
    assert server.log == []


def test_two_revisions_are_refused(monkeypatch):
    monkeypatch.setattr(hub._settings, "revision", "v2")
    with pytest.raises(UserError, match="internvl2-2b@v1: --revision is v2; expected one of them"):
        resolve("internvl2-2b@v1", offline=True)


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(UserError, match="is a folder here, which has no revision 'v1'"):
        resolve(tmp_path, revision="v1")


@BOTH
def test_a_cache_that_cannot_be_written(server, caches, place):
    """A file in the cache's place; a folder without permission is written by root all the same."""
    (caches / ("hf" if place == "huggingface" else "ms")).write_text("")
    with pytest.raises(
        UserError, match=r"cannot be downloaded to .*; name a folder .* by (HF_HUB_CACHE|MODELSCOPE_CACHE)"
    ):
        resolve("internvl2-2b", hub=place)


def test_an_endpoint_that_is_no_address(caches, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(UserError, match=r"HF_ENDPOINT: expected an address .* found 'hf-mirror.com'"):
        resolve("internvl2-2b")


@pytest.mark.parametrize("name", ["a/b c", "a/b?c", "a/../b", "--x/y", "a/b/c", "a/"])
def test_names_that_no_hub_has(server, name):
    with pytest.raises(UserError, match="neither a folder nor a known model"):
        resolve(name)
    assert server.log == []


def test_offline_is_honoured(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for place in ("huggingface", "modelscope"):
        with pytest.raises(UserError, match="offline"):
            resolve("internvl2-2b", hub=place)
    assert server.log == []
    resolve("internvl2-2b", hub="modelscope", offline=False)


def test_modelscope_goes_on_at_the_byte_where_it_broke_off(server):
    server.cuts = {SHARDS[0]: [50_000, 30_000]}
    folder = resolve("internvl2-2b", hub="modelscope")
    assert contents(folder) == KEPT
    assert [h.get("Range") for h in server.downloads(SHARDS[0])] == [None, "bytes=50000-", "bytes=80000-"]


def test_modelscope_starts_over_where_ranges_are_ignored(server):
    server.whole, server.cuts = True, {SHARDS[0]: [50_000, 30_000]}
    assert contents(resolve("internvl2-2b", hub="modelscope")) == KEPT
    assert [h.get("Range") for h in server.downloads(SHARDS[0])] == [None, "bytes=50000-", "bytes=30000-"]


def test_modelscope_goes_on_in_the_next_run(server, caches):
    server.cuts = {SHARDS[1]: [1000, *[0] * 9]}
    with pytest.raises(UserError, match="run again"):
        resolve("internvl2-2b", hub="modelscope")
    folder = caches / "ms" / "models" / "OpenGVLab" / "InternVL2-2B"
    assert (folder / UNFINISHED / SHARDS[1]).stat().st_size == 1000
    assert not (folder / SHARDS[1]).exists()
    with pytest.raises(UserError, match="offline"):  # not taken for a complete copy
        resolve("internvl2-2b", hub="modelscope", offline=True)
    server.cuts, server.log = {}, []
    assert contents(resolve("internvl2-2b", hub="modelscope")) == KEPT
    assert [h.get("Range") for h in server.downloads(SHARDS[1])] == ["bytes=1000-"]
    assert server.downloads(SHARDS[0]) == []
    assert not (folder / UNFINISHED).exists()


def test_hugging_face_goes_on_within_a_run(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    server.cuts = {SHARDS[0]: [50_000]}
    assert contents(resolve("internvl2-2b")) == KEPT
    assert [h.get("Range") for h in server.downloads(SHARDS[0])] == [None, "bytes=50000-"]


def test_hugging_face_goes_on_with_the_file_in_the_next_run(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    server.cuts = {SHARDS[1]: [1000, *[0] * 20]}
    with pytest.raises(UserError, match="run again"):
        resolve("internvl2-2b")
    with pytest.raises(UserError, match="offline"):
        resolve("internvl2-2b", offline=True)
    server.cuts, server.log = {}, []
    assert contents(resolve("internvl2-2b")) == KEPT
    assert server.downloads(SHARDS[0]) == []
    assert len(server.downloads(SHARDS[1])) == 1


@BOTH
@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_wrong_checksum_is_an_error_and_the_next_run_mends_it(server, place, name):
    server.sent = {name: KEPT[name][:-1] + b"?"}
    with pytest.raises(UserError, match=f"{name} does not match the hub's checksum: expected .*, found"):
        resolve("internvl2-2b", hub=place)
    with pytest.raises(UserError, match="offline"):
        resolve("internvl2-2b", hub=place, offline=True)
    server.sent = {}
    assert contents(resolve("internvl2-2b", hub=place)) == KEPT


def test_what_was_not_checked_is_not_taken(server, monkeypatch):
    """The process may end between the last byte and the check."""
    with monkeypatch.context() as killed:
        killed.setattr(huggingface, "_check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            resolve("internvl2-2b")
    with pytest.raises(UserError, match="offline"):
        resolve("internvl2-2b", offline=True)
    assert contents(resolve("internvl2-2b")) == KEPT


def test_a_file_of_the_user_s_is_not_overwritten(server, caches):
    mine = caches / "ms" / "models" / "OpenGVLab" / "InternVL2-2B" / "config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("my own")
    with pytest.raises(UserError, match=r"config\.json: exists and is not the hub's file"):
        resolve("internvl2-2b", hub="modelscope")
    assert mine.read_text() == "my own"


@BOTH
@pytest.mark.parametrize("name", ["OpenGVLab/InternVL2-3B", "internvl2-8b"])
def test_an_unknown_model_gets_the_document_s_answer(server, place, name):
    with pytest.raises(UserError) as error:
        resolve(name, hub=place)
    variable = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[place]
    for part in ("does not exist", "log in", "apply", "token", variable, "path of the local folder", "InternVL2"):
        assert part in str(error.value)


def test_a_gated_model_gets_it_too(server):
    server.gated = True
    with pytest.raises(UserError, match=r"GatedRepoError.*apply"):
        resolve("internvl2-2b")


@BOTH
def test_a_token_opens_it(server, place, monkeypatch):
    server.token = "secret"
    with pytest.raises(UserError, match="apply"):
        resolve("internvl2-2b", hub=place)
    with pytest.raises(UserError, match="apply"):
        resolve("internvl2-2b", hub=place, token="wrong")
    assert contents(resolve("internvl2-2b", hub=place, token="secret")) == KEPT


@BOTH
def test_a_token_of_the_environment_opens_it(server, place, monkeypatch):
    server.token = "secret"
    monkeypatch.setenv({"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[place], "secret")
    assert contents(resolve("internvl2-2b", hub=place)) == KEPT


def test_the_login_is_not_shown_to_the_storage_server(server):
    server.token = "secret"
    with serve(Hub(REPO, KEPT)) as storage:
        server.storage = storage.url
        assert contents(resolve("internvl2-2b", hub="modelscope", token="secret")) == KEPT
        assert len(storage.log) == len(KEPT) - 1  # nothing to fetch of the empty file
        assert not any("secret" in str(headers) for _, _, headers in storage.log)


@BOTH
def test_a_revision_is_asked_for_by_name(server, place):
    folder = resolve("internvl2-2b", hub=place)
    server.log.clear()
    if place == "huggingface":
        with pytest.raises(UserError, match="no revision 'v3'"):
            resolve("internvl2-2b", revision="v3")
        assert resolve("internvl2-2b", revision="main") == folder
    else:
        other = resolve("internvl2-2b", hub="modelscope", revision="v2")
        assert other != folder and contents(other) == KEPT
        assert all("Revision=v2" in path for _, path, _ in server.log)


@BOTH
def test_a_repository_without_weights_is_refused(server, place):
    server.files = {"config.json": CONFIG, "pytorch_model.bin": b"a pickle"}
    with pytest.raises(
        UserError, match=r"no tokenizer\.json or tokenizer\.model or vocab\.json, no model\.safetensors"
    ):
        resolve("internvl2-2b", hub=place)


@BOTH
def test_rows_are_read_before_weights_come(server, place):
    """Without weights first, as a mistake in rows is told before they are downloaded; then the rest."""
    small = {name: content for name, content in KEPT.items() if name not in SHARDS}
    folder = resolve(REPO, hub=place, weights=False)
    assert contents(folder) == small and not server.downloads(SHARDS[0])
    server.log.clear()
    assert resolve(REPO, hub=place, weights=False, offline=True) == folder and server.log == []
    with pytest.raises(UserError, match="not on this machine, and offline"):
        resolve(REPO, hub=place, offline=True)
    assert contents(resolve(REPO, hub=place)) == KEPT
    assert not server.downloads("tokenizer.model")


def test_a_listing_cannot_write_elsewhere(server, caches):
    server.listed = [{"Path": "../../evil.json", "Type": "blob", "Size": 1, "Sha256": ""}]
    resolve("internvl2-2b", hub="modelscope")
    assert not list(caches.rglob("evil.json"))
    assert all("evil" not in path for _, path, _ in server.log)


@BOTH
def test_a_server_that_is_down_is_one_line(server, place, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"cannot download from {place}") as error:
        resolve("internvl2-2b", hub=place)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["internvl2-3b", "nothing", "a/b/c", "../gone", "/gone/InternVL2-2B"])
def test_a_name_that_no_hub_can_have(server, name):
    with pytest.raises(UserError, match="neither a folder nor a known model"):
        resolve(name)
    assert server.log == []


def test_a_slip_of_the_pen_is_answered_with_names():
    with pytest.raises(UserError, match=r"did you mean .*internvl2-2b"):
        resolve("intervl2-2b")


def test_a_third_hub_is_refused():
    with pytest.raises(UserError, match="hub: expected one of huggingface, modelscope, found 'github'"):
        resolve("internvl2-2b", hub="github")


def test_the_ids_differ_where_the_hubs_do(server):
    row = find_model("internvl-chat-v1_5-int8")
    for place in ("huggingface", "modelscope"):
        server.repo, server.log = row.id_on(place), []
        resolve(row.name, hub=place, revision="main" if place == "huggingface" else "v2")
        assert any(row.id_on(place) in path for _, path, _ in server.log)


def test_no_network_setting_of_this_machine_leaks_in(caches):
    assert os.environ["MODELSCOPE_CACHE"] == str(caches / "ms")


def test_a_run_records_the_revision(caches, monkeypatch):
    """What reads the run later takes the same base; the adapter names it in peft's two keys."""
    monkeypatch.setattr(hub, "_settings", hub._HubSettings())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(caches)
    repo = caches / "hf/models--me--tiny"
    write_checkpoint(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs/v1").write_text(COMMIT)
    (caches / "a.jsonl").write_text('{"query": "Hi", "response": "x"}\n' * 2)
    options = {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": "false", "num_sanity_val_steps": 0}
    argv = [f"--trainer.{name}={value}" for name, value in options.items()]
    assert main(["fit", "--model.pretrained", "me/tiny", "--revision", "v1", "--data.train", "a.jsonl", *argv]) == 0
    assert yaml.safe_load((caches / "runs/version_0/config.yaml").read_text())["model"]["pretrained"] == "me/tiny@v1"
    settings = json.loads((caches / "runs/version_0/adapter/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/tiny", "v1")
    assert AdapterConfig.load(caches / "runs/version_0/adapter").base == "me/tiny@v1"
