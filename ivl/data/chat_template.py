"""A prompt template in the form other programs render: `chat_template`, Jinja over a list of messages.

What it renders equals `ivl.data.template.written`, for messages whose content is a text or a list of parts.
"""

from __future__ import annotations

import json
import re

from ivl.data.template import Template
from ivl.data.tokenizer import Tokenizer

RELEASED_MARKS = ("<image>", "<video>")
"""What stands for a medium in a text: vLLM and lmdeploy replace it, as the released `chat` does"""

# A text after a medium begins a new line, as in `ivl.data.formats`.
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
{{ VIDEO if 'video' in part['type'] else IMAGE }}{%- set last.medium = true -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ BOS }}
{%- if not messages or messages[0]['role'] != 'system' -%}{{ SYSTEM ~ DEFAULT ~ AFTER_USER }}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ SYSTEM ~ words(message['content']) ~ AFTER_USER }}
{%- elif message['role'] == 'assistant' -%}
{%- set text = words(message['content']) STRIP -%}
{{ ANSWER }}{%- if text -%}{{ LEAD ~ text ~ END ~ GAP }}{%- endif -%}
{%- else -%}{{ USER ~ words(message['content']) STRIP ~ AFTER_USER }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ANSWER }}{%- endif -%}
"""


def chat_template(
    template: Template, tokenizer: Tokenizer, system_message: str, marks: tuple[str, str] = RELEASED_MARKS
) -> str:
    """The Jinja text. `system_message`: for conversations without one. `marks`: of an image and of a video.

    It begins with the token a text begins with where the tokenizer adds one, since programs that render a
    template do not add it themselves.
    """
    replaced = [(old, new) for old, new in zip(RELEASED_MARKS, marks) if old != new]
    texts = {
        "AFTER_USER": template.after_user,
        "DEFAULT": system_message,
        "SYSTEM": template.system,
        "USER": template.user,
        "ANSWER": template.answer,
        "LEAD": template.lead,
        "END": template.end,
        "GAP": template.gap,
        "BOS": opening(template, tokenizer),
        "IMAGE": marks[0],
        "VIDEO": marks[1],
    }
    holes = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    holes["MARKS"] = "".join(f".replace({json.dumps(old)}, {json.dumps(new)})" for old, new in replaced)
    holes[" STRIP"] = " | trim" if template.strip else ""
    return _filled(_JINJA.replace("\n", ""), holes)


def _filled(text: str, holes: dict[str, str]) -> str:
    """In one pass, so that no text is read for holes."""
    names = sorted(holes, key=len, reverse=True)
    return re.sub("|".join(rf"{re.escape(n)}\b" for n in names), lambda m: holes[m.group()], text)


def opening(template: Template, tokenizer: Tokenizer) -> str:
    """What stands before a conversation's first words: what the tokenizer puts before a text, written out.

    Phi-3's puts a blank after it where no special token follows.
    """
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    text = "" if bos is None else tokenizer.token_bytes(bos).decode()
    wanted = tokenizer.encode(template.system, bos=True)
    return next((t for t in (text, text + " ") if tokenizer.encode(t + template.system) == wanted), text)
