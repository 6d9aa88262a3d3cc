"""Weights in and out: safetensors only, strict both ways, one table per layout read in both directions.

A layout says how the tensors of a file relate to those of the module. Module names are the released ones, with
transformers' names inside `language_model`; so "native" has no rules, InternLM2 has some inside the language model,
and "hf" (transformers' InternVLForConditionalGeneration) renames the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from re import Pattern, compile, escape
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ivl.config import Config, read_json
from ivl.families import llm_family
from ivl.types import UserError

Tensors = list[Tensor]
IMAGE_TOKEN = "<IMG_CONTEXT>"


@dataclass(frozen=True)
class Rule:
    """Tensors of a file and what they are in the module; names may hold {n}, a layer, and {p}, weight or bias.

    `read` and `write` change the tensors themselves, given the config; None: they are the same, one for one.
    """

    stored: tuple[str, ...]
    module: tuple[str, ...]
    read: Callable[[Tensors, Config], Tensors] | None = None
    write: Callable[[Tensors, Config], Tensors] | None = None


def _ungroup(tensors: Tensors, config: Config) -> Tensors:
    """InternLM2's wqkv → q, k, v: per key-value head its query heads, then its key, then its value."""
    heads, kv_heads, width = _heads(config)
    grouped = tensors[0].unflatten(0, (kv_heads, heads // kv_heads + 2, width))
    q, k, v = grouped.split([heads // kv_heads, 1, 1], dim=1)
    return [t.flatten(0, 2) for t in (q, k, v)]


def _group(tensors: Tensors, config: Config) -> Tensors:
    kv_heads, width = _heads(config)[1:]
    return [torch.cat([t.unflatten(0, (kv_heads, -1, width)) for t in tensors], dim=1).flatten(0, 2)]


def _heads(config: Config) -> tuple[int, int, int]:
    heads = config.llm["num_attention_heads"]
    kv_heads = config.llm.get("num_key_value_heads") or heads
    return heads, kv_heads, config.llm["hidden_size"] // heads


def _cat(tensors: Tensors, config: Config) -> Tensors:
    return [torch.cat(tensors)]


def _thirds(tensors: Tensors, config: Config) -> Tensors:
    return list(tensors[0].chunk(3))


def _renames(stored_prefix: str, module_prefix: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule((stored_prefix + s,), (module_prefix + m,)) for s, m in names.items())


_LLM, _LLM_LAYER = "language_model.model.", "language_model.model.layers.{n}."
_INTERNLM2 = (
    Rule(("language_model.output.{p}",), ("language_model.lm_head.{p}",)),
    Rule((_LLM + "tok_embeddings.{p}",), (_LLM + "embed_tokens.{p}",)),
    Rule(
        (_LLM_LAYER + "attention.wqkv.{p}",),
        tuple(f"{_LLM_LAYER}self_attn.{x}_proj.{{p}}" for x in "qkv"),
        _ungroup,
        _group,
    ),
    *_renames(
        _LLM_LAYER,
        _LLM_LAYER,
        {
            "attention.wo.{p}": "self_attn.o_proj.{p}",
            "feed_forward.w1.{p}": "mlp.gate_proj.{p}",
            "feed_forward.w3.{p}": "mlp.up_proj.{p}",
            "feed_forward.w2.{p}": "mlp.down_proj.{p}",
            "attention_norm.{p}": "input_layernorm.{p}",
            "ffn_norm.{p}": "post_attention_layernorm.{p}",
        },
    ),
)


def _hf(tower: str, projector: str, llm: str, head: str) -> tuple[Rule, ...]:
    """transformers' names; its own files have had two sets of prefixes."""
    stored, module = tower + "encoder.layer.{n}.", "vision_model.encoder.layers.{n}."
    return (
        Rule(tuple(f"{stored}attention.{x}_proj.{{p}}" for x in "qkv"), (module + "attn.qkv.{p}",), _cat, _thirds),
        *_renames(
            stored,
            module,
            {
                "attention.q_norm.{p}": "attn.q_norm.{p}",
                "attention.k_norm.{p}": "attn.k_norm.{p}",
                "attention.projection_layer.{p}": "attn.proj.{p}",
                "layernorm_before.{p}": "norm1.{p}",
                "layernorm_after.{p}": "norm2.{p}",
                "mlp.fc1.{p}": "mlp.fc1.{p}",
                "mlp.fc2.{p}": "mlp.fc2.{p}",
                "lambda_1": "ls1",
                "lambda_2": "ls2",
            },
        ),
        *_renames(
            tower + "embeddings.",
            "vision_model.embeddings.",
            {
                "cls_token": "class_embedding",
                "position_embeddings": "position_embedding",
                "patch_embeddings.projection.{p}": "patch_embedding.{p}",
            },
        ),
        *_renames(projector, "mlp1.", {"layer_norm.{p}": "0.{p}", "linear_1.{p}": "1.{p}", "linear_2.{p}": "3.{p}"}),
        Rule((head + "lm_head.{p}",), ("language_model.lm_head.{p}",)),
        Rule((llm + "{rest}",), (_LLM + "{rest}",)),
    )


LAYOUTS: dict[str, tuple[Rule, ...]] = {
    "native": (),
    "internlm2": _INTERNLM2,
    "hf": _hf("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", ""),
    "hf-4": _hf("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model."),
}
"""How files name and cut the tensors. hf-4 is what transformers 4 wrote, and what the published -hf folders hold."""


@dataclass
class Group:
    """One application of a rule: names in the file, names in the module."""

    stored: list[str]
    module: list[str]
    rule: Rule | None = None

    def read(self, tensors: Tensors, config: Config) -> Tensors:
        return self.rule.read(tensors, config) if self.rule and self.rule.read else tensors

    def write(self, tensors: Tensors, config: Config) -> Tensors:
        return self.rule.write(tensors, config) if self.rule and self.rule.write else tensors


def _pattern(name: str) -> Pattern[str]:
    text = escape(name)
    for hole, accepts in (("n", r"\d+"), ("p", "weight|bias"), ("rest", ".+")):
        text = text.replace(escape(f"{{{hole}}}"), f"(?P<{hole}>{accepts})")
    return compile(text)


def groups(module_keys: Iterable[str], layout: str) -> list[Group]:
    """The module's tensors with the stored ones they come from; a name that no rule mentions is stored as it is."""
    patterns = [(rule, _pattern(name)) for rule in LAYOUTS[layout] for name in rule.module]
    found: dict[str, Group] = {}
    for key in module_keys:
        for rule, pattern in patterns:
            if match := pattern.fullmatch(key):
                holes = match.groupdict()
                names = [name.format(**holes) for name in rule.stored]
                found.setdefault(names[0], Group(names, [name.format(**holes) for name in rule.module], rule))
                break
        else:
            found[key] = Group([key], [key])
    return list(found.values())


def to_stored(state: Mapping[str, Tensor], layout: str, config: Config) -> dict[str, Tensor]:
    """A module's state under the names and in the shapes of a file."""
    stored: dict[str, Tensor] = {}
    for group in groups(state, layout):
        stored |= zip(group.stored, group.write([state[name] for name in group.module], config))
    return stored


@dataclass
class Files:
    """The safetensors files of a folder: which tensor lies where, and its shape. Reads headers only."""

    folder: Path
    where: dict[str, Path] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Files:
        """Raises UserError where there are no weights, a shard is missing, or a file is damaged."""
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(
                    f"{folder}: {index.name} names {len(names)} files, {len(missing)} of them are missing "
                    f"({_some(missing)}); is the download complete?"
                )
        elif (folder / "model.safetensors").is_file():
            names = ["model.safetensors"]
        else:
            raise UserError(f"{folder}: no model.safetensors and no {index.name}; expected a checkpoint's weights")
        files = cls(folder)
        for name in names:
            with _opened(folder / name) as file:
                for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    files.where[key] = folder / name
                    files.shapes[key] = tuple(file.get_slice(key).get_shape())
        return files

    def read(self, wanted: list[Group], config: Config) -> Iterator[tuple[str, Tensor]]:
        """Each module's name and tensor, as stored, one at a time; a file is mapped only while it is read."""
        group_of = {name: group for group in wanted for name in group.stored}
        waiting: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.where.values()):
            with _opened(path) as file:
                for name in (n for n, p in self.where.items() if p == path and n in group_of):
                    group = group_of[name]
                    waiting[name] = file.get_tensor(name)
                    if all(n in waiting for n in group.stored):
                        yield from zip(group.module, group.read([waiting.pop(n) for n in group.stored], config))
                waiting = {n: t.clone() for n, t in waiting.items()}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); is the download complete?") from error


def layout_of(names: Iterable[str], config: Config) -> str:
    """The row of `LAYOUTS` that a checkpoint's tensor names belong to."""
    tops = {".".join(name.split(".")[:2]) for name in names}
    if "model.vision_tower" in tops:
        return "hf"
    if any(top.startswith("vision_tower.") for top in tops):
        return "hf-4"
    return llm_family(config.llm_architecture).layout


def load_weights(model: nn.Module, folder: Path, device: torch.device | str) -> None:
    """Put a folder's weights into a model (on the meta device, or not), each in the dtype of the model's own parameter.

    One tensor at a time, so memory peaks at the model and one file. Raises UserError, before any work, that lists
    what is missing, unexpected or of another shape.
    """
    files = Files.of(folder)
    for name, tensor in files.read(check(model, files), model.config):
        place(model, name, tensor, device)
    tie(model)


def check(model: nn.Module, files: Files) -> list[Group]:
    """What to read for each of the model's tensors. Raises UserError listing every tensor that does not fit."""
    layout = layout_of(files.where, model.config)
    state = {name: tensor.to("meta") for name, tensor in untied_state(model).items()}
    expected = {name: tuple(t.shape) for name, t in to_stored(state, layout, model.config).items()}
    missing = sorted(expected.keys() - files.shapes.keys())
    unexpected = sorted(files.shapes.keys() - expected.keys())
    misshapen = [
        f"{name} (expected {list(shape)}, found {list(files.shapes[name])})"
        for name, shape in sorted(expected.items())
        if files.shapes.get(name, shape) != shape
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(
            f"{files.folder}: the weights are not those of its config.json ({layout} layout, {len(expected)} tensors "
            f"expected, {len(files.shapes)} found). {'; '.join(problems)}. Use config.json and weights of one release"
        )
    return groups(state, layout)


def _some(names: list[str], limit: int = 10) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, without an output layer that is the input embedding itself."""
    state = model.state_dict(keep_vars=True)
    if model.language_model.config.tie_word_embeddings:
        del state["language_model.lm_head.weight"]
    return state


def tie(model: nn.Module) -> None:
    """Make the output layer the input embedding again, where the checkpoint has one tensor for both."""
    language_model = model.language_model
    if language_model.config.tie_word_embeddings:
        language_model.lm_head.weight = language_model.get_input_embeddings().weight


def place(model: nn.Module, name: str, tensor: Tensor, device: torch.device | str) -> None:
    """Make `tensor` the parameter `name`, in that parameter's dtype and with its requires_grad."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    # A copy even where nothing changes: what safetensors gives is a window into a file that may be replaced.
    own = torch.empty(tensor.shape, dtype=old.dtype, device=device).copy_(tensor)
    setattr(module, leaf, nn.Parameter(own, requires_grad=old.requires_grad))


def save_weights(
    state: Mapping[str, Tensor], folder: Path, layout: str, config: Config, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a module's state in a layout: one file, or shards of at most `max_shard_bytes` with an index.

    A shard holds at least one tensor, however large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[Group]] = [[]]
    sizes = [0]
    for group in groups(state, layout):
        size = sum(state[name].nbytes for name in group.module)
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(group)
        sizes[-1] += size
    count = len(shards)
    names = [
        f"model-{n:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for n in range(1, count + 1)
    ]
    where: dict[str, str] = {}
    for name, shard in zip(names, shards):
        tensors: dict[str, Tensor] = {}
        for group in shard:
            written = group.write([state[n].detach() for n in group.module], config)
            tensors |= {n: t.contiguous() for n, t in zip(group.stored, written)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> Config:
    """The config of a checkpoint folder."""
    return Config.load(folder)


def read_image_token_id(folder: Path) -> int:
    """Id of `<IMG_CONTEXT>` in the checkpoint's tokenizer files. Raises UserError where none of them has it."""
    path = folder / "added_tokens.json"
    if path.is_file() and IMAGE_TOKEN in (added := read_json(path)):
        return added[IMAGE_TOKEN]
    path = folder / "tokenizer_config.json"
    if path.is_file():
        for number, token in read_json(path).get("added_tokens_decoder", {}).items():
            if token["content"] == IMAGE_TOKEN:
                return int(number)
    path = folder / "tokenizer.json"
    if path.is_file():
        for token in read_json(path).get("added_tokens", []):
            if token["content"] == IMAGE_TOKEN:
                return token["id"]
    raise UserError(
        f"{folder}: no tokenizer file has the token {IMAGE_TOKEN}; expected it in added_tokens.json, "
        "tokenizer_config.json or tokenizer.json, as in every release"
    )


def read_eos_ids(folder: Path) -> list[int]:
    """Ids that end an answer, by generation_config.json; none where there is no such file."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
