"""The template of a -hf folder, found in what its own Jinja text renders."""

import json
import shutil

import pytest

from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.data.text.template import TEMPLATES, find_template
from ivl.options import LoRA, Tune
from ivl.system_text import R1
from ivl.types import UserError
from tests.commands.test_export import write_run
from tests.tiny import FAMILIES, write_checkpoint

# As transformers' convert_internvl_weights_to_hf.py writes it into the released -hf folders
PUBLISHED = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
ROW = {"query": "<image>\n Which? ", "response": " A cat. ", "history": [["One", "two"]], "images": ["a.png"]}


def as_hf(tmp_path, architecture="Qwen2ForCausalLM", **settings):
    base = write_checkpoint(tmp_path / "base", architecture, **settings)
    return base, export(str(tmp_path / "hf"), base=str(base), layout="hf")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_rows_become_the_same_in_either_layout(tmp_path, architecture):
    from PIL import Image

    Image.new("RGB", (130, 60), "red").save(tmp_path / "a.png")
    settings = {"overrides": {"system_message": "Be brief.", "max_dynamic_patch": 5}}
    base, hf = as_hf(tmp_path, architecture, **settings)
    ours, theirs = Processor.from_pretrained(base), Processor.from_pretrained(hf)
    assert theirs.template == ours.template and theirs.system_message == ours.system_message == "Be brief."
    assert theirs.max_tiles == ours.max_tiles == 5
    one, two = (processor(ROW, root=tmp_path) for processor in (ours, theirs))
    assert one.input_ids.tolist() == two.input_ids.tolist() and one.labels.tolist() == two.labels.tolist()
    assert (one.tiles == two.tiles).all() and theirs.stop_ids == ours.stop_ids


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", None])
def test_the_released_template_wherever_it_stands(tmp_path, place):
    """It renders no system message of its own: the one that the models were trained with stands."""
    _, hf = as_hf(tmp_path, template="Hermes-2")
    (hf / "chat_template.jinja").unlink()
    if place == "chat_template.jinja":
        (hf / place).write_text(PUBLISHED)
    elif place:
        old = json.loads((hf / place).read_text()) if (hf / place).is_file() else {}
        (hf / place).write_text(json.dumps(old | {"chat_template": PUBLISHED}))
    found = Processor.from_pretrained(hf)
    assert found.template.name == "internvl2_5"
    assert found.system_message == find_template("internvl2_5").system_message


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_is_told_from_the_others(tmp_path, name):
    style = {"phi3-chat": "Phi3ForCausalLM", "internvl_zh": "InternLM2ForCausalLM"}.get(name, "InternLM2ForCausalLM")
    base = write_checkpoint(tmp_path / "base", style, template=name)
    processor = Processor.from_pretrained(base)
    from ivl.data.text.jinja_template import chat_template, recognised

    (base / "chat_template.jinja").write_text(chat_template(processor.template, processor.tokenizer, "Hello."))
    found = recognised(base, processor.config)
    assert (found.template, found.system_message, found.answer_prefill) == (name, "Hello.", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "renders '[s][ q ][ a ]', which no template"),
        ("{% for m in %}", "cannot be rendered"),
        ("{{ messages[0].role.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered"),
    ],
)
def test_a_template_that_is_none_of_ours(tmp_path, text, message):
    _, hf = as_hf(tmp_path)
    (hf / "chat_template.jinja").write_text(text)
    with pytest.raises(UserError, match=r"chat_template\.jinja: ") as caught:
        Processor.from_pretrained(hf)
    assert message in str(caught.value)


def test_no_template_at_all(tmp_path):
    base, hf = as_hf(tmp_path, "LlamaForCausalLM")
    (hf / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat_template.jinja, and its language model \(LlamaForCausalLM\)"):
        Processor.from_pretrained(hf)
    shutil.rmtree(base)


THINKING = PUBLISHED.replace("assistant\n' }}", "assistant\n<think>\n' }}")


@pytest.mark.parametrize("layout", ["hf", "released"])
def test_a_template_that_opens_the_answer_with_a_thought(tmp_path, layout):
    """A prompt is transformers' own; an answer that a row brings is written as it stands; exports keep it."""
    from transformers import AutoProcessor

    _, hf = as_hf(tmp_path, "Qwen3ForCausalLM")
    (hf / "chat_template.jinja").write_text(THINKING)
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "How many?"}]
    theirs = AutoProcessor.from_pretrained(hf).apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    folder = export(str(tmp_path / "again"), base=str(hf), layout=layout)
    for place in (hf, folder):
        processor = Processor.from_pretrained(place)
        assert processor({"messages": messages}).input_ids.tolist() == theirs["input_ids"][0]
        answered = [*messages, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nTwo."}]
        text = processor.tokenizer.decode(processor({"messages": answered}).input_ids)
        assert text.count("<think>") == 1 and text.endswith("</think>\n\nTwo.<|im_end|>\n")
    path = folder / "chat_template.jinja"
    assert "<think>" in (path if path.is_file() else folder / "tokenizer_config.json").read_text()


QWEN3 = (
    """\
{%- set ns = namespace(last=messages|length - 1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else -%}
{%- set content = m.content -%}{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{ '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else -%}{{ '<|im_start|>assistant\\n' + content }}
{%- endif -%}{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
""".replace("\n{%", "{%")
    .replace("\n{{", "{{")
    .replace("%}\n", "%}")
)
ASKED = {"role": "user", "content": "How many?"}
APART = {"role": "assistant", "content": "Four.", "reasoning_content": "Three\nand one."}
INSIDE = {"role": "assistant", "content": "<think>\nAs before.\n</think>\n\nFour."}
PLAIN = {"role": "assistant", "content": "Four."}
TALKS = [
    [ASKED, APART], [ASKED, INSIDE], [ASKED, PLAIN], [ASKED, APART, ASKED], [ASKED, INSIDE, ASKED, PLAIN],
    [ASKED, PLAIN, ASKED, APART, ASKED, INSIDE],
]  # fmt: skip


def test_a_thinking_prompt_has_the_ids_of_transformers(tmp_path):
    from transformers import AutoProcessor

    base, hf = as_hf(tmp_path, "Qwen3ForCausalLM")
    messages = [{"role": "system", "content": R1}, {"role": "user", "content": "<tool_response>18</tool_response>"}]
    theirs = AutoProcessor.from_pretrained(hf).apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    for folder in (base, hf):
        processor = Processor.from_pretrained(folder)
        assert processor({"messages": messages}).input_ids.tolist() == theirs["input_ids"][0]
        assert processor.tokenizer.token_id("<think>") in theirs["input_ids"][0]


def text_of(processor: Processor, messages: list) -> str:
    return processor.tokenizer.decode(processor({"messages": messages}).input_ids)


@pytest.mark.parametrize("layout", ["released", "hf"])
def test_thoughts_as_the_folders_own_template_writes_them(tmp_path, layout):
    """Qwen3's: apart from the answer, out of the history, and an empty one where there is none; exports keep it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    base = write_checkpoint(tmp_path / "base", "Qwen3ForCausalLM")
    folder = export(str(tmp_path / "hf"), base=str(base), layout="hf") if layout == "hf" else base
    (folder / "chat_template.jinja").write_text(QWEN3)
    again = [export(str(tmp_path / f"to {form}"), base=str(folder), layout=form) for form in ("released", "hf")]
    for place in (folder, *again):
        processor = Processor.from_pretrained(place, system_message="none")
        for messages in TALKS:
            prompt = messages[-1]["role"] == "user"
            rendered, _ = render_jinja_template([messages], chat_template=QWEN3, add_generation_prompt=prompt)
            assert text_of(processor, messages) == rendered[0]
    default = Processor.from_pretrained(folder)
    assert default.system_message == find_template("internvl2_5").system_message


def test_a_template_left_over_from_the_language_model_changes_no_row(tmp_path):
    """Qwen's own, in tokenizer_config.json of a release: the official trainer does not look at it."""
    base = write_checkpoint(tmp_path, "Qwen3ForCausalLM")
    rows = [Processor.from_pretrained(base)({"messages": messages}) for messages in TALKS]
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": QWEN3}))
    again = Processor.from_pretrained(base)
    assert [again({"messages": m}).labels.tolist() for m in TALKS] == [row.labels.tolist() for row in rows]


def test_the_released_template_keeps_thoughts_in_the_history(tmp_path):
    processor = Processor.from_pretrained(write_checkpoint(tmp_path, "Qwen3ForCausalLM"))
    assert processor.template.thoughts == find_template("internvl2_5").thoughts
    assert "As before." in text_of(processor, [ASKED, INSIDE, ASKED])


@pytest.mark.parametrize("layout", ["released", "hf"])
@pytest.mark.parametrize("system", ["none", "", "Be brief.", "r1", None])
def test_a_server_writes_the_system_turn_that_was_trained(tmp_path, layout, system):
    """And so does this program, with the export: a turn without words is not the same as no turn."""
    from transformers.utils.chat_template_utils import render_jinja_template

    base = write_checkpoint(tmp_path / "base", "Qwen3ForCausalLM")
    run = tmp_path / "run"
    write_run(run, base, Tune(language_model=LoRA(rank=2)), {"system_message": system})
    folder = export(str(tmp_path / "out"), run=str(run), layout=layout)
    template = find_template("internvl2_5")
    words = {"r1": R1, None: template.system_message}.get(system, system)
    turn = "" if system == "none" else f"<|im_start|>system\n{words}<|im_end|>\n"
    prompt = turn + "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    jinja = (folder / "chat_template.jinja").read_text()
    assert render_jinja_template([[ASKED]], chat_template=jinja, add_generation_prompt=True)[0][0] == prompt
    processor = Processor.from_pretrained(folder)
    assert text_of(processor, [ASKED]) == prompt
    if layout == "released":
        raw = json.loads((folder / "config.json").read_text())
        assert raw.get("system_message", template.system_message) == ("" if system == "none" else words)


@pytest.mark.parametrize("thinking", [True, False, None])
def test_an_answer_that_begins_with_a_thought_or_without(tmp_path, thinking):
    from transformers.utils.chat_template_utils import render_jinja_template

    base = write_checkpoint(tmp_path / "base", "Qwen3ForCausalLM")
    run = tmp_path / "run"
    write_run(run, base, Tune(language_model=LoRA(rank=2)), {"thinking": thinking})
    folder = export(str(tmp_path / "out"), run=str(run))
    begun = {True: "<think>\n", False: "<think>\n\n</think>\n\n", None: ""}[thinking]
    jinja = (folder / "chat_template.jinja").read_text()
    for processor in (Processor.from_pretrained(base, thinking=thinking), Processor.from_pretrained(folder)):
        text = text_of(processor, [ASKED])
        assert text.endswith("<|im_start|>assistant\n" + begun)
        assert text == render_jinja_template([[ASKED]], chat_template=jinja, add_generation_prompt=True)[0][0]
    off = render_jinja_template([[ASKED]], chat_template=jinja, add_generation_prompt=True, enable_thinking=False)
    assert off[0][0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_null_system_message_is_the_templates_text(tmp_path):
    """InternVL3's config.json has it; other readers would write the word None, so the export leaves it out."""
    base = write_checkpoint(tmp_path / "base", template="internvl2_5", overrides={"system_message": None})
    assert Processor.from_pretrained(base).system_message == find_template("internvl2_5").system_message
    folder = export(str(tmp_path / "out"), base=str(base))
    assert "system_message" not in json.loads((folder / "config.json").read_text())
