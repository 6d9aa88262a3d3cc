"""Config of a checkpoint, config.json, as dataclasses.

Numbers that follow from others are properties, so no option repeats them.

Source of the fields: OpenGVLab/InternVL, internvl_chat/internvl/model/internvl_chat/configuration_*.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ivl.architecture import config_fields
from ivl.errors import UserError


@dataclass(frozen=True)
class VisionConfig:
    """Config of InternViT. `norm_type` rms_norm with `qk_normalization` and no `qkv_bias` is the 6B variant."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    qk_normalization: bool = False
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    drop_path_rate: float = 0.0
    attention_dropout: float = 0.0
    dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0


@dataclass(frozen=True)
class Config:
    """Config of a chat model of the released OpenGVLab layout (`architectures: ["InternVLChatModel"]`)."""

    vision: VisionConfig
    llm: dict[str, Any]
    """Content of `llm_config`, unchanged; `ivl.model.decoder.DecoderConfig` reads it."""
    template: str
    system_message: str | None = None
    """System message of the checkpoint; None: the template's."""
    system_turn: bool = True
    """False: rows without a system message have no system turn. A key of this program's exports."""
    answer_prefill: str = ""
    """Text after the template's opening of an answer, such as `<think>` and a new line."""
    select_layer: int = -1
    ps_version: Literal["v1", "v2"] = "v2"
    downsample_ratio: float = 0.5
    force_image_size: int | None = None
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    pad2square: bool = False
    layout: Literal["released", "hf"] = "released"
    """Layout of names in the folder that it was read from: OpenGVLab's, or that of transformers' class."""
    raw: dict[str, Any] = field(default_factory=dict, repr=False)
    """Content of the file as read, so that it can be written back with nothing lost."""

    @property
    def image_size(self) -> int:
        """Pixels a side of a tile, S."""
        return self.force_image_size or self.vision.image_size

    @property
    def stored_in_8_bits(self) -> bool:
        """True if all linear layers are stored in 8 bits, tower, projector and head too: bitsandbytes' releases."""
        return bool((self.raw.get("quantization_config") or {}).get("load_in_8bit"))

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile after pixel shuffle, P."""
        return self.tokens_of_tile(self.image_size)

    def tokens_of_tile(self, side: int) -> int:
        """Image tokens of a tile of `side` pixels a side."""
        return int((side // self.vision.patch_size) ** 2 * self.downsample_ratio**2)

    @property
    def llm_architecture(self) -> str:
        """Architecture of the language model, by `llm_config.architectures`; a key of `families.LLMS`."""
        names = self.llm.get("architectures") or ["?"]
        return names[0]

    @property
    def projector_width(self) -> int:
        """Input width of `mlp1`: the channels of 1 / downsample_ratio² patches."""
        return int(self.vision.hidden_size * (1 / self.downsample_ratio) ** 2)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> Config:
        """Read a released config. Raises UserError naming the first key that is missing or out of its range."""
        if missing := [key for key in ("vision_config", "llm_config", "template") if key not in raw]:
            raise UserError(
                f"{where}: no {missing[0]!r}; expected the config of an InternVL chat model "
                "(vision_config, llm_config, template)"
            )
        config_fields.check(raw, where)
        vision = _known(VisionConfig, raw["vision_config"])
        top = _known(cls, {k: v for k, v in raw.items() if k not in ("vision", "llm", "layout", "raw")})
        return cls(vision=VisionConfig(**vision), llm=dict(raw["llm_config"]), raw=raw, **top)

    @classmethod
    def load(cls, folder: str | Path) -> Config:
        """Read `folder/config.json`. Raises UserError where there is none or it is not JSON."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), where=str(path))


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {k: v for k, v in values.items() if k in names}


LARGEST_JSON = 1 << 27
"""Size limit of a JSON file, in bytes; the largest of a release, a tokenizer.json, has a tenth of it."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint folder. Raises UserError with the path."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint folder with config.json, weights and tokenizer")
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise UserError(f"{path}: has {size} bytes; expected at most {LARGEST_JSON}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected a JSON object as in a release") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); is the download complete?") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
