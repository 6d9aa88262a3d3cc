"""Conversion by llama.cpp, run in the environment of gguf: `llama_cpp_side.py TASK.json OUT.json`.

TASK: {"checkout", "folder", "out", "pre", "names": {"language": [architecture, names], "mmproj": the same}}; OUT: for
each of the two files {"fields", "tensors": name before the conversion → name in the file, null for none}. Their
tensors are written to language.npz and mmproj.npz in `out`. `pre`: kind of the pre-tokenizer, which the converter
knows by a hash for the tokenizers of releases alone.
"""

import json
import sys
from pathlib import Path

import numpy as np

with open(sys.argv[1], encoding="utf-8") as opened:
    task = json.load(opened) | {"answer": sys.argv[2]}
sys.path.insert(0, task["checkout"] + "/gguf-py")
sys.path.insert(0, task["checkout"])

import convert_hf_to_gguf
import gguf
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: task["pre"]
made = {}
for part, flags in (("language", []), ("mmproj", ["--mmproj"])):
    path = Path(task["out"], f"{part}.gguf")
    sys.argv[1:] = [task["folder"], "--outtype", "f32", "--outfile", str(path), *flags]
    convert_hf_to_gguf.main()
    (path,) = path.parent.glob(f"*{part}.gguf")
    reader = gguf.GGUFReader(path)
    np.savez(path.with_name(f"{part}.npz"), **{tensor.name: tensor.data for tensor in reader.tensors})
    architecture, names = task["names"][part]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 24)
    made[part] = {
        "fields": {name: field.contents() for name, field in reader.fields.items()},
        "tensors": {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names},
    }
with open(task["answer"], "w", encoding="utf-8") as opened:
    json.dump(made, opened)
