"""Verification of an exported folder, read back: files, tensors, tokenizer, prompt, logits."""

from __future__ import annotations

import filecmp
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ivl.architecture.config import read_json
from ivl.architecture.families import LLMS, llm_family
from ivl.checkpoint.folder import Checkpoint
from ivl.checkpoint.hf_layout import hf_tensor
from ivl.checkpoint.layouts import layout_of
from ivl.checkpoint.weights import Files, check
from ivl.data.processor import Processor
from ivl.data.text import template
from ivl.data.text.jinja_template import RELEASED_MARKS, opening
from ivl.data.text.tokenizer import GROUNDING_TOKENS, IMAGE_TOKENS, Tokenizer
from ivl.export.files import HF_MARKS, Settings, copied_files
from ivl.finetune.tune import part_of
from ivl.model.internvl import InternVL
from ivl.model.moe.experts import Router
from ivl.types import Batch, UserError

BOUND = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Bound of the change of the probe's logits, by stored dtype: root mean square, relative to that of the logits.

Merged weights are rounded to the dtype they are stored in."""

TEXTS = (
    "Describe the image. How many sheep are there? 4, or 12?",
    " <ref>cat</ref><box>[[10, 20, 300, 999]]</box>\n\n\tx  y <quad></quad>",
    "请描述这张图片。 Größe naïve 🐑 I'll don't",
    "<|im_start|>user\nhi<|im_end|></s><|end|> [UNUSED_TOKEN]",
)
"""Texts that the tokenizer is tried on."""

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_CONFIG_KEYS = (
    "architectures", "model_type", "llm_config", "vision_config", "template", "select_layer", "ps_version",
    "downsample_ratio", "force_image_size", "dynamic_image_size", "use_thumbnail", "min_dynamic_patch",
    "max_dynamic_patch", "pad2square", "use_backbone_lora", "use_llm_lora",
)  # fmt: skip
_VISION_KEYS = (
    "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "qkv_bias", "qk_normalization", "norm_type", "layer_norm_eps", "drop_path_rate",
)  # fmt: skip
_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass
class Check:
    name: str
    ok: bool
    detail: str


def stored_dtype(files: Files) -> str:
    """Dtype that holds all of a checkpoint's tensors without loss. Raises UserError for quantised ones."""
    unsupported = sorted(set(files.dtypes.values()) - _NAMES.keys())
    if unsupported:
        raise UserError(
            f"{files.folder}: has tensors of type {', '.join(unsupported)}; a quantised checkpoint cannot be merged or "
            f"converted, give the release it was made from with --base"
        )
    dtypes = [getattr(torch, _NAMES[name]) for name in set(files.dtypes.values())]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return str(dtype).removeprefix("torch.")


class Probe:
    """One question with an image for every model: `probe(model)` returns the logits (T, V), float32 on the CPU.

    In a mixture of experts, tokens go to the experts of the first model that is asked. Rounding makes a token change
    experts where two are nearly alike, a step in the logits that says nothing about the weights.
    """

    def __init__(self, batch: Batch, device: str) -> None:
        self.batch, self.device = batch, device
        self.experts: dict[str, Tensor] = {}
        """Experts of each token, by name of the router"""

    @classmethod
    def of(cls, processor: Processor, device: str) -> Probe:
        size = processor.config.image_size
        image = Image.linear_gradient("L").resize((size, size)).convert("RGB")
        row = {"query": "<image>\nDescribe it: <ref>cat</ref>", "response": "四 sheep, 12.", "images": [image]}
        return cls(processor.collate([processor(row, max_tiles=1)]), device)

    def __call__(self, model: InternVL) -> Tensor:
        routers = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
        hooks = [router.register_forward_hook(partial(self._route, name)) for name, router in routers]
        try:
            with torch.no_grad():
                return model(**self.batch.to(self.device), return_logits=True).logits[0].float().cpu()
        finally:
            for hook in hooks:
                hook.remove()

    def _route(self, name: str, router: Router, _: Any, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Put the first model's experts in the place of a router's."""
        experts_TA, _, probabilities_TE = made
        experts_TA = self.experts.setdefault(name, experts_TA).to(probabilities_TE.device)
        return experts_TA, router.weights(probabilities_TE, experts_TA), probabilities_TE


def difference(before: Tensor, after: Tensor) -> float:
    """Root mean square of the difference over that of `before`."""
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())


def verify(
    folder: Path,
    settings: Settings,
    layout: str,
    parts: Sequence[str],
    probe: Probe,
    before: Tensor,
    device: str,
) -> list[Check]:
    """Run all checks of a written folder. `parts`: the trained ones; `before`: the probe's logits before merging."""
    raw = read_json(folder / "config.json")
    checks = [
        *(_released_checks(folder, settings, raw) if layout == "released" else []),
        _generation(folder, settings),
        _tensors(folder, settings, layout),
        _index(folder),
        _tokenizer(folder, settings, layout),
        _special(settings),
        _prompt(folder, settings, layout),
    ]
    model = InternVL.from_pretrained(folder, dtype=settings.dtype, device=device)
    checks.append(_frozen(model, settings, layout, parts))
    after = probe(model)[:, : before.shape[1]]  # the hf layout may have rows for further tokens
    change, bound = difference(before, after), BOUND[settings.dtype]
    worst = float((after - before).abs().max())
    detail = f"logits changed by {change:.2e} (relative rms; bound {bound:.0e}), at most {worst:.2e}"
    checks.append(Check("probe", change <= bound, detail))
    return checks


def verify_adapter(folder: Path, before: Tensor, after: Tensor, dtype: str) -> list[Check]:
    """Check that an adapter, read back onto its base, answers as the run did. `dtype`: that of both computations."""
    change, bound = difference(before, after), BOUND[dtype]
    names = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    return [
        Check("files", not names, f"missing {names}" if names else "adapter_config.json, adapter_model.safetensors"),
        Check("probe", change <= bound, f"logits changed by {change:.2e} (relative rms; bound {bound:.0e})"),
    ]


def _released_checks(folder: Path, settings: Settings, raw: dict[str, Any]) -> list[Check]:
    missing = [key for key in _CONFIG_KEYS if key not in raw]
    missing += [f"vision_config.{key}" for key in _VISION_KEYS if key not in raw["vision_config"]]
    missing += [] if raw["llm_config"].get("architectures", [""])[0] in LLMS else ["llm_config.architectures"]
    lora = [raw.get("use_backbone_lora"), raw.get("use_llm_lora")]
    drop, tiles = raw["vision_config"].get("drop_path_rate"), raw.get("max_dynamic_patch")
    copied = copied_files(settings.base)
    lost = [name for name in (*_FILES, *copied) if not (folder / name).is_file()]
    there = [name for name in copied if name not in lost]
    _, changed, _ = filecmp.cmpfiles(settings.base, folder, there, shallow=False)
    expected = settings.processor.system_message
    read = Processor.from_pretrained(folder).system_message
    return [
        Check("files", not lost, f"missing: {', '.join(lost)}" if lost else f"{len(_FILES) + len(copied)} files"),
        Check("copied files", not changed, f"changed: {changed}" if changed else f"{len(copied)} equal the base's"),
        Check("config keys", not missing, f"missing: {', '.join(missing)}" if missing else "all there"),
        Check("LoRA numbers", lora == [0, 0], f"use_backbone_lora, use_llm_lora: {lora}"),
        Check("drop path", drop == 0, f"vision_config.drop_path_rate {drop}"),
        Check("tiles", tiles == settings.max_tiles, f"max_dynamic_patch {tiles}, trained with {settings.max_tiles}"),
        Check("system message", read == expected, "as trained" if read == expected else f"{read!r}, not {expected!r}"),
    ]


def _generation(folder: Path, settings: Settings) -> Check:
    ids = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = settings.processor.stop_ids
    return Check("generation_config", set(ends) <= set(ids or []), f"eos_token_id {ids}; a turn ends with {ends}")


def _tensors(folder: Path, settings: Settings, layout: str) -> Check:
    """Check that names and shapes are the base's, in one dtype, and that no value is NaN or infinite."""
    files, base = Files.of(folder), settings.checkpoint.files
    expected_layout = llm_family(settings.checkpoint.config.llm_architecture).layout if layout == "released" else "hf"
    problems = []
    shapes = dict(base.shapes)
    if layout == "hf":  # with a row for each token of its processor
        rows = read_json(folder / "config.json")["text_config"]["vocab_size"]
        shapes |= {n: (rows, s[1]) for n, s in shapes.items() if n.endswith(("embed_tokens.weight", "lm_head.weight"))}
    if shapes != files.shapes and layout_of(base.where, settings.checkpoint.config) == expected_layout:
        differing = sorted(set(shapes.items()) ^ set(files.shapes.items()))
        problems.append(f"names or shapes are not the base's: {differing[:5]}")
    dtypes = sorted(set(files.dtypes.values()))
    if [_NAMES.get(name) for name in dtypes] != [settings.dtype]:
        problems.append(f"dtypes {dtypes}, expected {settings.dtype}")
    for path in dict.fromkeys(files.where.values()):
        with safe_open(path, framework="pt") as file:
            names = [n for n, p in files.where.items() if p == path]
            problems += [f"{n} is not finite" for n in names if not file.get_tensor(n).isfinite().all()]
    return Check("tensors", not problems, "; ".join(problems[:5]) or f"{len(files.shapes)}, finite, {settings.dtype}")


def _index(folder: Path) -> Check:
    path = folder / "model.safetensors.index.json"
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    if not path.is_file():
        return Check("index", names == ["model.safetensors"], f"one file: {names}")
    index, files = read_json(path), Files.of(folder)
    widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    total = sum(torch.Size(shape).numel() * widths[files.dtypes[name]] for name, shape in files.shapes.items())
    problems = []
    if index["metadata"]["total_size"] != total:
        problems.append(f"total_size {index['metadata']['total_size']}, the tensors have {total} bytes")
    if index["weight_map"] != {name: p.name for name, p in files.where.items()}:
        problems.append("weight_map does not say where the tensors are")
    if sorted(set(index["weight_map"].values())) != names:
        problems.append(f"files {names} are not those it names")
    return Check("index", not problems, "; ".join(problems) or f"{len(names)} files, {total} bytes")


def _tokenizer(folder: Path, settings: Settings, layout: str) -> Check:
    base, written = settings.processor.tokenizer, Tokenizer.load(folder)
    wrong = [text for text in TEXTS if written.encode(text, bos=True) != base.encode(text, bos=True)]
    if not wrong and layout == "hf" and (folder / "processor_config.json").is_file():
        from transformers import AutoProcessor

        auto_tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
        texts = [t.lstrip() if base.leading_space else t for t in TEXTS]  # see `ivl.data.text.fast_tokenizer`
        wrong = [t for t in texts if auto_tokenizer(t, add_special_tokens=False).input_ids != base.encode(t)]
    return Check("tokenizer", not wrong, f"other ids for {wrong}" if wrong else f"{len(TEXTS)} texts: the base's ids")


def _special(settings: Settings) -> Check:
    tokenizer, vocabulary = settings.processor.tokenizer, settings.checkpoint.config.llm["vocab_size"]
    wrong = []
    for token in sorted(IMAGE_TOKENS | GROUNDING_TOKENS):
        number = tokenizer.added[token].id if token in tokenizer.added else None
        if number is None or number >= vocabulary:
            wrong.append(f"{token}: {number}")
    return Check(
        "special tokens",
        not wrong,
        f"{wrong} of vocab_size {vocabulary}" if wrong else "nine, in the vocabulary",
    )


def conversations() -> list[list[dict[str, Any]]]:
    """Conversations of one to three turns, with and without images, a system message, the last answer, and thoughts."""
    samples: list[list[dict[str, Any]]] = []
    for system, mark in itertools.product((None, "Answer in one word."), ("<image>\n", "")):
        for turns in (1, 2, 3):
            messages = [] if system is None else [{"role": "system", "content": system}]
            for n in range(turns):
                messages.append({"role": "user", "content": f"{mark}What is {n}? \n" if n % 2 == 0 else "And now?"})
                messages.append({"role": "assistant", "content": f'"A\\n" <ref>cat</ref> 四{n}. '})
            samples += [messages, messages[:-1]]
    question = {"role": "user", "content": "How many?"}
    apart = {"role": "assistant", "content": "Four.", "reasoning_content": "Three\nand one."}
    inside = {"role": "assistant", "content": "<think>\nAs before.\n</think>\n\nFour."}
    return [*samples, [question, apart, question, inside], [question, inside, question, apart, question]]


def _prompt(folder: Path, settings: Settings, layout: str) -> Check:
    """Check that the folder's chat template renders the training prompt: bytes always, and ids where no image is."""
    from transformers.utils.chat_template_utils import render_jinja_template

    processor, tokenizer = settings.processor, settings.processor.tokenizer
    jinja = folder / "chat_template.jinja"
    text = jinja.read_text(encoding="utf-8") if jinja.is_file() else _template_key(folder)
    marks = HF_MARKS if layout == "hf" else RELEASED_MARKS
    begin = opening(processor.template, tokenizer)
    wrong = []
    for messages in conversations():
        images = sum("<image>" in message["content"] for message in messages)
        row = processor.parse({"messages": messages, "images": ["x.png"] * images})
        expected = begin + template.written(row, None, processor.template, 0, processor.system_message)
        open_turn = messages[-1]["role"] == "user"
        rendered, _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=open_turn)
        if rendered[0] != expected.replace(RELEASED_MARKS[0], marks[0]):
            wrong.append(f"{rendered[0]!r}, expected {expected!r}")
        if images:
            continue
        ids, _ = template.encode(row, [], tokenizer, processor.template, 0, processor.system_message)
        if tokenizer.encode(rendered[0]) != ids:
            wrong.append(f"{rendered[0]!r} has other ids than in training")
    count = len(conversations())
    return Check("prompt", not wrong, wrong[0] if wrong else f"{count} conversations render as they were trained on")


def _template_key(folder: Path) -> str:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]


def _frozen(model: InternVL, settings: Settings, layout: str, parts: Sequence[str]) -> Check:
    """Check that the parts that were not trained are the base's, bit for bit."""
    checkpoint: Checkpoint = settings.checkpoint
    state = model.state_dict()
    changed: dict[str, int] = {}
    meta = InternVL.from_config(checkpoint.config, device="meta")
    for name, tensor in checkpoint.files.read(check(meta, checkpoint.files), checkpoint.config):
        written = tensor.to(state[name].dtype)
        if layout == "hf":
            written = hf_tensor(name, written, checkpoint.config, checkpoint.image_token_id, model.vocab_size)
        if not torch.equal(state[name].cpu(), written):
            part = part_of(name)
            changed[part] = changed.get(part, 0) + 1
    tied = {"embeddings", "head"} if checkpoint.config.llm.get("tie_word_embeddings") else set()
    unexpected = sorted(set(changed) - set(parts) - (tied if tied & set(parts) else set()))
    return Check("frozen parts", not unexpected, f"tensors that differ from the base's: {changed or 'none'}")
