"""Memory of the host while a model is read by several processes: whole in each, or each its shards.

    python benchmarks/sharded_loading.py CHECKPOINT [--processes 2] [--tune full]

CHECKPOINT: a folder in the released layout. Each process prints its peak of memory of its own (RssAnon: without the
pages of the checkpoint's files, which all processes share) and what the model's tensors take in the end.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

import torch
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ivl.finetune import tune as tuning
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from ivl.parallel.fsdp import build_sharded, parallelize

TUNES = {
    "lora": Tune(language_model=LoRA(rank=16)),
    "full": Tune(vision_model="full", mlp1="full", language_model="full"),
}


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this needs Linux")


class Peak:
    """The most anonymous memory while the block runs, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.grown = self.most - self.start


def load(rank: int, count: int, folder: str, tune: str, way: str) -> None:
    """One process: load, then print a row of the table."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (count, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with Peak() as peak:
        if way == "shards":
            model = build_sharded(folder, TUNES[tune], mesh, torch.device("cpu"), "bfloat16")
        else:
            model = InternVL.from_pretrained(folder, dtype="bfloat16")
            tuning.apply(model, TUNES[tune])
            parallelize(model, mesh)
    kept = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    for turn in range(count):
        torch.distributed.barrier()
        if turn == rank:
            print(f"| {tune} | {way} | {rank} | {kept / 1e9:.3f} | {peak.grown / 1e9:.3f} |", flush=True)
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tune", choices=[*TUNES, "both"], default="both")
    args = parser.parse_args()
    print("| tuning | read | process | GB of tensors kept | GB at the peak |\n| --- | --- | --- | --- | --- |")
    for tune in TUNES if args.tune == "both" else [args.tune]:
        for way in ("whole", "shards"):
            processes.spawn(load, (args.processes, args.checkpoint, tune, way), nprocs=args.processes)


if __name__ == "__main__":
    main()
