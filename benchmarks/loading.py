"""Peak memory and time of loading a checkpoint, over the size of the model.

    python benchmarks/loading.py            # one line per dtype and number of shards

Writes a checkpoint of random bfloat16 weights (1.2 GB; Qwen2 and a small tower) to a temporary folder, and loads it in
processes of their own. Peak: growth of the resident set during `from_pretrained`, mapped file pages included (Linux).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

GB = 10**9
LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 60_000,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 11,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
VISION = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
CONFIG = {"template": "Hermes-2", "force_image_size": 448, "llm_config": LLM, "vision_config": VISION}


def resident(field: str) -> int:
    """Bytes; VmRSS: now, VmHWM: at most so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def measure(folder: Path, dtype: str) -> None:
    """Load in this process and print what it took, as JSON."""
    from ivl.checkpoint.weights import Files
    from ivl.model.internvl import InternVL

    InternVL.from_config(tiny())  # everything imported
    before, start = resident("VmRSS"), time.perf_counter()
    model = InternVL.from_pretrained(folder, dtype=dtype)
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    size = sum(p.nbytes for p in model.parameters())
    shard = max(path.stat().st_size for path in set(Files.of(folder).where.values()))
    print(json.dumps({"size": size, "peak": peak, "shard": shard, "seconds": seconds}))


def tiny():
    from ivl.architecture.config import Config

    small = LLM | {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    return Config.from_dict(CONFIG | {"llm_config": small})


def write(folder: Path, max_shard_bytes: int) -> None:
    from ivl.architecture.config import Config
    from ivl.checkpoint.weights import save_weights
    from ivl.model.internvl import InternVL

    config = Config.from_dict(CONFIG)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 59_999}))
    shapes = InternVL.from_config(config, dtype="bfloat16", device="meta").state_dict()
    state = {name: torch.empty(t.shape, dtype=t.dtype).normal_(std=0.02) for name, t in shapes.items()}
    save_weights(state, folder, "native", config, max_shard_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help="load in this process")
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1])
        return
    print("| shards | dtype | model GB | largest shard GB | peak GB | (peak - shard) / model | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for bound in (int(0.25 * GB), 5 * GB):
            folder = Path(scratch) / str(bound)
            write(folder, bound)
            for dtype in ("bfloat16", "float32"):
                command = [sys.executable, __file__, "--measure", str(folder), dtype]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                r = json.loads(done.stdout.splitlines()[-1])
                ratio = (r["peak"] - r["shard"]) / r["size"]
                count = len(list(folder.glob("*.safetensors")))
                numbers = [f"{r[key] / GB:.2f}" for key in ("size", "shard", "peak")]
                print("| " + " | ".join([str(count), dtype, *numbers, f"{ratio:.2f}", f"{r['seconds']:.1f}"]) + " |")


if __name__ == "__main__":
    main()
