"""Tools in rows: list, calls and results as texts of the turns, and the same from every spelling."""

import json
from dataclasses import replace

import pytest
from jinja2 import Environment

from ivl.data.processor import Processor
from ivl.data.rows.formats import parse
from ivl.data.text.template import TEMPLATES, Thoughts, written
from ivl.types import IGNORE, Media, UserError
from tests.tiny import write_checkpoint

TOOL = {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
ARGUMENTS = {"city": "Zürich"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
RESULT = "<tool_response>\n9 degrees\n</tool_response>"

OPENAI = {
    "tools": [WRAPPED],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it cold?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": "9 degrees"},
        {"role": "assistant", "content": "Yes."},
    ],
}
SWIFT = {
    "tools": json.dumps([TOOL]),
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it cold?"},
        {"role": "tool_call", "content": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
        {"role": "tool_response", "content": "9 degrees"},
        {"role": "assistant", "content": "Yes."},
    ],
}
SHAREGPT = {
    "tools": [json.dumps(TOOL)],
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Is it cold?"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
        {"from": "observation", "value": "9 degrees"},
        {"from": "gpt", "value": "Yes."},
    ],
}

QWEN = (
    r"{{ '<|im_start|>system\n' + messages[0].content + '\n\n# Tools\n\nYou may call one or more functions to assist "
    r"with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}"
    r"{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    r"{{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    r"<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}"
    r"\n</tool_call><|im_end|>\n' }}"
    r"{% for message in messages[1:] %}"
    r"{% if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}"
    r"{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    r"{% elif message.role == 'assistant' %}{{ '<|im_start|>' + message.role }}"
    r"{% if message.content %}{{ '\n' + message.content }}{% endif %}{% for call in message.tool_calls %}"
    r"{{ '\n<tool_call>\n{\"name\": \"' + call.name + '\", \"arguments\": ' }}{{ call.arguments | tojson }}"
    r"{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    r"{% elif message.role == 'tool' %}"
    r"{% if messages[loop.index0].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    r"{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    r"{% if loop.last or messages[loop.index0 + 2].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    r"{% endif %}{% endfor %}"
)
"""Qwen2.5's chat template, as far as rows with tools go"""


def as_qwen_writes_it(row):
    environment = Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    messages = [dict(message) for message in row["messages"]]
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        message["tool_calls"] = [call | {"arguments": json.loads(call["arguments"])} for call in calls]
    return environment.from_string(QWEN).render(messages=messages, tools=row["tools"])


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return Processor.from_pretrained(write_checkpoint(folder, template="internvl2_5", tokenizer="qwen3"))


def turns(row):
    return [(message.role, message.text) for message in parse(row).messages]


@pytest.mark.parametrize("row", [OPENAI, SWIFT, SHAREGPT], ids=["openai", "swift", "sharegpt"])
def test_every_spelling_is_the_same_conversation(row):
    conversation = parse(row)
    expected = [("user", "Is it cold?"), ("assistant", CALL), ("user", RESULT), ("assistant", "Yes.")]
    assert turns(row) == expected
    assert conversation.system == "Be brief." and conversation.tools == parse(OPENAI).tools
    assert conversation.tools.startswith("# Tools\n\n") and json.dumps(WRAPPED) in conversation.tools
    assert conversation.unread in ((), ("messages[].tool_calls[].id",))


def test_the_prompt_is_that_of_the_language_models_own_template(processor):
    call = OPENAI["messages"][2] | {"content": "I look it up."}
    call["tool_calls"] = [*call["tool_calls"], {"function": {"name": "weather", "arguments": '{"city": "Bern"}'}}]
    row = OPENAI | {"messages": [*OPENAI["messages"][:2], call, OPENAI["messages"][3], *OPENAI["messages"][3:]]}
    text = processor.tokenizer.decode(processor(row).input_ids)
    assert text == as_qwen_writes_it(row)


def test_calls_are_learnt_and_results_are_not(processor):
    example = processor(SWIFT)
    learnt = processor.tokenizer.decode(example.labels[example.labels != IGNORE])
    assert learnt == f"{CALL}<|im_end|>Yes.<|im_end|>"
    messages = [m | {"loss": False} if m["role"] == "tool_call" else m for m in SWIFT["messages"]]
    example = processor(SWIFT | {"messages": messages})
    assert processor.tokenizer.decode(example.labels[example.labels != IGNORE]) == "Yes.<|im_end|>"


def test_texts_and_calls_of_one_answer_and_results_of_one_turn_are_joined():
    call = {"role": "tool_call", "content": {"name": "weather", "arguments": ARGUMENTS}}
    result = {"role": "tool", "content": [{"type": "text", "text": "9 degrees"}]}
    said = {"role": "assistant", "content": "I look it up."}
    row = {"messages": [{"role": "user", "content": "q"}, said, call, call, result, result | {"content": {"wind": 3}}]}
    assert turns(row)[1:] == [
        ("assistant", f"I look it up.\n{CALL}\n{CALL}"),
        ("user", RESULT + '\n<tool_response>\n{"wind": 3}\n</tool_response>'),
    ]
    beside = said | {"tool_calls": [call["content"], call["content"]]}
    assert turns({"messages": [row["messages"][0], beside, *row["messages"][4:]]}) == turns(row)


def test_a_result_may_hold_a_picture():
    row = {"messages": [*SWIFT["messages"][:3], {"role": "tool", "content": "<image>"}], "images": ["a.jpg"]}
    expected = ("<tool_response>\n", Media("image", "a.jpg"), "\n</tool_response>")
    assert parse(row).messages[-1].parts == expected


def test_tools_without_a_system_turn_are_one(processor):
    row = {"system": False, "tools": [TOOL], "messages": SWIFT["messages"][1:]}
    text = processor.tokenizer.decode(processor(row).input_ids)
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou may call")


def test_a_result_is_no_question_after_which_thoughts_are_dropped():
    call = OPENAI["messages"][2] | {"reasoning_content": "Look."}
    row = {"messages": [*OPENAI["messages"][:2], call, *OPENAI["messages"][3:]]}
    template = replace(TEMPLATES["internvl2_5"], thoughts=Thoughts(in_history=False))
    assert f"<think>\nLook.\n</think>\n\n{CALL}" in written(parse(row), [], template, 0)
    later = {"messages": [*row["messages"], {"role": "user", "content": "Sure?"}]}
    assert "Look." not in written(parse(later), [], template, 0)


MISTAKES = [
    ({"tools": [3]}, r"tools\[0\]: expected an object with name and parameters, found 3"),
    ({"tools": "[{"}, "tools: not JSON"),
    ({"tools": {"name": "w"}}, "tools: expected a list of tools"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: a tool's result comes after"),
    ({"messages": [*SWIFT["messages"][:2], {"role": "tool_call", "content": "weather()"}]}, r"messages\[2\]: not JSON"),
    ({"messages": [*SWIFT["messages"][:2], {"role": "tool_call", "content": "{}"}]}, "expected a call as {name, argum"),
    (
        {"messages": [*SWIFT["messages"][:2], {"role": "tool_call", "content": '{"name": "w", "arguments": [1]}'}]},
        r"messages\[2\].arguments: expected an object",
    ),
    (
        {"messages": [*SWIFT["messages"][:3], SWIFT["messages"][3] | {"loss": True}]},
        "only an assistant's turn is learnt",
    ),
    (
        {"messages": [*SWIFT["messages"][:3], SWIFT["messages"][2] | {"loss": False}]},
        "its loss is not that of the turn it belongs to",
    ),
]


@pytest.mark.parametrize(("row", "words"), MISTAKES)
def test_a_mistake_is_named(row, words):
    with pytest.raises(UserError, match=words):
        parse({"messages": SWIFT["messages"]} | row)


def test_a_vocabulary_without_calls_refuses_them(tmp_path):
    processor = Processor.from_pretrained(write_checkpoint(tmp_path))
    with pytest.raises(UserError, match="tools: the vocabulary of this checkpoint has no <tool_call>"):
        processor(SWIFT)
    processor({"messages": SWIFT["messages"][1:2] + SWIFT["messages"][-1:]})
