"""Configs that come with the package, by name, in a clone or an installed wheel."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
FOLDER = next((f for f in (_HERE / "configs", _HERE.parent / "configs") if f.is_dir()), _HERE / "configs")
"""Folder of the configs: beside the modules in an installed wheel, at the top of the repository in a clone."""
_OPTIONS = ("--config", "-c")


def with_configs(argv: list[str]) -> list[str]:
    """Replace each `--config` that is no file by the path of the shipped config it names, where there is one.

    `configs/demo.yaml`, `demo.yaml`, `demo`, `tune/lora` and a model's name such as `internvl2-2b` name one. The name
    of a variant (`internvl3-8b-instruct`) stands for its model's config with `--model.pretrained` of the variant.
    """
    out: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        value = value if equals else next(words, "") if option in _OPTIONS else value
        if option not in _OPTIONS or not (equals or value):
            out.append(word)
            continue
        path, pretrained = _config_path(value)
        out += [f"{option}={path}"] if equals else [option, path]
        out += ["--model.pretrained", pretrained] if pretrained else []
    return out


def _config_path(name: str) -> tuple[str, str | None]:
    """Return the path of a config, and the model to put in it where a variant's name stands for it."""
    if Path(name).exists() and not Path(name).is_dir():
        return name, None
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    if (path := _shipped(stem)) is not None:
        return path, None
    from ivl.architecture.families import find_model  # slow to import, and rarely needed

    row = find_model(stem)
    if row is not None and (path := _shipped(row.variant_of or row.name)) is not None:
        return path, row.huggingface
    return name, None


def _shipped(stem: str) -> str | None:
    for spelled in (stem, stem.lower().replace("-", "_")):
        path = FOLDER / f"{spelled}.yaml"
        if stem and ".." not in stem and path.is_file():
            return str(path)
    return None
