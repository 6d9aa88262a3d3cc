"""Files of an exported folder beside its weights: config, tokenizer, processor.

Layouts: the released one, and that of transformers' InternVLForConditionalGeneration. Tokenizer and code files are the
base's, byte for byte; the rewritten files are named here.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.architecture.config import read_json
from ivl.architecture.hf_config import is_hf, released_config
from ivl.checkpoint.folder import Checkpoint
from ivl.checkpoint.hf_layout import hf_config
from ivl.data.processor import Processor
from ivl.data.text.jinja_template import chat_template
from ivl.data.text.template import Thoughts, release_system_message
from ivl.storage.files import write_json
from ivl.system_text import NONE
from ivl.types import IMAGENET_MEAN, IMAGENET_STD, UserError

COPIED = (
    "*.py",
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files copied from the base unchanged."""

HF_MARKS = ("<IMG_CONTEXT>", "<video>")
"""Placeholders of image and video that transformers' InternVLProcessor replaces."""

_DTYPE_KEYS = ("torch_dtype", "dtype")


@dataclass
class Settings:
    """Settings of the exported folder that differ from its base's."""

    base: Path
    checkpoint: Checkpoint
    processor: Processor
    """Processor of the base, with the system message of training."""
    max_tiles: int
    dtype: str

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end an answer: the base's, the turn's end, and the tokenizer's own end of text."""
        processor = self.processor
        ids = [*self.checkpoint.eos_ids, *processor.stop_ids, processor.tokenizer.eos_id]
        return [n for n in dict.fromkeys(ids) if n is not None]


def write_released(settings: Settings, folder: Path) -> list[str]:
    """Write all files but the weights in the released layout. Returns notes: files that the base lacked."""
    base, processor = settings.base, settings.processor
    for name in copied_files(base):
        shutil.copyfile(base / name, folder / name)
    write_json(folder / "config.json", released_json(settings))
    write_json(folder / "generation_config.json", _generation(settings))
    text = chat_template(processor.template, processor.tokenizer, processor.system_message)
    path = base / "tokenizer_config.json"
    write_json(folder / "tokenizer_config.json", (read_json(path) if path.is_file() else {}) | {"chat_template": text})
    if (base / "chat_template.jinja").is_file() or processor.template.thoughts != Thoughts():  # it wins over the key
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    if (base / "preprocessor_config.json").is_file() and not is_hf(read_json(base / "config.json")):
        shutil.copyfile(base / "preprocessor_config.json", folder / "preprocessor_config.json")
    else:
        write_json(folder / "preprocessor_config.json", _preprocessor(processor.config.image_size))
    notes = []
    if processor.system_message == NONE:
        notes.append(
            "no system turn: so are prompts of vLLM, lmdeploy and this program; the release's own chat() always writes "
            "one, here without words"
        )
    if not list(folder.glob("*.py")):
        notes.append(
            "the base has no .py files: transformers, vLLM and lmdeploy take the released layout only with the "
            "release's own; copy them in, or use --layout hf"
        )
    elif settings.checkpoint.config.llm_architecture == "InternLM2ForCausalLM":
        notes.append(
            "--layout hf for vLLM: in the released layout it decodes prompts with pictures and encodes them again, and "
            "the release's InternLM2 tokenizer then adds a blank after each special token"
        )
    return notes


def copied_files(base: Path) -> list[str]:
    return sorted({path.name for pattern in COPIED for path in base.glob(pattern) if path.is_file()})


def released_json(settings: Settings) -> dict[str, Any]:
    """Content of config.json in the released layout: the base's, the export's changes, and defaults written out."""
    raw = copy.deepcopy(read_json(settings.base / "config.json"))
    if is_hf(raw):
        raw = released_config(raw) | {"template": settings.processor.template.name}
    config, processor = settings.checkpoint.config, settings.processor
    raw.pop("quantization_config", None)
    raw |= {
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "max_dynamic_patch": settings.max_tiles,
        "force_image_size": config.image_size,
    }
    for key in ("select_layer", "ps_version", "downsample_ratio", "use_thumbnail", "min_dynamic_patch"):
        raw.setdefault(key, getattr(config, key))
    raw |= {key: getattr(processor.config, key) for key in ("dynamic_image_size", "pad2square")}
    raw["vision_config"]["drop_path_rate"] = 0.0
    if raw["llm_config"].get("tie_word_embeddings"):
        raw["llm_config"]["tie_word_embeddings"] = config.llm["tie_word_embeddings"]
    for part in (raw, raw["llm_config"], raw["vision_config"]):
        for key in [k for k in _DTYPE_KEYS if part.get(k)]:
            part[key] = settings.dtype
    if not any(raw.get(key) for key in _DTYPE_KEYS):
        raw["torch_dtype"] = settings.dtype
    template = processor.template
    system_message = raw.get("system_message")
    if system_message is None:
        system_message = release_system_message(settings.base, template)
    if raw.get("system_message", "") is None:
        del raw["system_message"]  # some readers make the word None of it
    raw.pop("system_turn", None)
    raw |= _program_keys(settings)
    if processor.system_message == NONE:
        raw["system_message"] = ""  # the nearest that the release's own chat() can do
    elif processor.system_message != (template.system_message if system_message is None else system_message):
        raw["system_message"] = processor.system_message
    return raw


def _program_keys(settings: Settings) -> dict[str, Any]:
    """Keys of config.json for this program only: facts of the checkpoint that no other key holds."""
    processor, keys = settings.processor, dict[str, Any]()
    if processor.system_message == NONE:
        keys["system_turn"] = False
    if processor.template.prefill:
        keys["answer_prefill"] = processor.template.prefill
    if (row := processor.abilities) is not None and not row.video:
        keys["release"] = row.name
    return keys


def _generation(settings: Settings) -> dict[str, Any]:
    path = settings.base / "generation_config.json"
    return (read_json(path) if path.is_file() else {}) | {"eos_token_id": settings.eos_ids}


def _preprocessor(size: int) -> dict[str, Any]:
    """Content of preprocessor_config.json as in the releases, for lmdeploy and vLLM."""
    return {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": 3,
        "size": size,
    }


def write_hf(settings: Settings, folder: Path) -> list[str]:
    """Write all files but the weights in transformers' own layout. Returns notes: facts without a form there.

    Raises UserError where a tokenizer or a tower has no form there.
    """
    checkpoint, processor = settings.checkpoint, settings.processor
    raw = hf_config(checkpoint.config, checkpoint.image_token_id) | {"dtype": settings.dtype}
    text = chat_template(processor.template, processor.tokenizer, processor.system_message, HF_MARKS)
    try:
        _write_processor(settings, folder, text)
        raw["text_config"]["vocab_size"] = hf_rows(settings)
    except UserError as error:
        raise UserError(f"{settings.base}: its tokenizer has no form in the hf layout: {error}") from error
    write_json(folder / "config.json", raw | _program_keys(settings))
    write_json(folder / "generation_config.json", _generation(settings))
    notes = []
    if processor.tokenizer.leading_space:
        notes.append(
            "a text that begins with a blank has one token fewer in transformers; no prompt of this template does"
        )
    if processor.config.pad2square and not processor.config.dynamic_image_size:
        notes.append("pad2square has no form in transformers: pictures are stretched there to a square, and not padded")
    return notes


def hf_rows(settings: Settings) -> int:
    """Number of embedding rows in transformers' own layout: one for each token, `<video>` among them."""
    return max(settings.checkpoint.config.llm["vocab_size"], 1 + max(_hf_tokenizer(settings).get_vocab().values()))


def _hf_tokenizer(settings: Settings) -> Any:
    from transformers import PreTrainedTokenizerFast

    from ivl.data.text.fast_tokenizer import fast_tokenizer

    tokenizer = settings.processor.tokenizer
    named = {name: token for name in ("bos", "eos", "pad") if (token := getattr(tokenizer, f"{name}_id")) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(tokenizer),
        **{f"{name}_token": tokenizer.token_bytes(token).decode() for name, token in named.items()},
        model_specific_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": HF_MARKS[0],
            "video_token": HF_MARKS[1],
        },
        clean_up_tokenization_spaces=False,
    )


def _write_processor(settings: Settings, folder: Path, template: str) -> None:
    """Write tokenizer, image and video processors, by transformers' own classes."""
    from transformers import InternVLProcessor, InternVLVideoProcessor

    config = settings.processor.config
    InternVLProcessor(
        image_processor=_image_processor(settings),
        tokenizer=_hf_tokenizer(settings),
        video_processor=InternVLVideoProcessor(**_pixels(config.image_size)),
        image_seq_length=config.tokens_per_tile,
        chat_template=template,
    ).save_pretrained(folder)


def _pixels(size: int) -> dict[str, Any]:
    return {"size": {"height": size, "width": size}, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}


def _image_processor(settings: Settings) -> Any:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    config = settings.processor.config
    return GotOcr2ImageProcessor(
        **_pixels(config.image_size),
        crop_to_patches=config.dynamic_image_size,
        min_patches=config.min_dynamic_patch,
        max_patches=settings.max_tiles,
    )
