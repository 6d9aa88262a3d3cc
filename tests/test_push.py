"""Push of an exported folder, over HTTP to a small local server: what is uploaded, refused, repeated, and not told."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

import ivl
from ivl import hub
from ivl.__main__ import main
from ivl.export import push as export_push
from tests.commands.test_export import write_run
from tests.hub_server import Hub, serve
from tests.tiny import write_checkpoint

TOKEN = "hf_SecretOfThisTest"
NAME = "me/boards"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a base, a run of it, and its exported model."""
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(root / "base")
    write_run(root / "run", root / "base")
    assert main(["export", "--run", str(root / "run"), "--out", str(root / "merged")]) == 0
    return root


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub without the repository, and no login but the token."""
    monkeypatch.setattr(hub, "_settings", hub._HubSettings())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol, to its own servers
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(Hub(NAME, {}, exists=False, token=TOKEN)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def push(made: Path, *more: str) -> int:
    return main(["export", "--out", str(made / "merged"), "--push", NAME, "--token", TOKEN, *more])


def test_an_export_is_pushed_with_its_card(made, server, tmp_path, capsys):
    out = tmp_path / "merged"
    argv = ["export", "--run", str(made / "run"), "--out", str(out), "--push", NAME, "--private", "--token", TOKEN]
    assert main(argv) == 0
    assert server.private and server.commits == [f"Export by ivl {ivl.__version__}"]
    here = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.name != "export_report.json"}
    assert server.files == here | {".gitattributes": b"*.bin lfs"}
    card = server.files["README.md"].decode()
    assert "# boards" in card and f"chat --model {NAME}" in card and str(made) not in card
    said = capsys.readouterr()
    assert f"pushed to {server.url}/{NAME} ({server.url}/{NAME}/commit/" in said.out
    assert TOKEN not in said.out + said.err


def test_an_earlier_export_is_pushed_and_pushed_again_without_a_commit(made, server, capsys):
    assert push(made) == 0 == push(made)
    assert len(server.commits) == 1 and not server.private
    assert "holds these files already, nothing to push" in capsys.readouterr().out


def test_a_repository_with_other_files_is_replaced_only_when_told(made, server, capsys):
    server.exists, server.files = True, {".gitattributes": b"x", "model-00001-of-00002.safetensors": b"precious"}
    before = dict(server.files)
    assert push(made) == 2
    assert "exists already, with model-00001-of-00002.safetensors; name another repository, or add --push_replace" in (
        capsys.readouterr().err
    )
    assert server.files == before and not server.commits
    assert push(made, "--push_replace") == 0
    assert "model-00001-of-00002.safetensors" not in server.files  # nor a mixture of two models
    assert {".gitattributes", "config.json", "README.md", "model.safetensors"} <= set(server.files)


def test_it_is_refused_before_the_model_is_merged(made, server, tmp_path, capsys):
    server.exists, server.files = True, {"config.json": b"{}"}
    argv = ["export", "--run", str(made / "run"), "--out", str(tmp_path / "out"), "--push", NAME, "--token", TOKEN]
    assert main(argv) == 2
    assert "exists already, with config.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_upload_that_breaks_off_leaves_the_folder_and_says_how_to_repeat_it(made, server, capsys):
    server.breaks_at_commit = True
    assert push(made, "--private") == 2
    said = capsys.readouterr().err
    assert "HTTP 507" in said and f"python -m ivl export --out {made / 'merged'} --push {NAME} --private" in said
    assert "the disks are full" in said and said.count("error: ") == 1 and TOKEN not in said
    server.breaks_at_commit = False
    assert push(made) == 0 and len(server.commits) == 1


def test_a_change_of_the_repository_meanwhile_is_not_overwritten(made, server, monkeypatch, capsys):
    server.exists, look_up = True, export_push.look_up

    def changed_afterwards(*options):
        remote = look_up(*options)
        server.commits.append("by another")
        return remote

    monkeypatch.setattr(export_push, "look_up", changed_afterwards)
    assert push(made) == 2
    assert "has changed on huggingface meanwhile" in capsys.readouterr().err
    assert server.commits == ["by another"]


@pytest.mark.parametrize("token", [[], ["--token", "hf_another"]])
def test_without_the_right_to_write_it_is_one_line(made, server, capsys, token):
    assert main(["export", "--out", str(made / "merged"), "--push", NAME, *token]) == 2
    said = capsys.readouterr().err
    assert "log in with `hf auth login`, or set HF_TOKEN" in said and "hf_another" not in said
    assert "\n" not in said.strip() and not server.commits


def test_a_public_repository_is_not_taken_for_a_private_one(made, server, capsys):
    server.exists = True
    assert push(made, "--private") == 2
    assert "exists already, and is public" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--push", "boards"], "expected OWNER/NAME"),
        (["--push", "me/../you"], "expected OWNER/NAME"),
        (["--push", NAME, "--hub", "modelscope"], f"modelscope upload {NAME}"),
        (["--private"], "--private: expected --push OWNER/NAME with it"),
        (["--push_replace"], "--push_replace: expected --push"),
    ],
)
def test_mistakes_are_named_before_anything_is_asked(made, server, capsys, argv, message):
    assert main(["export", "--out", str(made / "merged"), *argv]) == 2
    assert message in capsys.readouterr().err and server.log == []


def test_a_folder_that_is_no_export_is_not_pushed(made, server, capsys):
    assert main(["export", "--out", str(made / "base"), "--push", NAME, "--token", TOKEN]) == 2
    assert "is no exported folder (export_report.json is missing)" in capsys.readouterr().err
    assert not server.exists


def test_offline_says_so(made, server, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(made) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_the_licence_of_the_base_is_asked_of_the_hub(made, server, tmp_path, capsys):
    """Its card is not downloaded with the weights."""
    (tmp_path / "README.md").write_text(
        "---\nbase_model: me/boards\n---\n\n# x\n\n## Licence\n\nThat of the base, me/boards: see its own card.\n"
    )
    report = {"base": NAME, "commands": {}}
    export_push._complete_card(tmp_path, report, "me/other")
    assert "license" not in (tmp_path / "README.md").read_text()
    assert "note: the licence of the base is not known" in capsys.readouterr().err
    server.exists, server.card, server.token = True, {"license": "mit"}, None
    export_push._complete_card(tmp_path, report, "me/other")
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {"license": "mit", "base_model": NAME}
    assert "mit, as its base me/boards on the hub." in card
