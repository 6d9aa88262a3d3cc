"""Encoding by ms-swift, run in its environment: `python ms_swift_side.py TASK.json OUT.json`.

TASK: {"folder", "template", "tokenizer", "rows"}; OUT: for each row {"ids", "labels"}. `tokenizer`: the
releases' own tokenization_internlm2.py, null for a class of transformers.
"""

import importlib.util
import json
import sys

import transformers
from swift.model.model_meta import get_model_info_meta
from swift.template import get_template


def tokenizer_of(folder: str, file: str | None) -> object:
    with open(f"{folder}/tokenizer_config.json", encoding="utf-8") as opened:
        name = json.load(opened)["tokenizer_class"]
    if file is None:
        return getattr(transformers, name).from_pretrained(folder)
    spec = importlib.util.spec_from_file_location("tokenization", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name).from_pretrained(folder)


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        task = json.load(file)
    processor = tokenizer_of(task["folder"], task["tokenizer"])
    processor.model_info, processor.model_meta = get_model_info_meta(task["folder"], model_type="internvl_chat")
    template = get_template(processor, template_type=task["template"])
    template.set_mode("train")
    out = []
    for row in task["rows"]:
        encoded = template.encode(row)
        out.append({"ids": encoded["input_ids"], "labels": encoded["labels"]})
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(out, file)


if __name__ == "__main__":
    main()
