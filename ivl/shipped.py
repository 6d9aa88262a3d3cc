"""Configs that come with the package, by name, in a clone or an installed wheel."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
FOLDER = next((f for f in (_HERE / "configs", _HERE.parent / "configs") if f.is_dir()), _HERE / "configs")
"""Folder of the configs: beside the modules in an installed wheel, at the top of the repository in a clone."""
_OPTIONS = ("--config", "-c")


def with_configs(argv: list[str]) -> list[str]:
    """Replace each `--config` that is no file by the path of the shipped config it names, where there is one.

    `configs/demo.yaml`, `demo.yaml`, `demo`, `tune/lora` and a model's name such as `internvl2-2b` name one.
    """
    out = list(argv)
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option in _OPTIONS and equals:
            out[i] = f"{option}={_config_path(value)}"
        elif word in _OPTIONS and i + 1 < len(argv):
            out[i + 1] = _config_path(argv[i + 1])
    return out


def _config_path(name: str) -> str:
    if Path(name).exists() and not Path(name).is_dir():
        return name
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    for spelled in (stem, stem.lower().replace("-", "_")):
        path = FOLDER / f"{spelled}.yaml"
        if stem and ".." not in stem and path.is_file():
            return str(path)
    return name
