"""The architecture is the import table: nothing imports from a floor above, or from its neighbour on floor 1.

Files and functions are short, or the head of the file says why not.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ivl"

FLOOR_0 = {
    "ivl.storage",
    "ivl.errors",
    "ivl.options",
    "ivl.types",
    "ivl.architecture",
    "ivl.hub",
    "ivl.estimate.hardware",
    "ivl.estimate.inference",
    "ivl.reasoning",
    "ivl.system_text",
}

MODEL_SIDE = {"ivl.model", "ivl.checkpoint", "ivl.finetune", "ivl.parallel"}
"""The model, its files, what trains of it, and how it is spread over devices"""

# What each place may import from the package; more specific places first.
ALLOWED = {
    "ivl.errors": set(),
    "ivl.options": {"ivl.errors", "ivl.storage.picture_file", "ivl.options"},
    "ivl.types": {"ivl.errors"},
    "ivl.architecture": {"ivl.errors", "ivl.architecture"},
    "ivl.hub": {"ivl.errors", "ivl.architecture", "ivl.storage", "ivl.hub"},
    "ivl.storage": {"ivl.errors"},
    "ivl.estimate.hardware": set(),
    "ivl.estimate.inference": {"ivl.architecture", "ivl.estimate.hardware"},
    "ivl.reasoning": set(),
    "ivl.system_text": set(),
    # `InternVL.generate` and `InternVL.from_pretrained` call what stands on top of the model.
    "ivl.model.internvl": {*FLOOR_0, "ivl.model", "ivl.inference", "ivl.checkpoint", "ivl.parallel", "ivl.finetune"},
    "ivl.model": {*FLOOR_0, "ivl.model"},
    "ivl.inference": {*FLOOR_0, "ivl.model", "ivl.inference"},
    "ivl.checkpoint": {*FLOOR_0, *MODEL_SIDE},
    "ivl.finetune": {*FLOOR_0, *MODEL_SIDE},
    "ivl.parallel": {*FLOOR_0, *MODEL_SIDE},
    "ivl.estimate": {*FLOOR_0, *MODEL_SIDE, "ivl.estimate"},
    "ivl.data.text": {*FLOOR_0, "ivl.data.text"},
    "ivl.data.rows": {
        *FLOOR_0,
        "ivl.data.rows",
        "ivl.data.media",
        "ivl.data.cache",
        "ivl.data.mapped_array",
        "ivl.data.object_store",
    },
    "ivl.data.media": {*FLOOR_0, "ivl.data.media", "ivl.data.rows", "ivl.data.cache", "ivl.data.workers", "ivl.data"},
    "ivl.data": {*FLOOR_0, "ivl.data"},
    "ivl.cli": {"ivl.errors", "ivl.options", "ivl.cli", "ivl.eval.benchmarks.tasks", "ivl.estimate.hardware"},
    "ivl.run": {"ivl.errors", "ivl.options", "ivl.checkpoint", "ivl.data"},
    "ivl.eval": {
        "ivl.errors",
        "ivl.options",
        "ivl.types",
        "ivl.architecture",
        "ivl.storage.files",
        "ivl.storage.parquet",
        "ivl.storage.picture_file",
        "ivl.reasoning",
        "ivl.eval",
    },
    "ivl.lit": {
        *FLOOR_0,
        *MODEL_SIDE,
        "ivl.inference",
        "ivl.estimate",
        "ivl.data",
        "ivl.eval",
        "ivl.run",
        "ivl.cli",
        "ivl.lit",
    },
    "ivl": {"ivl"},  # commands, and the package's own front door
}
LIGHTNING = "ivl.lit"
VERSION = {"ivl", "ivl.__version__"}
"""All may ask for the version: what is kept on disk is kept under it"""


def _name(path: Path) -> str:
    parts = ("ivl", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(p for p in parts if p != "__init__")


def _inside(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} if node.module != "ivl" else {_member(alias.name) for alias in node.names}
    return found


def _member(name: str) -> str:
    """What `from ivl import name` imports: a module, or a name of the front door."""
    inside = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    return f"ivl.{name}" if inside else "ivl"


FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_walk_sees_the_package():
    assert len(FILES) > 20
    assert "ivl.model.internvl" in {_name(f) for f in FILES}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_stay_on_their_floor(path: Path):
    name = _name(path)
    place = next(p for p in ALLOWED if _inside(name, p))
    for imported in _imports(path):
        if _inside(imported, "ivl") and imported != "ivl":  # the front door itself imports lazily
            assert any(_inside(imported, a) for a in ALLOWED[place]), f"{name} imports {imported}"
        if imported.split(".")[0] in ("lightning", "lightning_fabric"):
            assert _inside(name, LIGHTNING), f"{name} imports {imported}; only {LIGHTNING} may"


def _files_imported(path: Path, names: set[str]) -> set[str]:
    """The files of the package that a file imports, whether as a module or by its names."""
    imported = set(_imports(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return (imported & names) - {"ivl", _name(path)}


def test_no_files_import_each_other_in_a_circle():
    """For types or inside a function neither: such files take a type of a lower one, or a Protocol."""
    names = {_name(path) for path in FILES}
    TopologicalSorter({_name(path): _files_imported(path, names) for path in FILES}).prepare()


def test_a_circle_is_named():
    with pytest.raises(CycleError) as error:
        TopologicalSorter({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}).prepare()
    assert set(error.value.args[1]) == {"a", "b", "c"}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_pickle_and_no_remote_code(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {"pickle", "dill", "cloudpickle"} & {i.split(".")[0] for i in _imports(path)}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, path
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert not (isinstance(node.value, ast.Constant) and node.value.value is False), path


MOST_LINES, MOST_OF_A_FUNCTION = 400, 60
_LONG = re.compile(r"^Long: (\w+), since \S.+", re.MULTILINE)
"""How the docstring of a file states an exception: `Long: NAME, since …`; the name of a function, or of the file"""


def stated(source: str) -> set[str]:
    """The names that the docstring at a file's head excuses."""
    return set(_LONG.findall(ast.get_docstring(ast.parse(source)) or ""))


def too_long(source: str, name: str) -> set[str]:
    """The file's own name and those of its functions that are longer than the limits."""
    found = {name} if len(source.splitlines()) > MOST_LINES else set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            found |= {node.name} if lines > MOST_OF_A_FUNCTION else set()
    return found


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_are_short_or_say_why_not(path: Path):
    source = path.read_text(encoding="utf-8")
    assert too_long(source, path.stem) == stated(source)


def test_what_is_too_long_is_found():
    body = "\n    x = 1" * MOST_OF_A_FUNCTION
    assert too_long(f"def long():{body}\ndef short():\n    pass\n", "file") == {"long"}
    assert too_long("\n" * (MOST_LINES + 1), "file") == {"file"}
    assert stated('"""What it does.\n\nLong: long, since it must.\n"""\n') == {"long"}
    assert stated('"""What it does.\n\nLong: long, since\n"""\n') == set()
