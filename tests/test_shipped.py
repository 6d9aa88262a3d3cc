"""Configs are found from any folder, and a wheel holds all of the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

from ivl.__main__ import main
from ivl.shipped import with_configs

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["configs/internvl2_2b.yaml", "internvl2_2b.yaml", "internvl2_2b", "InternVL2-2B"])
def test_a_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = str(REPO / "configs/internvl2_2b.yaml")
    assert with_configs(["fit", "--config", name, "-c", "tune/lora", f"--config={name}"]) == [
        *("fit", "--config", path, "-c", str(REPO / "configs/tune/lora.yaml"), f"--config={path}")
    ]


@pytest.mark.parametrize("name", ["internvl3_5-8b-instruct", "OpenGVLab/InternVL3_5-8B-Instruct"])
def test_the_name_of_a_variant_is_its_models_config(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = str(REPO / "configs/internvl3_5_8b.yaml")
    pretrained = ["--model.pretrained", "OpenGVLab/InternVL3_5-8B-Instruct"]
    assert with_configs(["fit", "--config", name, "-c", "tune/lora"]) == [
        *("fit", "--config", path, *pretrained, "-c", str(REPO / "configs/tune/lora.yaml"))
    ]
    assert with_configs(["fit", f"--config={name}"]) == ["fit", f"--config={path}", *pretrained]
    assert with_configs(["fit", "--config"]) == ["fit", "--config"]


def test_a_users_own_file_wins_and_a_folder_of_the_same_name_does_not_hide_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert with_configs(["fit", "--config", "demo"])[2] == str(REPO / "configs/demo.yaml")
    (tmp_path / "demo.yaml").write_text("")
    assert with_configs(["fit", "--config", "demo.yaml"])[2] == "demo.yaml"
    assert with_configs(["fit", "--config", "../pyproject"])[2] == "../pyproject"


def test_commands_take_names_and_an_unknown_one_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "internvl2-8b", "--config", "strategy/ddp", "--print_config"])
    assert "OpenGVLab/InternVL2-8B" in capsys.readouterr().out
    assert main(["fit", "--config", "internvl9"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "internvl9" in error


def test_the_help_says_where_configs_are(capsys):
    assert main(["--help"]) == 0
    assert str(REPO / "configs") in capsys.readouterr().out


def _folders(top: str) -> set[str]:
    return {
        ".".join(p.parent.relative_to(REPO).parts) for p in (REPO / top).rglob("*.py") if "__pycache__" not in p.parts
    }


def test_every_folder_of_the_package_is_shipped():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    named = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    configs = {"ivl." + ".".join(p.parent.relative_to(REPO).parts) for p in (REPO / "configs").rglob("*.yaml")}
    assert set(named) == _folders("ivl") | configs


@pytest.mark.skipif(int(setuptools.__version__.split(".")[0]) < 77, reason="pyproject.toml needs setuptools 77")
def test_a_wheel_holds_the_modules_the_configs_and_the_licence(tmp_path):
    copied = tmp_path / "source"
    files = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        if (REPO / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            (copied / name).write_bytes((REPO / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copied, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    modules = {name for name in files if name.startswith("ivl/")}
    configs = {f"ivl/{name}" for name in files if name.startswith("configs/") and name.endswith(".yaml")}
    assert modules | configs <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
