# ruff: noqa: E501
"""Rows of every format → conversations."""

import base64
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivl.data.row_files.json_line import loads
from ivl.data.rows.formats import parse
from ivl.types import Media, UserError


def image(source):
    return Media("image", source)


def turns(conversation):
    return [message.parts for message in conversation.messages]


# The rows of the reference document's section on custom data, verbatim.
DOCUMENT = [
    (
        r"""{"query": "55555", "response": "66666", "images": ["image_path"]}""",
        [(image("image_path"), "\n55555"), ("66666",)],
    ),
    (
        r"""{"query": "eeeee", "response": "fffff", "history": [], "images": ["image_path1", "image_path2"]}""",
        [
            ("Image-1: ", image("image_path1"), "\nImage-2: ", image("image_path2"), "\neeeee"),
            ("fffff",),
        ],
    ),
    (
        r"""{"query": "EEEEE", "response": "FFFFF", "history": [["query1", "response1"], ["query2", "response2"]], "images": ["image_path"]}""",
        [("query1",), ("response1",), ("query2",), ("response2",), (image("image_path"), "\nEEEEE"), ("FFFFF",)],
    ),
    (
        r"""{"query": "55555", "response": "66666"}""",
        [("55555",), ("66666",)],
    ),
    (
        r"""{"query": "eeeee", "response": "fffff", "history": []}""",
        [("eeeee",), ("fffff",)],
    ),
    (
        r"""{"query": "EEEEE", "response": "FFFFF", "history": [["query1", "response1"], ["query2", "response2"]]}""",
        [("query1",), ("response1",), ("query2",), ("response2",), ("EEEEE",), ("FFFFF",)],
    ),
    (
        r"""{"query": "Image-1: <image>\nImage-2: <image>\nDescribe the two images in detail.", "response": "xxxxxxxxx", "history": [["<image>Describe the image", "xxxxxxx"], ["CCCCC", "DDDDD"]], "images": ["image_path1", "image_path2", "image_path3"]}""",
        [
            (image("image_path1"), "Describe the image"),
            ("xxxxxxx",),
            ("CCCCC",),
            ("DDDDD",),
            (
                "Image-1: ",
                image("image_path2"),
                "\nImage-2: ",
                image("image_path3"),
                "\nDescribe the two images in detail.",
            ),
            ("xxxxxxxxx",),
        ],
    ),
    (
        r"""{"query": "Image-1: <img>img_path</img>\n Image-2: <img>img_path2</img>\n Describe the two images in detail.", "response": "xxxxxxxxx", "history": [["<img>img_path3</img> Describe the image", "xxxxxxx"], ["CCCCC", "DDDDD"]], }""",
        [
            (image("img_path3"), " Describe the image"),
            ("xxxxxxx",),
            ("CCCCC",),
            ("DDDDD",),
            (
                "Image-1: ",
                image("img_path"),
                "\n Image-2: ",
                image("img_path2"),
                "\n Describe the two images in detail.",
            ),
            ("xxxxxxxxx",),
        ],
    ),
    (
        r"""{"query": "Describe this video in detail. Don't repeat", "response": "xxxxxxxxx", "history": [], "videos": ["video_path"]}""",
        [(Media("video", "video_path"), "\nDescribe this video in detail. Don't repeat"), ("xxxxxxxxx",)],
    ),
    (
        r"""{"query": "Find <bbox>", "response": "<ref-object>", "images": ["/coco2014/train2014/COCO_train2014_000000001507.jpg"], "objects": "[{\"caption\": \"guy in red\", \"bbox\": [138, 136, 235, 359], \"bbox_type\": \"real\", \"image\": 0}]" }""",
        [
            (
                image("/coco2014/train2014/COCO_train2014_000000001507.jpg"),
                "\nFind <box> [[216, 283, 367, 748]] </box>",
            ),
            ("<ref>guy in red</ref>",),
        ],
    ),
    (
        r"""{"query": "Find <ref-object>", "response": "<bbox>", "images": ["/coco2014/train2014/COCO_train2014_000000001507.jpg"], "objects": "[{\"caption\": \"guy in red\", \"bbox\": [138, 136, 235, 359], \"bbox_type\": \"real\", \"image\": 0}]" }""",
        [
            (image("/coco2014/train2014/COCO_train2014_000000001507.jpg"), "\nFind <ref>guy in red</ref>"),
            ("<box> [[216, 283, 367, 748]] </box>",),
        ],
    ),
    (
        r"""{"query": "Find <ref>the man</ref>", "response": "<box> [[200, 200, 600, 600]] </box>", "images": ["image_path1"]}""",
        [(image("image_path1"), "\nFind <ref>the man</ref>"), ("<box> [[200, 200, 600, 600]] </box>",)],
    ),
]


@pytest.mark.parametrize(("line", "expected"), DOCUMENT)
def test_the_document(line, expected):
    conversation = parse(loads(line), size=lambda source: (640, 480))
    assert turns(conversation) == expected
    assert [m.role for m in conversation.messages] == ["user", "assistant"] * (len(expected) // 2)
    assert conversation.system is None


def test_the_document_has_no_other_rows(shared):
    text = (shared / "document.md").read_text()
    section = text[text.index("### Custom Dataset") : text.index("## Inference after Fine-tuning\n")]
    lines = [line for line in section.splitlines() if line.startswith("{")]
    assert lines == [line for line, _ in DOCUMENT]


A, B = image("a.jpg"), image("b.jpg")
USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Yes"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # one image, in every spelling of the list
        ({"query": "Q", "response": "R", "images": "a.jpg"}, [(A, "\nQ"), ("R",)]),
        ({"query": "Q", "response": "R", "image": "a.jpg"}, [(A, "\nQ"), ("R",)]),
        ({"query": "Q", "response": "R", "images": [{"path": "a.jpg"}]}, [(A, "\nQ"), ("R",)]),
        ({"query": "Q", "response": "R", "images": [{"path": "a.jpg", "bytes": None}]}, [(A, "\nQ"), ("R",)]),
        (
            {"query": "Q", "response": "R", "images": "a.jpg, b.jpg"},
            [("Image-1: ", A, "\nImage-2: ", B, "\nQ"), ("R",)],
        ),
        ({"query": "Q<image>", "response": "R", "images": ["a.jpg"]}, [("Q", A), ("R",)]),
        ({"query": "<image><image>", "response": "R", "images": ["a.jpg", "b.jpg"]}, [(A, B), ("R",)]),
        ({"query": "<image>", "response": "<image> R", "images": ["a.jpg"]}, [(A,), ("<image> R",)]),
        ({"query": "", "response": "R", "images": ["a.jpg"]}, [(A, "\n"), ("R",)]),
        # a prompt; with nothing to show it keeps the mark
        ({"query": "Q", "images": ["a.jpg"]}, [(A, "\nQ")]),
        ({"query": "Q", "response": None}, [("Q",)]),
        ({"query": "<image>\nQ <bbox>"}, [("<image>\nQ <bbox>",)]),
        ({"query": "Q", "history": [["<image>", ""]], "images": ["a.jpg"]}, [(A,), (), ("Q",)]),
        # kinds of marks are counted apart
        (
            {"query": "<image> Q", "response": "R", "images": ["a.jpg"], "videos": ["v.mp4"]},
            [(Media("video", "v.mp4"), "\n", A, " Q"), ("R",)],
        ),
        (
            {"query": "Q", "response": "R", "images": ["a.jpg"], "video": "v.mp4"},
            [(A, "\n", Media("video", "v.mp4"), "\nQ"), ("R",)],
        ),
        (
            {"query": "<video>Q", "response": "R", "videos": ["v.mp4"], "start": 1, "end": 2.5},
            [(Media("video", "v.mp4", 1.0, 2.5), "Q"), ("R",)],
        ),
        (
            {"query": "Q", "response": "R", "videos": [{"path": "v.mp4", "start": 3}]},
            [(Media("video", "v.mp4", 3.0, None), "\nQ"), ("R",)],
        ),
        ({"query": "Q", "response": "R", "videos": [["a.jpg", "b.jpg"]]}, [(Media("video", ["a.jpg", "b.jpg"]), "\nQ"), ("R",)]),
        # OpenGVLab
        (
            {"conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "R"}], "image": "a.jpg"},
            [(A, "\nQ"), ("R",)],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "R"},
                    {"from": "human", "value": "P"},
                    {"from": "gpt", "value": "S"},
                ],
                "image": "a.jpg",
            },
            [(A, "\nQ"), ("R",), ("P",), ("S",)],
        ),
        (
            {"conversations": [{"from": "human", "value": "<video>\nQ"}, {"from": "gpt", "value": "R"}], "video": "v.mp4"},
            [(Media("video", "v.mp4"), "\nQ"), ("R",)],
        ),
        (
            {"conversations": [{"from": "gpt", "value": "Welcome!"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "R"}]},
            [("Welcome!",), ("Q",), ("R",)],
        ),
        ({"conversations": [{"from": "human", "value": "Q"}]}, [("Q",)]),
        # OpenAI
        ({"messages": [USER, SAID]}, [("Hi",), ("Yes",)]),
        ({"messages": [SAID, USER, SAID]}, [("Yes",), ("Hi",), ("Yes",)]),
        ({"messages": [USER, SAID, USER]}, [("Hi",), ("Yes",), ("Hi",)]),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, [("Hi",)]),
        ({"messages": [USER, SAID], "images": ["a.jpg"]}, [(A, "\nHi"), ("Yes",)]),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "a.jpg"}},
                            {"type": "text", "text": "Hi"},
                            {"type": "image", "image": "b.jpg"},
                        ],
                    },
                    SAID,
                ]
            },
            [(A, "\nHi", B), ("Yes",)],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Hi"}]}, SAID], "images": ["a.jpg", "b.jpg"]},
            [(A, "\n", B, "\nHi"), ("Yes",)],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nHi"}]}, SAID], "images": ["a.jpg"]},
            [(A, "\nHi"), ("Yes",)],
        ),
    ],
)  # fmt: skip
def test_formats(row, expected):
    assert turns(parse(row)) == expected


@pytest.mark.parametrize("nothing", [{}, {"images": None}, {"images": ""}, {"images": []}])
def test_no_images_in_four_spellings(nothing):
    assert turns(parse({"query": "Q", "response": "R"} | nothing)) == [("Q",), ("R",)]


def test_what_goes_along():
    row = {"query": "Q", "response": "R", "system": "", "id": 7, "source": "vqa"}
    conversation = parse(row, "train.jsonl:3")
    assert (conversation.system, conversation.id, conversation.source) == ("", "7", "vqa")
    assert conversation.where == "train.jsonl:3"
    system = {"from": "system", "value": "S"}
    asked = [{"from": "human", "value": "Q"}]
    assert parse({"conversations": [system, *asked]}).system == "S"
    assert parse({"messages": [{"role": "system", "content": "S"}, USER]}).system == "S"
    trained = [m.trained for m in parse({"messages": [USER, SAID | {"loss": False}, USER, SAID]}).messages]
    assert trained == [True, False, True, True]


def test_sources(tmp_path):
    """Only relative paths start from the root; whatever else names an image is left as it is."""
    (tmp_path / "one,name.jpg").write_bytes(b"x")
    picture = Image.new("RGB", (3, 2))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()

    def sources(images):
        parsed = parse({"query": "Q", "response": "R", "images": images}, root=tmp_path)
        return [medium.source for medium in parsed.media]

    assert sources(["a.jpg"]) == [f"{tmp_path}/a.jpg"]
    assert sources("one,name.jpg") == [f"{tmp_path}/one,name.jpg"]
    assert sources("a.jpg,http://x/b.jpg") == [f"{tmp_path}/a.jpg", "http://x/b.jpg"]
    assert sources(uri) == [uri]
    for source in ("/a.jpg", "https://x/a.jpg", uri, stream.getvalue(), picture):
        assert sources([source]) == [source]
    assert parse({"query": "<img>a.jpg</img>", "response": "R"}, root=tmp_path).media[0].source == f"{tmp_path}/a.jpg"
    assert parse({"query": "Q", "images": [picture]}).media[0].source is picture


def test_pixels_of_boxes_are_those_of_the_image(tmp_path):
    """With nothing said about sizes, the image's header is read."""
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {"query": "<bbox>", "response": "R", "images": ["a.png"], "objects": [{"bbox": [20, 20, 100, 100]}]}
    assert parse(row, root=tmp_path).messages[0].text == "<image>\n<box> [[100, 200, 500, 1000]] </box>"
    compact = parse(row, root=tmp_path, compact_boxes=True)
    assert compact.messages[0].text.endswith("<box>[[100, 200, 500, 1000]]</box>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "<image><image>", "response": "R", "images": ["a"]}, "2 <image> marks but 1 image; add the image or drop a mark"),
        ({"query": "<image>", "response": "R", "images": ["a", "b"]}, "1 <image> mark but 2 images; add a mark or drop the image"),
        ({"query": "<image>", "response": "R"}, "1 <image> mark but 0 images; add the image or drop a mark"),
        ({"query": "<video>", "response": "R", "images": ["a"]}, "1 <video> mark but 0 videos; add the video or drop a mark"),
        ({"query": "<image>", "videos": ["a"]}, "1 <image> mark but 0 images"),
        ([1], "expected an object such as"),
        ({}, "expected one of query, conversations or messages, found nothing"),
        ({"text": "x"}, "expected one of query, conversations or messages, found text"),
        ({"query": "Q", "messages": [USER]}, "found messages, query"),
        ({"query": 3, "response": "R"}, "query: expected a text, found 3"),
        ({"query": "", "response": "R"}, "turn 1: the user's text is empty"),
        ({"query": "Q", "response": ["R"]}, "response: expected a text"),
        ({"query": "Q", "response": ""}, "the last answer is empty: nothing to learn from"),
        ({"query": "Q", "response": "R", "system": 1}, "system: expected a text"),
        ({"query": "Q", "response": "R", "history": "x"}, "history: expected a list of"),
        ({"query": "Q", "response": "R", "history": [["x"]]}, r"history\[0\]: expected \[query, response\]"),
        ({"query": "Q", "response": "R", "history": [["x", None]]}, r"history\[0\]\[1\]: expected a text, found nothing"),
        ({"query": "Q", "response": "\ud800"}, "response: half a surrogate pair at character 0"),
        ({"query": "Q", "response": "R", "images": [None]}, r"images\[0\]: expected a path"),
        ({"query": "Q", "response": "R", "images": [3]}, r"images\[0\]: expected a path"),
        ({"query": "Q", "response": "R", "images": 3}, r"images\[0\]: expected a path"),
        ({"query": "Q", "response": "R", "images": "a.jpg,,b.jpg"}, r"images\[1\]: expected a path"),
        ({"query": "Q", "response": "R", "images": ["a"], "image": "a"}, "image and images: both are given"),
        ({"query": "Q", "response": "R", "videos": ["a"], "start": "1"}, "start: expected seconds"),
        ({"query": "Q", "response": "R", "videos": ["a"], "start": [1, 2]}, "start: 2 values but 1 videos"),
        ({"query": "<bbox>", "response": "R"}, "1 <bbox> mark but 0 objects"),
        ({"query": "<bbox>", "response": "R", "objects": [{"bbox": [1, 2, 3, 4]}]}, "image index is 0, the row has 0"),
        ({"conversations": []}, "conversations: expected a list of turns"),
        ({"conversations": ["x"]}, r"conversations\[0\]: expected an object"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"conversations\[0\].from: expected human, gpt, system, function_call or observation"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\].value: expected a text"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no user's turn"),
        ({"conversations": [{"from": "human", "value": "x"}] * 2}, "turn 2 is by the user"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "system", "value": "y"}]},
            "a system message can only come first",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role: expected system, user, assistant, tool_call or tool"),
        ({"messages": [SAID]}, "no user's turn"),
        ({"messages": [SAID, SAID, USER]}, "turn 2 is by the assistant again; expected user and assistant in turn"),
        ({"messages": [{"role": "user", "content": 3}]}, "content: expected a text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "expected a part of type text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "names no image, and the row has no images"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
            "only a user's message can hold images",
        ),
    ],
)  # fmt: skip
def test_errors(row, message):
    with pytest.raises(UserError, match="^f.jsonl:2: .*" + message):
        parse(row, "f.jsonl:2")


def test_loads():
    assert loads('{"a": ",}", "b": [1, ], }') == loads(b'{"a": ",}", "b": [1]}') == {"a": ",}", "b": [1]}
    for line in ('{"a": 1', "{'a': 1}", '{"a", }', b"\xff\xfe", ""):
        with pytest.raises(ValueError, match=r"Expecting|decode"):
            loads(line)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<image>", "<bbox>", "a.jpg"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = (
    "query",
    "response",
    "history",
    "images",
    "image",
    "videos",
    "objects",
    "system",
    "conversations",
    "messages",
    "start",
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system"]) | values,
        "value": st.text(max_size=8) | values,
        "role": st.sampled_from(["user", "assistant", "system"]) | values,
        "content": st.text(max_size=8) | values,
    },
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), values | st.lists(entries, max_size=4), max_size=6)
    | st.fixed_dictionaries({"query": st.text(max_size=9), "response": values}, optional=dict.fromkeys(KEYS[2:8], values))
)  # fmt: skip
def test_any_row_is_understood_or_refused(row):
    try:
        conversation = parse(row, "f:1", size=lambda source: (10, 10))
    except UserError as error:
        assert str(error).startswith("f:1: ")
    else:
        assert json.loads(json.dumps([m.text for m in conversation.messages]))
        assert [m.role for m in conversation.messages] == ["user", "assistant"] * (len(conversation.messages) // 2) + [
            "user"
        ] * (len(conversation.messages) % 2)
