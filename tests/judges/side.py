"""Program in a judge's environment: it reads a task and writes its answer, each a JSON file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.judges.make_env import python_of


def interpreter(judge: str) -> Path:
    """Interpreter of a judge; the test is skipped where there is none."""
    if not python_of(judge).is_file():
        pytest.skip(f"{judge} is not installed: python tests/judges/make_env.py {judge}")
    return python_of(judge)


def checkout(variable: str, source: str, file: str) -> Path:
    """Folder of a source checkout that an environment variable names; the test is skipped where `file` is not in it."""
    folder = Path(os.environ.get(variable, "/"))
    if not (folder / file).exists():
        pytest.skip(f"{variable} names no checkout of {source}")
    return folder


def commit_of(folder: Path) -> str:
    """Commit of a checkout, or the text of a file COMMIT in it."""
    if (folder / "COMMIT").is_file():
        return (folder / "COMMIT").read_text().strip()[:9]
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()[:9]


def with_code(base: Path) -> None:
    """Put the releases' own files for config and tokenizer into a folder; the test is skipped without IVL_INTERNVL.

    Engines run them, this program never does.
    """
    models = checkout("IVL_INTERNVL", "OpenGVLab/InternVL", MODELS) / MODELS
    for file in models.glob("*/configuration_*.py"):
        (base / file.name).write_text(re.sub(r"internvl\.model\.\w+\.", ".", file.read_text()))
    add(base / "config.json", auto_map={"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"})
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())["tokenizer_class"]
    if tokenizer == "InternLM2Tokenizer":
        shutil.copy(models / "internlm2/tokenization_internlm2.py", base)
        classes = [f"tokenization_internlm2.{tokenizer}", None]
        add(base / "tokenizer_config.json", auto_map={"AutoTokenizer": classes})


MODELS = "internvl_chat/internvl/model"
"""Their folder in a checkout of OpenGVLab/InternVL"""


def add(file: Path, **keys: Any) -> None:
    """Add keys to a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def run(judge: str, arguments: list[Any], tmp_path: Path, **environment: str) -> str:
    """Run a judge's interpreter; returns its output, and fails with the end of its messages."""
    done = subprocess.run(
        [interpreter(judge), *arguments], env={**os.environ, **environment}, cwd=tmp_path, capture_output=True,
        text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def answer(judge: str, task: dict[str, Any], tmp_path: Path, script: str = "", **environment: str) -> Any:
    """Answer of `script`, NAME_side.py by default, in the environment NAME."""
    path = Path(__file__).with_name(script or judge.replace("-", "_") + "_side.py")
    (tmp_path / "task.json").write_text(json.dumps(task))
    run(judge, [path, tmp_path / "task.json", tmp_path / "answer.json"], tmp_path, **environment)
    return json.loads((tmp_path / "answer.json").read_text())
