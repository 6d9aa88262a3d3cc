"""Reader of PEFT's adapter_config.json: keys that are read, ignored, or refused by name.

The layers that are adapted, and their ranks, follow from the tensors; so keys that only say where peft is to put its
layers are checked against them and not read. A key that is not listed is refused, unless it is off (null, false,
empty): later versions of peft add keys, and one that changes the meaning must not be passed over.

Source of the keys: huggingface/peft, src/peft/tuners/lora/config.py, to version 0.21.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ivl.architecture.config import read_json
from ivl.hub.hints import check_adapter_folder
from ivl.types import UserError, first_few, shortened

FILE = "adapter_config.json"

TAKEN_OUT = ("pissa", "olora")
"""Values of init_lora_weights that take the start of the two matrices out of the weight, reproducibly"""

PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the weight as it is"""

NO_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "r"),  # seen in the tensors
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),  # of init_lora_weights
    *("megatron_core", "qalora_group_size"),  # of keys that are refused
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # ms-swift's, of the training
    "fan_in_fan_out",  # peft itself turns it off on linear layers
}
"""Keys that change no answer"""

REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA), which is off before certain tokens",
    "trainable_token_indices": "single rows of the embeddings, trained apart",
    "layer_replication": "layers that are used several times",
    "lora_bias": "a bias of the low-rank matrices",
    "megatron_config": "layers of Megatron",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "several adapters behind a router",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "ensure_weight_tying": "an adapter shared by embeddings and output layer",
    "enable_lora": "merged linear layers",
    "use_qa_lora": "QA-LoRA",
    "use_merged_linear": "merged linear layers",
}
"""Keys of unsupported features, with the feature's name"""


READ = {
    *("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
    *("init_lora_weights", "bias", "target_modules", "modules_to_save", "base_model_name_or_path", "revision"),
    "target_parameters",
}
"""Keys that are read"""


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter that decide its answers."""

    where: str
    base: str | None = None
    """Checkpoint that the adapter was trained on"""
    alpha: float = 8
    alphas: dict[str, float] = field(default_factory=dict)
    """Pattern of a layer's name → its alpha, where it differs"""
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: str | None = None
    """A member of `TAKEN_OUT`; None: the weight is the base's"""
    bias: str = "none"
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that have a LoRA; empty: not said, or said by a pattern"""
    parameters: tuple[str, ...] = ()
    """Ends of the names of the stacked experts that have a LoRA"""
    saved: tuple[str, ...] = ()
    """Ends of the names of modules that come along in full"""

    @classmethod
    def load(cls, folder: Path) -> AdapterConfig:
        """Read `folder/adapter_config.json`.

        Raises UserError, which names the key, for a wrong value and for a feature that is not computed here.
        """
        check_adapter_folder(folder)
        return cls.from_dict(read_json(folder / FILE), str(folder / FILE))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = FILE) -> AdapterConfig:
        reader = _Reader(raw, where)
        if raw.get("peft_type") != "LORA":
            raise reader.wrong("peft_type", "LORA, the only kind of adapter read here")
        for key, feature in REFUSED.items():
            if _is_on(raw.get(key)):
                raise UserError(
                    f"{where}: {key} is {shortened(raw[key])}: {feature} is not computed here; merge the adapter with "
                    "peft (merge_and_unload) and give the merged checkpoint"
                )
        config = cls(
            where,
            base=_base(reader),
            alpha=reader.number("lora_alpha", 8),
            alphas=reader.numbers("alpha_pattern"),
            rslora=reader.flag("use_rslora"),
            dora=reader.flag("use_dora"),
            dropout=reader.number("lora_dropout", 0.0),
            init=_init(raw.get("init_lora_weights", True), where),
            bias=reader.text("bias") or "none",
            targets=reader.names("target_modules"),
            parameters=reader.names("target_parameters"),
            saved=reader.names("modules_to_save"),
        )
        if config.bias not in ("none", "all", "lora_only"):
            raise reader.wrong("bias", "none, all or lora_only")
        if not 0 <= config.dropout < 1:
            raise reader.wrong("lora_dropout", "a number from 0 to below 1")
        known = {*NO_EFFECT, *REFUSED, *READ}
        if unknown := sorted(key for key, value in raw.items() if key not in known and _is_on(value)):
            raise UserError(
                f"{where}: {first_few([f'{key} ({shortened(raw[key])})' for key in unknown])}: not known here, so what "
                "it does to the answers is not either; remove the key if it does nothing, or merge the adapter with "
                "the program that made it"
            )
        return config

    def scale(self, layer: str, rank: int) -> float:
        """Scale of a layer's update, alpha / rank or alpha / sqrt(rank). `layer`: its name in the file."""
        matches = (a for key, a in self.alphas.items() if re.match(rf"(.*\.)?({key})$", layer))
        return next(matches, self.alpha) / (rank**0.5 if self.rslora else rank)


def _base(reader: _Reader) -> str | None:
    """The checkpoint that an adapter names, with its revision."""
    name, revision = reader.text("base_model_name_or_path"), reader.text("revision")
    there = name is None or "@" in name or Path(name).is_dir()
    return name if there or revision in (None, "main") else f"{name}@{revision}"


def _is_on(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _init(value: Any, where: str) -> str | None:
    """The member of `TAKEN_OUT` that init_lora_weights names; None for those that leave the weight alone."""
    name = value.lower() if isinstance(value, str) else value
    if name in TAKEN_OUT:
        return str(name)
    if any(name is plain or (isinstance(plain, str) and name == plain) for plain in (*PLAIN, None)):
        return None
    raise UserError(
        f"{where}: init_lora_weights is {shortened(value)}: the base's weights were changed before the training in a "
        f"way that cannot be computed again here (known: {', '.join(map(str, (*PLAIN, *TAKEN_OUT)))}); save the "
        "adapter with peft's path_initial_model_for_weight_conversion, or give the merged checkpoint"
    )


@dataclass(frozen=True)
class _Reader:
    """Values of known types. Each method raises UserError for another type; null is the default."""

    raw: dict[str, Any]
    where: str

    def wrong(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.where}: {key}: expected {expected}, found {shortened(self.raw.get(key))}")

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        if value is None:
            return default
        if not _is_number(value):
            raise self.wrong(key, "a number")
        return float(value)

    def numbers(self, key: str) -> dict[str, float]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_number, value.values())):
            raise self.wrong(key, "an object from names of layers to numbers")
        for pattern in value:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except re.error:
                raise self.wrong(key, f"patterns of names; {pattern!r} is none") from None
        return {name: float(number) for name, number in value.items()}

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value or None

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names; a string is a pattern of peft's (or `all-linear`), and names nothing."""
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "a list of names")
        return tuple(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGE


_LARGE = 1e9  # also False for NaN and for whole numbers that no float holds
