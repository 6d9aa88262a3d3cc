"""`chat_template`: a prompt template as Jinja, for other programs and for -hf folders.

Its rendering equals `ivl.data.text.template.written`, for messages whose content is a text or a list of parts.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from ivl.architecture.config import Config, read_json
from ivl.data.text.template import TEMPLATES, Template, Thoughts, written
from ivl.data.text.tokenizer import Tokenizer
from ivl.reasoning import BEGUN, CLOSED, CLOSING
from ivl.system_text import NONE
from ivl.types import Conversation, Message, UserError

RELEASED_MARKS = ("<image>", "<video>")
"""Marks of media in a text: vLLM and lmdeploy replace them, as the released `chat` does"""

# A part after a medium begins a new line, as in `ivl.data.rows.formats`.
_JINJA = """\
{%- macro words(content) -%}
{%- if content is string -%}{{ content MARKS }}
{%- elif content -%}
{%- set last = namespace(medium=false) -%}
{%- for part in content -%}
{%- if part['type'] == 'text' -%}
{%- if last.medium and not part['text'].startswith('\\n') -%}{{ '\\n' }}{%- endif -%}
{{ part['text'] }}{%- set last.medium = false -%}
{%- else -%}
{%- if last.medium -%}{{ '\\n' }}{%- endif -%}
{{ VIDEO if 'video' in part['type'] else IMAGE }}{%- set last.medium = true -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ BOS }}
{%- set trains = messages and messages[-1]['role'] == 'assistant' -%}
{%- set seen = namespace(user=false, question=-1) -%}
{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set seen.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if not messages or messages[0]['role'] != 'system' -%}{{ DEFAULT }}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ SYSTEM ~ words(message['content']) ~ AFTER_USER }}
{%- elif message['role'] == 'assistant' -%}
{%- if EVERY or seen.user -%}
{%- set text = (words(message['content']) STRIP) -%}
{%- set thought = message['reasoning_content'] -%}
{%- set earlier = loop.index0 < seen.question -%}
REWRITE
{%- if thought EMPTY -%}
{%- set text = OPENING ~ (thought or '').strip('\\n') ~ CLOSING ~ text.lstrip('\\n') -%}
{%- endif -%}
{{ ANSWER }}{%- if text or (EVERY and trains) -%}{{ LEAD ~ text ~ END ~ GAP }}{%- endif -%}
{%- endif -%}
{%- else -%}{%- set seen.user = true -%}{{ USER ~ (words(message['content']) STRIP) ~ AFTER_USER }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ ANSWER }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ CLOSED }}
{%- else -%}{{ PREFILL }}{%- endif -%}
{%- endif -%}
"""
_REWRITE = """\
{%- if not thought and '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1] -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if earlier -%}{%- set thought = '' -%}{%- endif -%}
"""
"""Thoughts of answers in the text, where the template writes them anew (`Thoughts.in_history`)"""


def chat_template(
    template: Template, tokenizer: Tokenizer, system_message: str, marks: tuple[str, str] = RELEASED_MARKS
) -> str:
    """The Jinja text. `system_message`: for conversations without one; NONE: they have no system turn. `marks`: of an
    image and of a video.

    It begins with the token a text begins with where the tokenizer adds one, since programs that render a
    template do not add it themselves.
    """
    replaced = [(old, new) for old, new in zip(RELEASED_MARKS, marks) if old != new]
    thoughts = template.thoughts
    texts = {
        "AFTER_USER": template.after_user,
        "DEFAULT": "" if system_message == NONE else template.system + system_message + template.after_user,
        "OPENING": thoughts.opening,
        "CLOSING": thoughts.closing,
        "CLOSED": CLOSED,
        "SYSTEM": template.system,
        "USER": template.user,
        "ANSWER": template.answer,
        "PREFILL": template.prefill,
        "LEAD": template.lead,
        "END": template.end,
        "GAP": template.gap,
        "BOS": opening(template, tokenizer),
        "IMAGE": marks[0],
        "VIDEO": marks[1],
    }
    holes = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    holes["MARKS"] = "".join(f".replace({json.dumps(old)}, {json.dumps(new)})" for old, new in replaced)
    holes[" STRIP"] = " | trim if trains else words(message['content'])" if template.strip else ""
    holes["EVERY"] = json.dumps(template.every_turn)
    holes["REWRITE"] = "" if thoughts.in_history else _REWRITE.replace("\n", "")
    holes[" EMPTY"] = " or not earlier" if thoughts.empty else ""
    return _filled(_JINJA.replace("\n", ""), holes)


def _filled(text: str, holes: dict[str, str]) -> str:
    """Replace the names of `holes` in one pass: a text that is put in is not searched for holes."""
    names = sorted(holes, key=len, reverse=True)
    return re.sub("|".join(rf"{re.escape(n)}\b" for n in names), lambda m: holes[m.group()], text)


def opening(template: Template, tokenizer: Tokenizer) -> str:
    """Text before a conversation's first words: the begin token where the tokenizer adds one, else empty.

    Phi-3's tokenizer puts a blank after it where no special token follows.
    """
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    text = "" if bos is None else tokenizer.token_bytes(bos).decode()
    wanted = tokenizer.encode(template.system, bos=True)
    return next((t for t in (text, text + " ") if tokenizer.encode(t + template.system) == wanted), text)


# The way back: from a folder's Jinja text to the entry of TEMPLATES that renders the same

_PROBE = Conversation((Message("user", (" q ",)), Message("assistant", (" a ",))), system="s")
USUAL = {"Qwen2ForCausalLM": "internvl2_5", "Qwen3ForCausalLM": "internvl2_5"}
"""Language model → template, where a -hf folder has no chat template: InternVL3 and 3.5 are the released ones"""


def recognised(folder: Path, config: Config) -> Config:
    """Config of a -hf folder, completed from its chat template: `template`, `system_message`, `answer_prefill`.

    `system_message` None: the folder's template renders none by itself, as the released -hf folders. The default of
    TEMPLATES is used then, since the models were trained with it. Raises UserError where no known template renders the
    same text.
    """
    text, where = _read_chat_template(folder)
    if text is None:
        if config.llm_architecture in USUAL:
            return replace(config, template=USUAL[config.llm_architecture])
        raise UserError(
            f"{folder}: no chat_template.jinja, and its language model ({config.llm_architecture}) does not tell the "
            f"template; add the file from the model's page"
        )
    render = _Rendered(text, where)
    messages = [{"role": message.role, "content": message.text} for message in _PROBE.messages]
    rendered = render([{"role": "system", "content": _PROBE.system}, *messages])
    for row in TEMPLATES.values():
        template = replace(row, thoughts=_thoughts(render, row.answer))
        expected = written(_PROBE, (), template, 0)
        if rendered.endswith(expected):
            break
    else:
        raise UserError(
            f"{where}: renders {rendered!r}, which no template of this program does; it knows {', '.join(TEMPLATES)}"
        )
    before = render(messages).split(row.user)[0].removeprefix(rendered.removesuffix(expected))
    system = None
    if before.startswith(row.system) and before.endswith(row.after_user):
        system = before.removeprefix(row.system).removesuffix(row.after_user)
    _, opened, prefill = render(messages[:1], prompt=True).rpartition(row.answer)
    return replace(config, template=row.name, system_message=system, answer_prefill=prefill if opened else "")


def thoughts_of(folder: Path, config: Config, template: Template) -> Thoughts:
    """Rules for thoughts of a folder's own chat template; the usual ones where it has none, or knows no thoughts.

    In the released layout chat_template.jinja alone counts: the key of tokenizer_config.json is often left over from
    the language model (Qwen's own), and the releases' chat and trainers look at neither. Raises UserError where the
    chat template cannot be rendered.
    """
    text, where = _read_chat_template(folder)
    if config.layout == "released" and where.name != "chat_template.jinja":
        return template.thoughts
    if text is None or ("think" not in text and "reasoning_content" not in text):
        return template.thoughts
    return _thoughts(_Rendered(text, where), template.answer)


_THOUGHT, _ANSWER = "THOUGHT-7f3a", "ANSWER-7f3a"


def _thoughts(render: _Rendered, before_answer: str) -> Thoughts:
    """Rules for thoughts that a chat template renders. `before_answer`: text before every answer."""
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": _ANSWER}
    marked = answer | {"content": f"{BEGUN}{_THOUGHT}\n{CLOSING}\n\n{_ANSWER}"}
    in_history = _THOUGHT in render([question, marked, question])
    apart = render([question, answer | {"reasoning_content": _THOUGHT}])
    plain = render([question, answer]).partition(_ANSWER)[0].rpartition(before_answer)[2]
    head, thought, tail = apart.partition(_THOUGHT)
    if not thought or _ANSWER not in tail:
        return replace(Thoughts(), in_history=in_history)
    opening, closing = head.rpartition(before_answer)[2], tail.partition(_ANSWER)[0]
    return Thoughts(opening, closing, in_history, plain == opening + closing)


def _read_chat_template(folder: Path) -> tuple[str | None, Path]:
    """Chat template of a folder, None where it has none, and its path; transformers has had four places for it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), path
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and isinstance(text := read_json(path).get("chat_template"), str):
            return text, path
    return None, folder


class _Rendered:
    """Function that renders a chat template in transformers' sandbox: it can reach nothing but its messages."""

    def __init__(self, text: str, where: Path) -> None:
        self.text, self.where = text, where

    def __call__(self, messages: list[dict], prompt: bool = False) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template([messages], chat_template=self.text, add_generation_prompt=prompt)[0][0]
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"{self.where}: cannot be rendered ({error}); restore it from the model's page") from error
