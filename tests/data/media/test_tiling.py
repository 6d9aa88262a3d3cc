"""Grids, boxes and pixels against the recorded reference; the rest by hand."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ivl.data.media.tiling import candidate_grids, choose_grid, cut, single, tile_count
from ivl.types import UserError

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def test_candidates_in_recorded_order(golden):
    orders = json.loads((golden / "tiling.json").read_text())["candidate_order"]
    assert len(orders) > 5
    for case in orders:
        assert candidate_grids(case["min_num"], case["max_num"]) == tuple(map(tuple, case["ratios"])), case


def test_grids_of_all_recorded_cases(golden):
    cases = json.loads((golden / "tiling.json").read_text())["cases"]
    assert len(cases) >= 200
    for case in cases:
        size, low, high = case["image_size"], case["min_num"], case["max_num"]
        grid = choose_grid(case["width"], case["height"], low, high, size)
        assert grid == tuple(case["grid"]), case
        n = tile_count(case["width"], case["height"], size, low, high, case["use_thumbnail"])
        assert n == case["num_tiles"], case


def test_tiles_are_the_recorded_boxes(golden):
    """Every pixel of the resized picture lands in the tile and place that the recorded crop box says."""
    cases = [c for c in json.loads((golden / "tiling.json").read_text())["cases"] if c["image_size"] == 56]
    rng = np.random.default_rng(0)
    for case in cases:
        if max(case["width"], case["height"]) > 3000:
            continue
        image = Image.fromarray(rng.integers(0, 256, (case["height"], case["width"], 3), dtype=np.uint8))
        tiles = cut(image, 56, case["min_num"], case["max_num"], case["use_thumbnail"])
        assert len(tiles) == case["num_tiles"]
        columns, rows = case["resized"]
        stretched = image.resize((columns, image.height), Image.Resampling.BICUBIC)
        resized = np.asarray(stretched.resize((columns, rows), Image.Resampling.BICUBIC))
        for tile, (left, top, right, bottom) in zip(tiles, case["boxes"]):
            assert (tile.permute(1, 2, 0).numpy() == resized[top:bottom, left:right]).all(), case


def test_pixels_of_all_recorded_pictures(golden):
    entries = json.loads((golden / "pixels.json").read_text())
    assert len(entries) >= 20
    for entry in entries:
        image = Image.open(golden / entry["image"]).convert("RGB")
        if hashlib.sha256(image.tobytes()).hexdigest() != entry["decoded_rgb_sha256"]:
            pytest.skip(f"{entry['image']}: this JPEG decoder gives other pixels than the recording's")
        if entry.get("dynamic", True):
            limits = entry["min_num"], entry["max_num"], entry["use_thumbnail"]
            tiles = cut(image, entry["image_size"], *limits)
        else:
            tiles = single(image, entry["image_size"], entry["pad2square"])
        expected = torch.from_numpy(np.load(golden / entry["file"])["pixel_values"])
        assert tiles.dtype == torch.uint8 and tiles.is_contiguous()
        assert tiles.shape == expected.shape
        torch.testing.assert_close((tiles.float() / 255 - MEAN) / STD, expected, atol=1e-6, rtol=0)


def test_the_fast_resize_is_within_two_levels(golden):
    """Of 255, and off at all in fewer than one pixel in 100."""
    for name in ("image1.jpg", "image4.jpg", "rgba_alpha.png", "la.png", "thin_300x3.png", "one_pixel.png"):
        image = Image.open(golden / "../media" / name).convert("RGB")
        exact, fast = cut(image, 56), cut(image, 56, exact=False)
        off = (exact.int() - fast.int()).abs()
        assert fast.is_contiguous() and off.max() <= 2 and (off > 0).float().mean() < 0.01, name
        assert (single(image, 56).int() - single(image, 56, exact=False).int()).abs().max() <= 2


def test_sizes_of_the_paper_by_hand():
    # width, height, tiles allowed -> columns, rows
    table = [
        (448, 448, 6, (1, 1)),
        (1000, 1000, 6, (2, 2)),
        (1000, 1000, 12, (3, 3)),
        (2000, 1000, 6, (2, 1)),
        (1920, 1080, 12, (4, 2)),
        (640, 480, 12, (4, 3)),
        (500, 100, 12, (5, 1)),
        (800, 1330, 12, (2, 3)),
    ]
    for width, height, limit, grid in table:
        assert choose_grid(width, height, 1, limit, 448) == grid
    assert tile_count(640, 480, 448) == 13
    assert tile_count(640, 480, 448, thumbnail=False) == 12
    assert tile_count(448, 448, 448) == 1


def test_single_pads_in_the_mean_colour():
    white = Image.new("RGB", (8, 4), "white")
    tile = single(white, 8, pad2square=True)
    assert tile.shape == (1, 3, 8, 8)
    assert tile[0, :, 0, 0].tolist() == [123, 116, 103]
    assert tile[0, :, 4, 4].tolist() == [255, 255, 255]
    assert (single(white, 8) == 255).all()


def test_refusals():
    with pytest.raises(UserError, match="min_tiles"):
        candidate_grids(3, 2)
    with pytest.raises(UserError, match="0 x 5"):
        choose_grid(0, 5, 1, 12, 448)
    with pytest.raises(UserError, match="mode L"):
        cut(Image.new("L", (4, 4)), 56)
