"""Settings of single videos, and times of frames in the prompt: the same in lengths, training and prediction."""

import pytest
from PIL import Image

from ivl.data.index.facts import facts_of
from ivl.data.processor import Processor
from ivl.data.rows.formats import parse
from ivl.options import VideoOptions
from ivl.types import Media, UserError
from tests.data.videos import write_video
from tests.tiny import write_checkpoint

TIMES = VideoOptions(num_segments=3, frame_prefix="Frame{i} ({time}): ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_checkpoint(folder / "model")
    write_video(folder / "a.mp4", frames=30, fps=10)
    for n in range(12):
        (folder / "frames").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (n, 0, 0)).save(folder / f"frames/{n}.png")
    return folder


def make(folder, **options):
    return Processor.from_pretrained(folder / "model", **options)


def frames(processor, folder, **row):
    example = processor({"query": "Q", "response": "R"} | row, root=folder)
    lengths = processor.lengths({"query": "Q", "response": "R"} | row, root=folder)
    assert (lengths.tokens, lengths.tiles) == (example.num_tokens, example.num_tiles)
    return example.num_tiles


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 8),
        ({"fps": 2}, 6),
        ({"num_frames": 5}, 5),
        ({"nframes": 5.0}, 5),
        ({"fps": 10, "max_frames": 4}, 4),
        ({"max_frames": 3}, 3),
        ({"fps": 4, "start": 1, "end": 1.9}, 4),
        ({"fps": 4, "video_start": 1, "video_end": 1.9}, 4),
    ],
)
def test_a_video_says_its_own_frames(folder, settings, count):
    processor = make(folder)
    assert frames(processor, folder, videos=[{"path": "a.mp4"} | settings]) == count
    assert frames(processor, folder, videos=["a.mp4"], **settings) == count
    parts = [{"type": "video", "video": "a.mp4"} | settings, {"type": "text", "text": "Q"}]
    example = processor({"messages": [{"role": "user", "content": parts}]}, root=folder)
    assert example.num_tiles == count


def test_each_video_has_its_own(folder):
    videos = [{"path": "a.mp4", "fps": 1}, "a.mp4", {"path": "a.mp4", "num_frames": 2}]
    example = make(folder)({"query": "Q", "videos": videos}, root=folder)
    assert len(example.tiles_per_image) == 3 + 8 + 2
    row = parse({"query": "Q", "videos": ["a", "b"], "fps": [2, None], "nframes": [None, 3]})
    assert row.media == (Media("video", "a", fps=2.0), Media("video", "b", num_frames=3))


def test_a_number_in_a_row_goes_before_the_rate_of_the_option(folder):
    processor = make(folder, video=VideoOptions(fps=5))
    assert frames(processor, folder, videos=["a.mp4"]) == 15
    assert frames(processor, folder, videos=[{"path": "a.mp4", "num_frames": 2}]) == 2
    unknown = processor.lengths(
        {"query": "Q", "videos": [{"url": "https://a.b/c.mp4", "num_frames": 2}]}, probe_urls=False
    )
    assert unknown.tiles == 2


def test_rows_that_differ_in_frames_are_no_duplicates():
    rows = [parse({"query": "Q", "videos": [{"path": "a.mp4"} | more]}) for more in ({}, {"fps": 1}, {"num_frames": 1})]
    assert len({facts_of(row)[3] for row in rows}) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fps": 0}, r"videos\[0\].fps: expected frames per second above 0, found 0"),
        ({"fps": "2"}, r"videos\[0\].fps: expected frames per second"),
        ({"num_frames": 2.5}, r"videos\[0\].num_frames: expected a number of frames, found 2.5"),
        ({"fps": 1, "nframes": 2}, r"videos\[0\].fps and num_frames: frames by their rate or by their number"),
        ({"nframes": 1, "num_frames": 2}, r"videos\[0\].num_frames and nframes: both are given"),
        ({"num_frames": 300}, "num_frames 300 is above max_frames 256; lower it"),
        ({"num_frames": 5, "max_frames": 4}, "num_frames 5 is above max_frames 4"),
    ],
)
def test_a_mistake_is_named(folder, settings, words):
    with pytest.raises(UserError, match=words):
        make(folder)({"query": "Q", "videos": [{"path": "a.mp4"} | settings]}, root=folder)
    with pytest.raises(UserError, match="fps: 3 values but 1 videos"):
        parse({"query": "Q", "videos": ["a.mp4"], "fps": [1, 2, 3]})


def text_of(processor, row, folder):
    example = processor(row, root=folder)
    assert processor.lengths(row, root=folder).tokens == example.num_tokens
    return processor.tokenizer.decode(example.input_ids).replace("<IMG_CONTEXT>", "")


def test_times_of_frames_are_those_of_the_video(folder):
    processor = make(folder, video=TIMES)
    row = {"query": "Q", "videos": ["a.mp4"]}
    expected = "Frame1 (0.4s): <img></img>\nFrame2 (1.4s): <img></img>\nFrame3 (2.3s): <img></img>\nQ"
    assert expected in text_of(processor, row, folder)
    assert expected in text_of(processor, row | {"response": "R"}, folder)  # training as prediction
    cut = {"query": "Q", "videos": [{"path": "a.mp4", "start": 1, "fps": 1}]}
    assert "Frame1 (1.5s): <img></img>\nFrame2 (2.5s): <img></img>\nQ" in text_of(processor, cut, folder)
    stills = {"query": "Q", "videos": ["frames"]}  # three a second, data.media.folder_fps
    assert "Frame1 (0.3s): " in text_of(processor, stills, folder)
    beside = {"query": "<image><video>Q", "images": ["frames/0.png"], "videos": ["a.mp4"]}
    assert "Frame1 (0.4s): " in text_of(processor, beside, folder)


def test_without_times_the_prompt_is_the_releases(folder):
    row = {"query": "Q", "videos": ["a.mp4"]}
    plain, timed = (
        make(folder, video=VideoOptions(num_segments=3, frame_prefix=p)) for p in ("Frame{i}: ", TIMES.frame_prefix)
    )
    assert "Frame1: <img></img>\nFrame2: <img></img>" in text_of(plain, row, folder)
    assert plain(row, root=folder).tiles.equal(timed(row, root=folder).tiles)


def test_times_survive_dropped_turns(folder):
    history = [["word " * 40, "a"]]
    row = {"query": "<video>Q", "response": "R", "history": history, "videos": ["a.mp4"]}
    processor = make(folder, video=TIMES, max_length=300)
    example = processor(row, root=folder)
    assert any(note.startswith("dropped") for note in example.notes)
    assert "Frame3 (2.3s): " in processor.tokenizer.decode(example.input_ids)


def test_a_prefix_that_cannot_be_written_is_refused():
    for prefix in ("Frame{n}: ", "Frame{", "{i.a}"):
        with pytest.raises(UserError, match="frame_prefix"):
            VideoOptions(frame_prefix=prefix)
    with pytest.raises(UserError, match=r"frame_prefix has \{time\}, and sample is random"):
        VideoOptions(frame_prefix=TIMES.frame_prefix, sample="random")
