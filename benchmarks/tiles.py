"""JPEG files → tiles, images per second on one core: ours, a plain pipeline, and transformers' image processor.

    python benchmarks/tiles.py [picture.jpg ...]

Pictures are made where none are given: a photograph's statistics (blurred noise) at 640 x 480, 1024 x 768, 1920 x 1440
and 4000 x 3000, all 4 x 3 tiles and a thumbnail of 448 pixels. The ways take turns, so that a busy machine hurts all
alike; seconds are those of the processor, the best of `--rounds`.
"""

import argparse
import io
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
import transformers
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode
from transformers import GotOcr2ImageProcessor

from ivl.data.media.load import load_image
from ivl.data.media.tiling import choose_grid, cut

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = ((640, 480), (1024, 768), (1920, 1440), (4000, 3000))

_plain = v2.Compose(
    [
        v2.Resize((448, 448), interpolation=InterpolationMode.BICUBIC),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)
_processor = GotOcr2ImageProcessor(
    size={"height": 448, "width": 448}, image_mean=MEAN, image_std=STD, crop_to_patches=True, max_patches=12
)


def ours(data: bytes) -> torch.Tensor:
    return cut(load_image(data), 448)


def ours_fast(data: bytes) -> torch.Tensor:
    return cut(load_image(data), 448, exact=False)


def plain(data: bytes) -> torch.Tensor:
    """Resize, crop each tile, to float, normalise, stack: as the READMEs of the released models have it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    columns, rows = choose_grid(*image.size, 1, 12, 448)
    resized = image.resize((448 * columns, 448 * rows))
    boxes = [(448 * x, 448 * y, 448 * (x + 1), 448 * (y + 1)) for y in range(rows) for x in range(columns)]
    tiles = [resized.crop(box) for box in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((448, 448)))
    return torch.stack([_plain(tile) for tile in tiles])


def transformers_processor(data: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return _processor(image, return_tensors="pt")["pixel_values"]


WAYS: dict[str, Callable[[bytes], torch.Tensor]] = {
    "ours": ours,
    "ours, exact=False": ours_fast,
    "PIL + torchvision, float": plain,
    "transformers GotOcr2ImageProcessor": transformers_processor,
}


def made(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height)).filter(ImageFilter.GaussianBlur(1))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def seconds(way: Callable[[bytes], torch.Tensor], data: bytes) -> float:
    began = time.process_time()
    way(data)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = {path.name: path.read_bytes() for path in options.pictures} or {
        f"{w} x {h}": made(w, h) for w, h in SIZES
    }
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, ")
    print(f"transformers {transformers.__version__}, Pillow {PIL.__version__}; one core of {cpu()}\n")
    print("| picture | way | images a second | tiles | MB made | differs from the reference's pixels |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, data in pictures.items():
        best = dict.fromkeys(WAYS, float("inf"))
        for _ in range(options.rounds):
            for way, function in WAYS.items():
                best[way] = min(best[way], seconds(function, data))
        reference = ours(data)
        for way, function in WAYS.items():
            tiles = function(data)
            print(
                f"| {name} | {way} | {1 / best[way]:.1f} | {len(tiles)} | {tiles.nbytes / 1e6:.1f} "
                f"| {difference(tiles, reference)} |"
            )


def difference(tiles: torch.Tensor, reference: torch.Tensor) -> str:
    """How many values are another level, and by how much."""
    if tiles.dtype != torch.uint8:
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        tiles = ((tiles * std + mean) * 255).round()
    off = (tiles.int() - reference.int()).abs()
    return f"{(off > 0).float().mean():.2%}, at most {off.max()} of 255"


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
