"""Sampling formulas against the recorded reference."""

import json

import pytest
import torch

from ivl.data.media.video import VideoInfo, fps_indices, release_indices, sample_indices, training_indices
from ivl.options import Sampling
from ivl.types import UserError


def test_release_formula_equals_recorded(golden):
    cases = json.loads((golden / "video.json").read_text())["get_index"]
    assert len(cases) >= 40
    for case in cases:
        bound = case["bound"] and tuple(case["bound"])
        found = release_indices(bound, case["fps"], case["max_frame"], case["first_idx"], case["num_segments"])
        assert found == case["indices"], case


def test_training_formula_equals_recorded(golden):
    cases = json.loads((golden / "video.json").read_text())["training_frame_indices"]
    assert len(cases) >= 20
    for case in cases:
        if case["sample"].startswith("fps"):
            rate = float(case["sample"].removeprefix("fps"))
            found = fps_indices(rate, case["vlen"], case["input_fps"], case["max_num_frames"])
        else:
            found = training_indices(case["num_frames"], case["vlen"], case["sample"], case["fix_start"])
        assert found == case["indices"], case


def test_what_a_video_gives_is_the_release_formula():
    info = VideoInfo(frames=300, fps=30.0, width=8, height=8)
    assert sample_indices(info, Sampling(8)) == [18, 55, 93, 130, 168, 205, 242, 280]
    cut = sample_indices(VideoInfo(501, 25.0, 8, 8), Sampling(8), start=2.5, end=7.25)
    assert cut == [69, 84, 99, 114, 129, 143, 158, 173]


def test_every_choice_is_inside_the_video():
    for frames in (1, 2, 7, 30, 1000):
        info = VideoInfo(frames, 29.97, 8, 8)
        for sampling in (Sampling(1), Sampling(16), Sampling(16, sample="random"), Sampling(fps=2.0, max_frames=10)):
            for start, end in ((None, None), (0, None), (None, 0.01), (0.0, 100.0)):
                indices = sample_indices(info, sampling, start, end, torch.Generator().manual_seed(0))
                assert indices and indices == sorted(indices)
                assert set(indices) <= set(range(frames))
                assert sampling.fps or len(indices) == sampling.num_segments


def test_rate_that_asks_for_too_many_frames_spreads_them():
    info = VideoInfo(frames=3000, fps=30.0, width=8, height=8)
    indices = sample_indices(info, Sampling(fps=1.0, max_frames=10))
    assert len(indices) == 10 and indices[-1] > 2700
    assert len(sample_indices(info, Sampling(fps=1.0))) == 100


def test_random_frames_differ_by_generator_alone():
    info = VideoInfo(frames=1000, fps=30.0, width=8, height=8)

    def draw(seed):
        return sample_indices(info, Sampling(8, sample="random"), generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)
    assert [i // 125 for i in draw(3)] == list(range(8))


def test_refusals():
    info = VideoInfo(frames=300, fps=30.0, width=8, height=8)
    for start, end, words in ((20, 25, "10.00 seconds"), (5, 4, "before start"), (float("nan"), None, "nan")):
        with pytest.raises(UserError, match=words):
            sample_indices(info, Sampling(8), start, end, where="a.mp4")
    for bad in ({"num_segments": 0}, {"fps": 0.0}, {"num_segments": 300}, {"max_frames": 0}):
        with pytest.raises(UserError, match="video sampling"):
            Sampling(**bad)
