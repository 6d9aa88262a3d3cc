"""Tools in rows: their list, calls and results as text, in the form that Qwen's language models were trained with.

    list      behind the system text, from `# Tools` on
    call      <tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>, in the assistant's turn, which is learnt
    result    <tool_response>\\n…\\n</tool_response>, in a user's turn, which is not

Several calls, or results, that follow one another are one turn, a line each. Source of the texts: the chat template of
Qwen2.5, which ms-swift writes as `hermes`.
"""

from __future__ import annotations

import json
from typing import Any

from ivl.data.rows.draft import Turn
from ivl.types import Media, UserError, shortened

CALL, RESULT = "<tool_call>", "<tool_response>"

ROLES = {
    **dict.fromkeys(("tool", "tool_response", "observation", "function"), RESULT),
    **dict.fromkeys(("tool_call", "function_call"), CALL),
}
"""Name of a speaker in rows of several programs → the mark of what it says"""

_LIST = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def tools_text(value: Any) -> str:
    """Text of a row's list of tools: objects, or the JSON of them. Empty where there are none."""
    tools = _json(value, "tools") if isinstance(value, str) and value.strip() else value
    if not tools:
        return ""
    if not isinstance(tools, (list, tuple)):
        raise UserError(f"tools: expected a list of tools, found {shortened(tools)}")
    entries = [_json(tool, f"tools[{n}]") for n, tool in enumerate(tools)]
    for n, tool in enumerate(entries):
        if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
            raise UserError(f"tools[{n}]: expected an object with name and parameters, found {shortened(tool)}")
    full = [
        tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in entries
    ]
    return _LIST.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in full))


def call_text(value: Any, name: str) -> str:
    """Text of a call: `{name, arguments}`, one within OpenAI's `function`, or the JSON of it.

    Raises UserError that begins with `name`.
    """
    call = _json(value, name)
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f"{name}: expected a call as {{name, arguments}}, found {shortened(value)}")
    arguments = call.get("arguments", call.get("parameters"))
    arguments = {} if arguments is None or arguments == "" else _json(arguments, f"{name}.arguments")
    if not isinstance(arguments, dict):
        raise UserError(f"{name}.arguments: expected an object, found {shortened(arguments)}")
    body = json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)
    return f"{CALL}\n{body}\n</tool_call>"


def result_parts(content: list[str | Media]) -> list[str | Media]:
    """Content of a tool's result between its marks."""
    return [f"{RESULT}\n", *content, "\n</tool_response>"]


def calls_of(entry: dict[str, Any], name: str) -> list[str]:
    """Texts of the calls beside an assistant's text, OpenAI's `tool_calls`."""
    calls = entry.get("tool_calls") or []
    calls = _json(calls, f"{name}.tool_calls") if isinstance(calls, str) else calls
    if not isinstance(calls, (list, tuple)):
        raise UserError(f"{name}.tool_calls: expected a list of calls, found {shortened(calls)}")
    return [call_text(call, f"{name}.tool_calls[{n}]") for n, call in enumerate(calls)]


def add_turn(turns: list[Turn], turn: Turn, name: str) -> None:
    """Add a turn. A call joins the assistant's turn before it, and a result the result before it, on a line of its own.

    Raises UserError for a result without a call or an answer before it.
    """
    last = turns[-1] if turns else None
    if turn.is_tool and turn.role == "user" and last is None:
        raise UserError(f"{name}: a tool's result comes after the assistant's call; write the call before it")
    joins = last is not None and turn.is_tool and last.role == turn.role and (turn.role == "assistant" or last.is_tool)
    if last is None or not joins:
        turns.append(turn)
        return
    if last.learnt != turn.learnt:
        raise UserError(f"{name}: its loss is not that of the turn it belongs to, the one before; write the same")
    ends = last.content[-1] if last.content else ""
    last.content += ["\n" * (bool(ends) and not str(ends).endswith("\n")), *turn.content]
    last.is_tool = True


def _json(value: Any, name: str) -> Any:
    """Value of a JSON text; another value as it is. Raises UserError that begins with `name`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name}: not JSON ({error}); expected an object, such as {{"name": …}}') from None
