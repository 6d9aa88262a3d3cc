"""A release: its number stands the same everywhere, and docs/licences.md has the licence of every dependency."""

import re
from importlib.metadata import EntryPoint, PackageNotFoundError, metadata, version
from pathlib import Path

import pytest

import ivl

REPO = Path(__file__).resolve().parents[1]
LICENCES = REPO / "docs/licences.md"
NAMES = {
    "apache software license": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache": "Apache-2.0",
    "mit license": "MIT",
    "bsd license": "BSD-3-Clause",
    "bsd": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "python software foundation license": "PSF-2.0",
}
"""Licence in the words of older metadata → its SPDX name"""


def text_of(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def test_the_number_is_the_same_everywhere():
    assert re.search(r'^version = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)[1] == ivl.__version__
    assert re.search(r"^version: (.+)$", text_of("CITATION.cff"), re.MULTILINE)[1] == ivl.__version__
    headings = re.findall(r"^## (.+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert next(line for line in headings if line != "Unreleased").split()[0] == ivl.__version__


def test_the_console_script_is_the_program(capsys, monkeypatch):
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    scripts = tomllib.loads(text_of("pyproject.toml"))["project"]["scripts"]
    assert scripts.keys() == {"ivl"}
    main = EntryPoint("ivl", scripts["ivl"], "console_scripts").load()
    for words, status in ((["--version"], 0), (["models", "internvl2-2b"], 0), (["fitt"], 2)):
        monkeypatch.setattr("sys.argv", ["/somewhere/bin/ivl", *words])
        assert main() == status
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{ivl.__version__}\n") and printed.err.startswith("error: fitt: no such command")


def dependencies() -> set[str]:
    """Names of all dependencies in pyproject.toml, those of extras too."""
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {re.match(r"[\w.-]+", line)[0] for one in lists for line in one}


def lowest() -> dict[str, str]:
    """Lower bounds of pyproject.toml by package."""
    return dict(re.findall(r'"([\w.-]+)(?:\[\w+\])?>=([\d.]+)"', text_of("pyproject.toml")))


def licence_of(package: str) -> str | None:
    """Licence that an installed package's metadata name, as its SPDX expression; None where there is none."""
    try:
        data = metadata(package)
    except PackageNotFoundError:
        return None
    if data.get("License-Expression"):
        return data["License-Expression"]
    classifiers = [line.split(" :: ")[-1] for line in data.get_all("Classifier") or [] if line.startswith("License ::")]
    named = data.get("License") or ""
    text = named if named and "\n" not in named and len(named) < 60 else "".join(classifiers[:1])
    return NAMES.get(text.lower(), text) if text != "UNKNOWN" else None


def rows() -> dict[str, str]:
    """Package → licence, as the page has them."""
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", LICENCES.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_dependency_has_its_licence():
    assert rows().keys() == dependencies()


def test_licences_are_those_of_the_packages_that_are_installed():
    installed = {package: licence for package in rows() if (licence := licence_of(package)) is not None}
    if version("transformers").startswith(lowest()["transformers"] + "."):
        pytest.skip("the table is of today's packages, and those installed are at their lower bounds")
    assert len(installed) > 20
    # A version may name the parts that its wheel brings along as well.
    page = rows()
    assert {
        package: licence
        for package, licence in installed.items()
        if not set(page[package].split(" AND ")) & set(licence.split(" AND "))
    } == {}
