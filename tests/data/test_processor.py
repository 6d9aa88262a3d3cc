"""Rows → examples, end to end; limits; answers back."""

import hashlib
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl.architecture.config import Config
from ivl.architecture.families import find_model
from ivl.data.processor import Processor, TooLong
from ivl.data.text.template import SYSTEM_2_5
from ivl.data.text.tokenizer import Tokenizer
from ivl.data.truncation import changes
from ivl.options import ProcessorOptions, VideoOptions
from ivl.types import IGNORE, UserError
from tests.tiny import write_checkpoint

CHECKPOINTS = (
    "internvl2_1b", "internvl2_2b", "internvl2_4b", "internvl2_26b", "internvl_chat_v1_5", "internvl3_8b",
    "internvl3_5_4b",
    "internvl3_5_30b_a3b",
)  # fmt: skip


@pytest.fixture(scope="module")
def make(golden):
    """Processors of one recorded checkpoint with options."""
    folder = golden / "checkpoints" / "internvl2_2b"
    config, tokenizer = Config.load(folder), Tokenizer.load(folder)

    def build(released=None, **options) -> Processor:
        return Processor(config, tokenizer, ProcessorOptions(**options), released)

    return build


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_recorded_batch(golden, name):
    """The reference's dataset and collator on the recorded rows: ids, labels, mask and pixels."""
    recording = json.loads((golden / "refs" / name / "forward.json").read_text())
    arrays = np.load(golden / "refs" / name / "forward.npz")
    limit = recording["dataset_args"]["max_dynamic_patch"]
    processor = Processor.from_pretrained(golden / "checkpoints" / name, max_tiles=limit, share_tiles=True, exif=False)
    root = (golden / recording["media_root"]).resolve()
    examples = [processor(row, root=root) for row in recording["annotations"]]
    assert [len(example) for example in examples] == recording["sample_lengths"]
    batch = processor.collate(examples)
    assert batch.num_supervised == recording["num_supervised_tokens"]
    mask = batch.attention_mask.numpy()
    assert (batch.input_ids.numpy() == arrays["input_ids"])[mask].all()
    assert (batch.labels.numpy() == arrays["labels"]).all()
    shown = arrays["pixel_values"][arrays["image_flags"].reshape(-1) == 1]  # a text-only row has a white tile there
    assert np.abs(processor.pixel_values(batch.tiles).numpy() - shown).max() <= 1e-6


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_recorded_generation(golden, name):
    """Prompts and pixels of the recorded answers, and the answers' texts from their ids."""
    recording = json.loads((golden / "refs" / name / "generation.json").read_text())
    arrays = np.load(golden / "refs" / name / "generation.npz")
    folder, root = golden / "checkpoints" / name, (golden / recording["media_root"]).resolve()
    config, tokenizer = Config.load(folder), Tokenizer.load(folder)
    for case in recording["cases"]:
        processor = Processor(config, tokenizer, ProcessorOptions(max_tiles=case["max_num"], exif=False))
        assert processor.stop_ids == [case["eos_token_id"]]
        history = case.get("history") or []
        if history and history[-1][0] == case["question"]:  # chat added its own answer to the list it was given
            history = history[:-1]
        system = {"system": case.get("system_message")}
        rows = [{"query": case.get("question"), "history": history, "images": case["images"]} | system]
        if "questions" in case:
            rows = [{"query": q, "images": [i]} for q, i in zip(case["questions"], case["images"], strict=True)]
        examples = [processor(row, root=root) for row in rows]
        assert [n for example in examples for n in example.tiles_per_image] == case["num_patches"]
        for n, example in enumerate(examples):
            asked = [i for i, m in zip(case["input_ids"][n], case["attention_mask"][n]) if m]
            assert example.input_ids.tolist() == asked
            assert example.num_supervised == 0
        tiles = processor.collate(examples).tiles
        if len(tiles):
            recorded = arrays[f"{case['name']}.pixel_values"]
            assert np.abs(processor.pixel_values(tiles).numpy() - recorded).max() <= 1e-6
        answers = case["chat_response"] if "questions" in case else [case["chat_response"]]
        for ids, answer in zip(case["chat_new_tokens"], answers, strict=True):
            skipped = recording.get("skip_special_tokens", True)
            as_reference = tokenizer.decode_as_reference(ids, skip_special=skipped)
            assert as_reference.split(processor.template.end)[0].strip() == answer
            added = any(token.id in ids for token in tokenizer.added.values())
            if not added and "\ufffd" not in answer:  # tags are kept here, and broken characters counted otherwise
                assert processor.decode(ids) == answer


# Answers


def test_decode(make):
    processor = make()
    token = processor.tokenizer.token_id
    answer = "<ref>a cat</ref><box>[[1, 2, 3, 4]]</box> !"
    ids = processor.tokenizer.encode(answer)
    end, pad = token("<|im_end|>"), processor.tokenizer.pad_id
    assert processor.decode(ids) == answer
    assert processor.decode(torch.tensor([*ids, end, pad, pad])) == answer
    assert processor.decode([pad, *ids, end, *ids]) == answer
    assert processor.decode([end]) == processor.decode([]) == ""


def test_what_is_learnt_is_what_is_decoded(make):
    processor = make()
    for answer in ("Yes.", "<box> [[1, 2, 3, 4]] </box>", "一 二\n😀", "a ' b n't , ?"):
        example = processor({"query": "Q", "response": answer})
        learnt = example.labels[example.labels != IGNORE]
        assert learnt[-1] == processor.stop_ids[0]
        assert processor.decode(learnt) == answer


def test_a_prompt_is_the_beginning_of_the_row(make):
    processor = make()
    for row in (
        {"query": "Q", "response": "R", "images": [picture(100, 60)]},
        {"query": "Q", "response": " R ", "history": [["P", "S"], ["T", "U"]], "system": " X "},
    ):  # blanks around questions are dropped in training alone: tests/data/text/test_template.py
        whole = processor(row)
        asked = processor(processor.parse(row).as_prompt())
        assert whole.input_ids[: len(asked)].equal(asked.input_ids)
        assert (asked.labels == IGNORE).all()
        assert whole.tiles.equal(asked.tiles)
        assert asked.conversation.reference == row["response"]


def test_prompt_text(make):
    processor = make(system_message="S")
    row = {"query": "<image>\nQ", "response": "R", "history": [["<video>", "A"]], "images": ["a"], "videos": ["v"]}
    assert processor.prompt_text(processor.parse(row)) == (
        "<|im_start|>system\nS<|im_end|><|im_start|>user\n<video><|im_end|><|im_start|>assistant\nA<|im_end|>"
        "<|im_start|>user\n<image>\nQ<|im_end|><|im_start|>assistant\n"
    )


# Media


def test_every_source_of_an_image(make, tmp_path):
    processor, image = make(), picture(120, 60)
    (tmp_path / "a.png").write_bytes(encoded(image))
    expected = processor({"query": "Q", "images": [image]})
    assert expected.tiles_per_image == [3]  # two tiles beside each other, and the whole
    assert expected.tiles.shape == (3, 3, 56, 56)
    assert expected.tiles.dtype == torch.uint8
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), "a.png", encoded(image)):
        again = processor({"query": "Q", "images": [source]}, root=tmp_path)
        assert again.tiles.equal(expected.tiles)
        assert again.input_ids.equal(expected.input_ids)


def test_videos(make):
    frames = [picture(30, 20, seed) for seed in range(5)]
    processor = make(video=VideoOptions(num_segments=3, frame_prefix="Frame-{i}: "))
    example = processor({"query": "What happens?", "response": "R", "videos": [frames]})
    assert example.tiles_per_image == [1, 1, 1]
    text = processor.tokenizer.decode(example.input_ids)
    block = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n"
    assert f"Frame-1: {block}Frame-2: {block}Frame-3: {block}What happens?" in text
    tiled = make(video=VideoOptions(num_segments=2, max_tiles=4))({"query": "Q", "videos": [[picture(60, 30)] * 2]})
    assert tiled.tiles_per_image == [3, 3]
    beside = make(max_tiles=4)({"query": "<image><video>", "images": [picture(60, 30)], "videos": [frames]})
    assert beside.tiles_per_image == [3] + [1] * 8  # a video takes no tiles from an image beside it


def test_random_frames_come_from_the_generator(make):
    processor = make(video=VideoOptions(num_segments=2, sample="random"))
    row = {"query": "Q", "videos": [[picture(8, 8, seed) for seed in range(40)]]}
    drawn = [processor(row, generator=torch.Generator().manual_seed(seed)).tiles for seed in (1, 1, 2)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_share_tiles(make):
    row = {"query": "Q", "images": [picture(400, 100), picture(400, 100)]}
    assert make(max_tiles=4)(row).tiles_per_image == [5, 5]
    assert make(max_tiles=4, share_tiles=True)(row).tiles_per_image == [3, 3]
    assert make(max_tiles=4)(row, max_tiles=1).tiles_per_image == [1, 1]


def test_one_tile_where_the_checkpoint_says_so(golden):
    folder = golden / "checkpoints" / "internvl2_2b"
    raw = json.loads((folder / "config.json").read_text()) | {"dynamic_image_size": False, "pad2square": True}
    processor = Processor(Config.from_dict(raw), Tokenizer.load(folder))
    example = processor({"query": "Q", "images": [picture(400, 100)]})
    assert example.tiles_per_image == [1]
    assert processor.lengths({"query": "Q", "images": [picture(400, 100)]}).tiles == 1


def test_options_of_one_tile(make, golden):
    """The whole picture as one tile, stretched or padded to a square, with the recorded pixels."""
    entries = [e for e in json.loads((golden / "pixels.json").read_text()) if not e.get("dynamic", True)]
    assert {entry["pad2square"] for entry in entries} == {True, False}
    for entry in entries:
        with Image.open(golden / entry["image"]) as image:
            rgb = image.convert("RGB")
        if hashlib.sha256(rgb.tobytes()).hexdigest() != entry["decoded_rgb_sha256"]:
            continue
        processor = make(dynamic_image_size=False, pad2square=entry["pad2square"], exif=False)
        if processor.config.image_size != entry["image_size"]:
            continue
        example = processor({"query": "Q", "images": [rgb]})
        expected = torch.from_numpy(np.load(golden / entry["file"])["pixel_values"])
        assert example.tiles_per_image == [1]
        torch.testing.assert_close(processor.pixel_values(example.tiles), expected, atol=1e-6, rtol=0)
    assert make().config.dynamic_image_size


def test_pixel_values(make):
    tiles = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    values = make().pixel_values(tiles)
    assert values.dtype == torch.float32
    assert torch.allclose(values[0, :, 0, 0], torch.tensor([-2.117904, -2.035714, -1.804444]), atol=1e-6)
    assert torch.allclose(values[1, :, 0, 0], torch.tensor([2.248908, 2.428571, 2.64]), atol=1e-6)


# Limits


PHOTO = picture(400, 300)


@pytest.mark.parametrize("policy", ["fit", "truncate_text", "drop", "error"])
def test_nothing_changes_where_the_row_fits(make, policy):
    row = {"query": "Q", "response": "R", "images": [PHOTO]}
    full = make(max_length=None)(row)
    example = make(max_length=len(full), on_too_long=policy)(row)
    assert example.input_ids.equal(full.input_ids)
    assert example.notes == []


def test_fit_lowers_the_largest_image_first(make):
    small, large = picture(56, 56), PHOTO
    row = {"query": "Q", "response": "R", "images": [small, picture(112, 56), large]}
    full = make(max_length=None)(row)
    assert full.tiles_per_image == [1, 3, 13]
    example = make(max_length=len(full) - 1)(row)
    assert example.tiles_per_image[:2] == [1, 3]
    assert 3 < example.tiles_per_image[2] < 13
    assert example.notes == [f"tiles 17 -> {sum(example.tiles_per_image)}"]
    least = make(max_length=len(full) - 14 * 4)(row)
    assert least.tiles_per_image == [1, 1, 1]
    assert least.num_supervised == full.num_supervised


def test_fit_then_drops_the_oldest_turns(make):
    history = [["<image>" + "long " * 30, "answer"], ["second", "answer"]]
    row = {"query": "<image> Q", "response": "R", "history": history, "images": [PHOTO, picture(112, 56)]}
    text = len(make(max_length=None)(row | {"history": history[1:], "images": row["images"][1:]}))
    example = make(max_length=text)(row)
    assert example.notes == ["dropped 1 turn"]
    assert example.tiles_per_image == [3]
    assert [m.text for m in example.conversation.messages] == ["second", "answer", "<image> Q", "R"]
    tight = make(max_length=text - 1)(row)
    assert tight.notes == ["tiles 3 -> 1", "dropped 1 turn"]
    prompt = make(max_length=text)({k: v for k, v in row.items() if k != "response"})
    assert prompt.notes == ["dropped 1 turn"]


def test_what_can_not_fit(make):
    row = {"query": "long " * 50, "response": "R", "images": [PHOTO]}
    for row_ in (row, {k: v for k, v in row.items() if k != "response"}):
        with pytest.raises(
            UserError, match=r"train:7: \d+ tokens \(52 of them image\) but max_length is 60, and the last turn"
        ):
            make(max_length=60)(row_, "train:7")
    with pytest.raises(UserError, match="but max_length is 60; raise it, lower max_tiles"):
        make(max_length=60, on_too_long="error")(row)
    with pytest.raises(TooLong, match=r"train:7: .* but max_length is 60"):
        make(max_length=60, on_too_long="drop")(row, "train:7")


def test_truncation_never_cuts_an_image(make):
    row = {
        "query": "<image> Q",
        "response": "R R R",
        "history": [["<image> P", "S"]],
        "images": [PHOTO, picture(112, 56)],
    }
    full = make(max_length=None)(row)
    token = make().tokenizer.token_id
    refused = 0
    for length in range(1, len(full)):
        processor = make(max_length=length, on_too_long="truncate_text")
        try:
            example = processor(row, "f:1")
        except UserError as error:
            assert "f:1: no token is left to train on: the answer begins after token" in str(error)
            refused += 1
            continue
        assert len(example) <= length
        assert example.input_ids.equal(full.input_ids[: len(example)])
        assert (example.input_ids == token("<IMG_CONTEXT>")).sum() == 4 * len(example.tiles)
        assert (example.input_ids == token("<img>")).sum() == (example.input_ids == token("</img>")).sum()
        assert example.tiles_per_image == full.tiles_per_image[: len(example.tiles_per_image)]
        assert example.notes == [f"text {len(full)} -> {len(example)} tokens"]
        assert example.num_supervised
    assert 0 < refused < len(full) - 1


def test_truncated_videos_keep_whole_frames(make):
    row = {"query": "P", "response": "S", "videos": [[PHOTO] * 8]}
    row = {"messages": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "S"},
                        {"role": "user", "content": "<video>"}, {"role": "assistant", "content": "R"}],
           "videos": [[PHOTO] * 8]}  # fmt: skip
    full = make(max_length=None)(row)
    example = make(max_length=len(full) - 40, on_too_long="truncate_text")(row)
    assert 0 < len(example.tiles) < 8
    assert (example.input_ids == make().tokenizer.context_id).sum() == 4 * len(example.tiles)


def test_a_row_with_nothing_to_learn_is_refused(make):
    for row in (
        {"query": "Q", "response": " \n "},  # this template drops the blanks
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "R", "loss": False}]},
    ):
        with pytest.raises(UserError, match="f:1: no token is left to train on"):
            make()(row, "f:1")
        with pytest.raises(UserError, match="f:1: no token is left to train on"):
            make().lengths(row, "f:1")


words = st.lists(
    st.sampled_from(["Q", "yes", "一只猫", "<IMG_CONTEXT>", "<ref>a</ref>", "\n", "two words "]), min_size=1, max_size=6
)
texts = words.map("".join).filter(str.strip)
PICTURES = [picture(w, h) for w, h in ((56, 56), (200, 60), (60, 300), (400, 300), (1, 1))]


@st.composite
def rows(draw):
    """Rows of every kind, media in any turn."""
    turns = draw(st.integers(1, 3))
    asked, images, videos = [draw(texts) for _ in range(turns)], [], []
    for n in range(turns):
        for _ in range(draw(st.integers(0, 2))):
            images.append(draw(st.sampled_from(PICTURES)))
            asked[n] = draw(st.sampled_from(["<image>" + asked[n], asked[n] + "<image>"]))
        if draw(st.integers(0, 3)) == 0:
            videos.append([draw(st.sampled_from(PICTURES))] * draw(st.integers(1, 4)))
            asked[n] = "<video>" + asked[n]
    history = [[question, draw(texts)] for question in asked[:-1]]
    row = {"query": asked[-1], "history": history, "images": images, "videos": videos}
    return row | ({"response": draw(texts)} if draw(st.booleans()) else {})


@settings(max_examples=300, deadline=None)
@given(rows(), st.sampled_from([None, 40, 60, 100, 200]), st.sampled_from(["fit", "truncate_text", "drop", "error"]))
def test_lengths_are_those_of_the_example(make, row, max_length, policy):
    processor = make(max_length=max_length, on_too_long=policy, video=VideoOptions(num_segments=3))
    try:
        example = processor(row, "f:1")
    except UserError as error:
        with pytest.raises(type(error), match=r"^f:1: "):
            processor.lengths(row, "f:1")
        return
    found = processor.lengths(row, "f:1")
    assert found[:3] == (len(example), len(example.tiles), example.num_supervised)
    assert found.changes == changes(example.notes) and bool(found.changes) == bool(example.notes)
    assert max_length is None or len(example) <= max_length
    assert (example.input_ids == processor.tokenizer.context_id).sum() == 4 * len(example.tiles)
    assert sum(example.tiles_per_image) == len(example.tiles)
    assert bool(example.num_supervised) == ("response" in row)
    assert example.labels[0] == IGNORE


def test_urls_are_not_opened_where_that_is_not_wanted(make):
    row = {
        "query": "Q",
        "response": "R",
        "images": ["http://localhost:9/a.jpg"],
        "videos": ["https://localhost:9/v.mp4"],
    }
    assert make(max_tiles=6).lengths(row, probe_urls=False).tiles == 7 + 8


# Errors and options


def test_errors_say_where(make, tmp_path):
    with pytest.raises(UserError, match=r"^train\.jsonl:8: .*missing\.jpg: no such file"):
        make()({"query": "Q", "response": "R", "images": ["missing.jpg"]}, "train.jsonl:8", tmp_path)
    with pytest.raises(UserError, match=r"^train\.jsonl:8: 1 <image> mark but 0 images"):
        make()({"query": "<image>", "response": "R"}, "train.jsonl:8")


@pytest.mark.parametrize("options", [{"max_tiles": 0}, {"max_length": 0}, {"on_too_long": "cut"}])
def test_wrong_options(make, options):
    with pytest.raises(UserError, match=rf"^{next(iter(options))}: expected"):
        make(**options)


def test_what_a_released_model_is_able_to_do(make):
    processor = make(released=find_model("internvl-chat-v1_5"))
    image = picture(8, 8)
    assert processor({"query": "<image><image>", "images": [image, image]}).tiles_per_image == [1, 1]
    with pytest.raises(UserError, match="takes images in one turn only, found them in 2; InternVL2"):
        processor({"query": "<image>", "history": [["<image>", "A"]], "images": [image, image]})
    with pytest.raises(UserError, match="takes no video; InternVL2"):
        processor({"query": "Q", "videos": [[image]]})


def test_system_messages(make):
    """The row's own, else the user's option, else that of the model."""

    def system(row=None, **options):
        processor = make(**options)
        text = processor.tokenizer.decode(processor({"query": "Q", "system": row}).input_ids)
        return text[text.index("system\n") + 7 : text.index("<|im_end|>")]

    assert system().startswith("你是由上海人工智能实验室")
    assert system(system_message="S") == "S"
    nothing = [make(system_message=name)({"query": "Q"}).input_ids.tolist() for name in ("none", "false", False)]
    assert nothing[0] == nothing[1] == nothing[2] and len(nothing[0]) < len(make()({"query": "Q"}).input_ids)
    assert system(system_message="") == ""
    assert system(row="R", system_message="S") == "R"
    assert system(row="") == ""
    assert system(released=find_model("internvl-chat-v1_5")).startswith(
        "You are an AI assistant whose name is InternLM"
    )


def test_null_is_no_system_message_and_an_empty_one_is(tmp_path):
    """As the released config of InternVL3 has it: the template's text stands."""
    texts = {}
    for number, value in enumerate((None, "", "Be brief.")):
        folder = write_checkpoint(tmp_path / str(number), "Qwen3ForCausalLM", overrides={"system_message": value})
        processor = Processor.from_pretrained(folder)
        texts[value] = processor.prompt_text(processor.parse({"query": "Q"})).partition("<|im_start|>user")[0]
    assert texts[None] == f"<|im_start|>system\n{SYSTEM_2_5}<|im_end|>\n"
    assert texts[""] == "<|im_start|>system\n<|im_end|>\n"
    assert texts["Be brief."] == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_the_system_message_of_a_release_comes_with_it(golden, tmp_path):
    for file in (golden / "checkpoints" / "internvl2_2b").iterdir():
        if "model-" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "conversation.py").write_text("Conversation(name='internlm2-chat', system_message='Own.')")
    assert Processor.from_pretrained(tmp_path).system_message == "Own."
    assert Processor.from_pretrained(tmp_path, system_message="User's.").system_message == "User's."


def test_picklable(make):
    processor = pickle.loads(pickle.dumps(make(max_tiles=3)))
    row = {"query": "Q", "response": "R", "images": [PHOTO]}
    assert processor(row).input_ids.equal(make(max_tiles=3)(row).input_ids)


def test_fast_tiles_are_a_level_off_and_as_many(make):
    smooth = Image.radial_gradient("L").resize((300, 200)).convert("RGB")
    row = {"query": "<image>", "response": "a", "images": [smooth]}
    exact, fast = (make(resize=how)(row) for how in ("exact", "fast"))
    assert fast.input_ids.tolist() == exact.input_ids.tolist()
    off = (exact.tiles.int() - fast.tiles.int()).abs()
    assert 0 < (off > 0).float().mean() < 0.2 and off.max() <= 2
    with pytest.raises(UserError, match="resize: expected one of exact, fast, found 'quick'"):
        make(resize="quick")
