"""Answers of a conversation that goes on are those of a fresh prompt; nothing is read twice."""

from copy import copy

import pytest
import torch
from PIL import Image

from ivl import Chat, InternVL, Processor
from ivl.chat import Settings, StreamDecoder, inference, inference_stream
from ivl.reasoning import split_reasoning
from ivl.types import UserError
from tests import tiny

FAMILIES = [
    ("InternLM2ForCausalLM", "internlm2-chat", None),
    ("Qwen2ForCausalLM", "Hermes-2", None),
    ("Qwen3ForCausalLM", "internvl2_5", None),
    ("LlamaForCausalLM", "Hermes-2", None),
    ("LlamaForCausalLM", "internvl_zh", "yi"),
    ("Phi3ForCausalLM", "phi3-chat", None),
]
SHORT = Settings(max_new_tokens=9)


def picture(number: int, size: tuple[int, int] = (60, 60)) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))
    return InternVL.from_pretrained(folder), Processor.from_pretrained(folder, max_length=None)


def fresh(model, processor, row, settings=SHORT) -> str:
    batch = processor.collate([processor(row)])
    ends = [*processor.stop_ids, *model.eos_ids]
    return processor.decode(model.generate(batch, **vars(settings), eos_ids=ends)[0])


@pytest.mark.parametrize(("architecture", "template", "tokenizer"), FAMILIES, ids=lambda value: str(value))
def test_every_turn_answers_as_a_fresh_prompt_does(tmp_path, architecture, template, tokenizer):
    folder = tiny.write_checkpoint(tmp_path, architecture, template=template, tokenizer=tokenizer)
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder)
    chat = Chat(model, processor, settings=SHORT)
    images, history, tokens, tiles = [], [], 0, 0
    questions = [
        ("<image>What is in the picture?", [picture(1)]),
        ("And in these? <image> and <image>", [picture(2, (200, 60)), picture(3)]),
        ("How many sheep are there?", []),
        ("请描述这张图片。", []),
    ]
    for question, media in questions:
        images += media
        answer = chat.ask(question, media)
        row = {"query": question, "history": history, "images": images}
        assert answer == fresh(model, processor, row), question
        whole = processor(row)
        # New are the question, its images, the template's words, and at most the last answer again.
        assert chat.prefix_cache.tokens_read <= len(whole) - tokens
        assert chat.prefix_cache.tiles_read == len(whole.tiles) - tiles
        tokens, tiles = len(whole), len(whole.tiles)
        history.append([question, answer])
    assert chat.history == history


def test_history_with_a_plain_tag_goes_in_again_as_it_came(parts):
    model, processor = parts
    chat, media, questions = Chat(model, processor, settings=SHORT), [picture(1)], []
    for question, images in ((r"<image>What does \<image> mean?", media), (r"And \</img> or \<video>?", [])):
        chat.ask(question, images)
        questions.append(question)
    assert [question for question, _ in chat.history] == questions
    again = [inference(model, processor, "Why?", chat.history, images=media, settings=SHORT)]
    assert again[0][0] == chat.ask("Why?") and again[0][1] == chat.history
    plain, history = inference(model, processor, r"Is \<image> a tag?", settings=SHORT)
    assert history == [[r"Is \<image> a tag?", plain]]
    assert plain == Chat(model, processor, settings=SHORT).ask(r"Is \<image> a tag?")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_thought_that_the_prompt_begins_belongs_to_the_answer(tmp_path, thinking):
    folder = tiny.write_checkpoint(tmp_path, "Qwen3ForCausalLM")
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder, thinking=thinking)
    chat = Chat(model, processor, "r1", SHORT)
    answer = chat.ask("How many?")
    assert answer.startswith("<think>\n") == thinking
    assert answer == processor.template.begun + fresh(model, processor, {"query": "How many?", "system": "r1"})
    assert (chat.reasoning, chat.response) == split_reasoning(answer)
    assert chat.history == [["How many?", answer]]
    assert (chat.reasoning is None) == (not thinking)
    history = {"query": "And now?", "history": chat.history, "system": "r1"}
    assert chat.ask("And now?") == processor.template.begun + fresh(model, processor, history)


def test_a_second_turn_reads_only_its_own_tokens(parts):
    model, processor = parts
    chat = Chat(model, processor, settings=SHORT)
    chat.ask("<image>What is it?", [picture(1)])
    first = chat.prefix_cache.tokens_read
    chat.ask("Really?")
    assert chat.prefix_cache.tokens_read < first / 2
    assert chat.prefix_cache.tiles_read == 0


def test_a_mark_without_effect_is_told(parts):
    chat = Chat(*parts, settings=SHORT)
    with pytest.raises(UserError, match=r"<img> without </img> before 'picture\.jpg'"):
        chat.ask("<img>picture.jpg What is it?")
    assert not chat.history
    chat.ask("What does <img> do?")
    assert chat.notes == ("<img> without </img>, plain characters in a user's text",)
    chat.ask("<|image|> What is it?", [picture(1)])
    assert len(chat.notes) == 1 and chat.notes[0].startswith("<|image|>, a mark of another program")
    chat.ask("Really?")
    assert not chat.notes


def test_what_changed_is_read_again(parts):
    """Another system message, a picture in another's place: only what comes before it is kept."""
    model, processor = parts
    chat = Chat(model, processor, settings=SHORT)
    chat.ask("<image>What is it?", [picture(1)])
    for system, image in (("Be short.", 1), ("Be short.", 2)):
        answer = fresh(model, processor, {"query": "<image>What is it?", "images": [picture(image)], "system": system})
        chat._messages, chat.system = (), system
        assert chat.ask("<image>What is it?", [picture(image)]) == answer
        # The tower does not see a picture twice.
        assert chat.prefix_cache.tiles_read == (image != 1)


def test_frequencies_that_follow_from_the_length(tmp_path):
    """Beyond the limit of longrope (256 here) the keys of a shorter prompt do not serve; later ones do again."""
    folder = tiny.write_checkpoint(tmp_path, "Phi3ForCausalLM")
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder, max_tiles=1)
    chat = Chat(model, processor, settings=SHORT)
    history, read = [], []
    for number in range(5):
        question = f"Question {number}: " + "how many are there? " * (5 if number < 2 else 1)
        assert chat.ask(question) == fresh(model, processor, {"query": question, "history": history})
        history.append([question, chat.history[-1][1]])
        read.append((len(processor({"query": question, "history": history[:-1]})), chat.prefix_cache.tokens_read))
    first_beyond = next(n for n, (total, _) in enumerate(read) if total > 256)
    assert 0 < first_beyond < 4
    for n, (total, new) in enumerate(read):
        assert (new == total) == (n in (0, first_beyond)), read


def test_an_answer_comes_in_pieces_and_a_stopped_one_is_kept(parts):
    model, processor = parts
    chat = Chat(model, processor, settings=SHORT)
    whole = chat.ask("How many sheep are there?")
    chat.clear()
    assert chat.history == []
    pieces = list(chat.stream("How many sheep are there?"))
    assert "".join(pieces) == whole and len(pieces) > 2
    chat.clear()
    stream = chat.stream("How many sheep are there?")
    begun = next(stream) + next(stream)
    stream.close()
    assert chat.history == [["How many sheep are there?", begun.strip()]]
    assert chat.ask("Go on.") == fresh(model, processor, {"query": "Go on.", "history": [*chat.history[:1]]})


def test_an_answer_goes_on_from_a_prefix(parts):
    model, processor = parts
    row = {"query": "What is it?", "response": "Well, ", "prefix": True}
    ids = model.generate(processor.collate([processor(row)]), 9, eos_ids=[*processor.stop_ids, *model.eos_ids])[0]
    chat = Chat(model, processor, settings=SHORT)
    pieces = list(chat.stream("What is it?", prefix="Well, "))
    assert pieces[0] == "Well, " and "".join(pieces) == processor.decode(ids, prefix="Well, ") != "Well,"
    assert chat.history == [["What is it?", "".join(pieces)]]
    following = {"query": "And now?", "history": chat.history}
    assert chat.ask("And now?") == fresh(model, processor, following)


def test_a_turn_that_fails_leaves_no_trace(parts, tmp_path):
    model, processor = parts
    chat = Chat(model, processor, settings=SHORT)
    chat.ask("How many sheep are there?")
    before = chat.history
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.mp4").touch()
    for question, images, videos, message in (
        ("<image>What?", [], [], "1 <image> marks but no image; add the image or drop a mark"),
        ("<image><image>What?", [picture(1)], [], "2 <image> marks but 1 image"),
        ("<image>What?", ["absent.jpg"], [], "absent.jpg"),
        ("<image>What?", [str(tmp_path / "text.jpg")], [], r"text\.jpg"),
        ("<video>What?", [], [str(tmp_path / "empty.mp4")], r"empty\.mp4"),
        ("sheep " * 5000, [], [], r"tokens with this question, and the model's context is 4096; start anew"),
    ):
        with pytest.raises(UserError, match=message):
            chat.ask(question, images, videos)
        assert chat.history == before
    expected = fresh(model, processor, {"query": "And cats?", "history": before})
    assert chat.ask("And cats?") == expected


def test_an_interrupted_read_is_not_remembered(parts, monkeypatch):
    model, processor = parts
    chat = Chat(model, processor, settings=SHORT)
    chat.ask("How many sheep are there?")
    before = chat.history
    layer = model.language_model.model.layers[1]
    with monkeypatch.context() as patch:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(layer, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("And cats?")
    assert chat.history == before
    assert chat.ask("And cats?") == fresh(model, processor, {"query": "And cats?", "history": before})


def test_an_answer_ends_at_the_context_or_max_length_refuses(parts):
    model, processor = parts
    chat = Chat(model, processor, settings=Settings(max_new_tokens=5000), max_length=30)
    with pytest.raises(UserError, match=r"tokens with this question, and max_length is 30"):
        chat.ask("How many sheep are there? " * 5)
    with pytest.raises(UserError, match="max_new_tokens: expected at least 1, found 0"):
        Settings(max_new_tokens=0)
    with pytest.raises(UserError, match="temperature: expected at least 0"):
        Settings(temperature=-1)


def test_only_whole_characters_are_printed(parts):
    _, processor = parts
    for text in ("图中有四只羊。", "  a cat, \n and a dog  ", "é🐑 <ref>x</ref>"):
        decoder = StreamDecoder(processor)
        pieces = [decoder.add(token) for token in processor.tokenizer.encode(text)]
        pieces.append(decoder.rest())
        assert "".join(pieces) == decoder.text == text.strip()
        assert not any("�" in piece for piece in pieces)
    cut = processor.tokenizer.encode("羊")[:1]
    decoder = StreamDecoder(processor)
    assert decoder.add(cut[0]) == "" and decoder.rest() == "�"


def test_the_functions_of_the_document(parts):
    model, processor = parts
    response, history = inference(model, processor, "<image>How far?", images=[picture(1)], settings=SHORT)
    row = {"query": "<image>How far?", "images": [picture(1)]}
    assert history == [["<image>How far?", response]] and response == fresh(model, processor, row)
    said = list(inference_stream(model, processor, "Which is it?", [["How far?", response]], settings=SHORT))
    assert [len(answer) for answer, _ in said] == sorted(len(answer) for answer, _ in said)
    answer, history = said[-1]
    assert history == [["How far?", response], ["Which is it?", answer]]
    assert answer == fresh(model, processor, {"query": "Which is it?", "history": [["How far?", response]]})


def test_a_tag_after_a_backslash_is_plain_characters(parts):
    model, processor = parts
    chat = Chat(model, processor, settings=SHORT)
    question = r"Is this \<image> of HTML? \<video> and \<img>a\</img> too, <image>"
    answer = chat.ask(question, [picture(1)])
    message = chat._messages[0]
    texts = [part for part in message.parts if isinstance(part, str)]
    assert "".join(texts) == "Is this <image> of HTML? <video> and <img>a</img> too, "
    assert len(message.parts) - len(texts) == 1
    other = Chat(model, processor, settings=SHORT)
    assert "".join(other._answer(message)) == answer
    assert Chat(model, processor, settings=SHORT).ask(r"What is \<video>?") == fresh(
        model, processor, {"query": "What is <video>?"}
    )


def test_a_split_model_talks_as_the_whole_one(tmp_path):
    folder = tiny.write_checkpoint(tmp_path)
    processor = Processor.from_pretrained(folder)
    said = []
    for options in ({}, {"devices": ["cpu", "cpu"]}):
        chat = Chat(InternVL.from_pretrained(folder, **options), processor, settings=SHORT)
        said.append([chat.ask("<image>What is it?", [picture(1)]), chat.ask("Really?")])
    assert said[0] == said[1]


def test_an_answer_says_why_it_ended(parts, tmp_path):
    model, processor = parts
    chat = Chat(model, processor, settings=SHORT)
    chat.ask("How many sheep are there?")
    assert chat.finish_reason == "length"
    stream = chat.stream("And cats?")
    next(stream)
    assert chat.finish_reason is None
    stream.close()
    assert chat.finish_reason is None
    folder = tiny.write_checkpoint(tmp_path, llm={"max_position_embeddings": 40})
    short = Chat(InternVL.from_pretrained(folder), Processor.from_pretrained(folder), "Be short.")
    short.ask("Hi")
    assert short.finish_reason == "context"
    processor = Processor.from_pretrained(folder)
    processor.stop_ids = list(range(processor.config.llm["vocab_size"]))
    ended = Chat(short.model, processor, "Be short.")
    assert ended.ask("Hi") == "" and ended.finish_reason == "stop"


def test_a_processors_limit_leaves_nothing_out(parts):
    """What was asked first is still read, and a question beyond the context is refused in words."""
    model, processor = parts
    limited = copy(processor)
    limited.max_length = 120
    said = []
    for one in (processor, limited):
        chat = Chat(model, one, "", settings=SHORT)
        said.append([chat.ask("My number is 4711. " * 4), chat.ask("What is my number?"), chat.ask("Sure? " * 9)])
        assert chat.prefix_cache.tokens_read < 120 and len(chat.prefix_cache._keys) > 120
    assert said[0] == said[1] and limited.max_length == 120


def test_logits_that_are_not_finite_are_an_error_and_leave_no_trace(tmp_path):
    folder = tiny.write_checkpoint(tmp_path)
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder)
    chat = Chat(model, processor, settings=SHORT)
    first = chat.ask("How many sheep are there?")
    with torch.no_grad():
        norm = model.language_model.model.norm.weight
        kept = norm.clone()
        norm[0] = torch.nan
        with pytest.raises(UserError, match="not finite in float32: its weights hold NaN"):
            chat.ask("And cats?")
        assert chat.history == [["How many sheep are there?", first]]
        norm.copy_(kept)
    assert chat.ask("And cats?") == fresh(model, processor, {"query": "And cats?", "history": chat.history[:1]})
