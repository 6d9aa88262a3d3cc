"""HTML page of every answer of a file: picture, boxes, reference, score.

The page needs no network and no other files.

Only the rows in view are in the document, so thousands scroll and sort at once; all text is set as text, never as
markup, since a model wrote it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ImageOps

from ivl.eval.rules import Scored
from ivl.files import write_text
from ivl.picture_file import check_jpeg, check_size, open_picture, open_regular

Row = dict[str, Any]
SIDE = 192
"""Longest side of a picture on the page, in pixels"""
_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")


def write(path: Path, record: Mapping[str, Any], rows: Sequence[Row], scored: Scored) -> None:
    """Write the page of one file's answers; `record` as `ivl.eval.score.record` makes it."""
    pictures: dict[str, int] = {}
    shown: list[str | None] = []
    lines = []
    for row, score, parsed in zip(rows, scored.scores, scored.parsed):
        source = next((image for image in row.get("images") or [] if isinstance(image, str)), None)
        if source is not None and source not in pictures:
            pictures[source] = len(shown)
            shown.append(thumbnail(source))
        lines.append(
            {
                "id": row["id"],
                "category": str(row.get("category") or ""),
                "prompt": short_prompt(str(row.get("prompt") or row.get("query") or "")),
                "response": row["response"],
                "reasoning": row.get("reasoning") or "",
                "parsed": parsed if parsed != row["response"].strip() else "",
                "gold": _gold(row),
                "score": round(score, 4),
                "picture": None if source is None else pictures[source],
                "found": _boxes(row["response"]),
                "wanted": _wanted(row),
            }
        )
    file = record["files"][0]
    head = f"{record['title']}: {record['metric']} {file['score']:.2f} [{file['low']:.2f}, {file['high']:.2f}]"
    facts = f"{file['file']} · {record['mode']} · {len(rows)} rows · {record['post_processing']}"
    parts = {
        "TITLE": html.escape(head),
        "FACTS": html.escape(facts),
        "ROWS": _script(lines),
        "PICTURES": _script(shown),
    }
    page = re.sub("@(TITLE|FACTS|ROWS|PICTURES)@", lambda match: parts[match[1]], _PAGE)
    write_text(path, page)


def _script(value: Any) -> str:
    """Encode JSON that cannot end its script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def thumbnail(source: str) -> str | None:
    """Make a small JPEG of a picture, upright, as a data: URI. None where it is not here, too large, or damaged."""
    try:
        uri = source.startswith("data:")
        opened = io.BytesIO(base64.b64decode(source.split(",", 1)[1])) if uri else open_regular(source, source)
        with opened, open_picture(opened) as image:
            check_size(image.size, source[:80])
            if image.format == "JPEG":
                opened.seek(0)
                check_jpeg(opened.read())
                opened.seek(0)
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            reduced = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # noqa: BLE001  (decoders raise every kind there is)
        return None
    reduced.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    reduced.save(out, "JPEG", quality=60)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def short_prompt(prompt: str) -> str:
    """Write a prompt with each medium's tokens as one mark."""
    return re.sub(r"<img>(?:<IMG_CONTEXT>)*</img>", "<image>", prompt)


def _gold(row: Row) -> str:
    answers = row.get("answers")
    if isinstance(answers, list) and answers:
        return " | ".join(dict.fromkeys(map(str, answers)))
    if row.get("reference") is None and row.get("box"):
        return f"box {row['box']} in a picture of {row.get('size')}"
    return str(row.get("reference") or "")


def _boxes(text: str) -> list[list[float]]:
    """Boxes written in thousandths, as fractions."""
    return [[int(value) / 1000 for value in match] for match in _BOX.findall(text)]


def _wanted(row: Row) -> list[list[float]]:
    if row.get("box") and row.get("size"):
        width, height = row["size"]
        return [[round(value / side, 4) for value, side in zip(row["box"], (width, height) * 2)]]
    return _boxes(str(row.get("reference") or ""))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 15%, transparent); }
body { margin: 0; height: 100vh; display: flex; flex-direction: column; font: 14px/1.4 system-ui, sans-serif; }
header { padding: 10px 16px; border-bottom: 1px solid var(--line); }
h1 { font-size: 18px; margin: 0; }
input { font: inherit; width: 24em; max-width: 60vw; margin-right: 1em; }
.row, #heads { display: grid; gap: 12px; grid-template-columns: 5em 200px 10em repeat(3, minmax(0, 1fr)); }
#heads { padding: 6px 16px; border-bottom: 1px solid var(--line); }
#heads button { font: inherit; font-weight: 600; border: 0; padding: 0; background: none; text-align: left; }
#heads button { cursor: pointer; }
#list { flex: 1; overflow-y: auto; position: relative; contain: strict; }
#space { width: 1px; }
.row { position: absolute; left: 0; right: 0; height: 150px; box-sizing: border-box; padding: 6px 16px;
  border-bottom: 1px solid var(--line); overflow: hidden; cursor: pointer; }
.row > div { overflow: hidden; overflow-wrap: anywhere; white-space: pre-wrap; }
.row.wrong .score { color: #c62828; } .row.right .score { color: #2e7d32; } .score { font-weight: 600; }
.quiet { opacity: .65; font-size: 12px; }
.picture { position: relative; display: inline-block; }
.picture img { display: block; max-width: 192px; max-height: 138px; }
.box { position: absolute; border: 2px solid #e53935; box-sizing: border-box; } .box.wanted { border-color: #43a047; }
dialog { max-width: 70em; width: 80vw; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
<header>
  <h1>@TITLE@</h1>
  <p class="quiet">@FACTS@ · red: the answer's box, green: the expected one</p>
  <input id="search" type="search" placeholder="text in prompt, answer, reference, id or category">
  <span id="count"></span>
</header>
<div id="heads"></div>
<div id="list" tabindex="0"><div id="space"></div></div>
<dialog id="whole"></dialog>
<script type="application/json" id="rows">@ROWS@</script>
<script type="application/json" id="pictures">@PICTURES@</script>
<script>
"use strict";
const HEIGHT = 150, SPARE = 6;
const rows = JSON.parse(document.getElementById("rows").textContent);
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const list = document.getElementById("list"), space = document.getElementById("space");
const columns = [["score", "score"], ["picture", "picture"], ["id", "id"], ["prompt", "prompt"], ["answer", "response"],
  ["reference", "gold"]];
let view = rows, by = "score", down = false, drawn = "";
rows.forEach((row, n) => {
  row.place = n;
  row.text = [row.id, row.category, row.prompt, row.response, row.gold].join("\\n").toLowerCase();
});

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}
function picture(row) {
  const cell = element("div"), holder = element("div", "picture");
  if (row.picture === null || pictures[row.picture] === null) return element("div", "quiet", "no picture");
  const image = element("img");
  image.src = pictures[row.picture];
  image.alt = "";
  holder.append(image);
  for (const [boxes, name] of [[row.wanted, "box wanted"], [row.found, "box"]])
    for (const [left, top, right, bottom] of boxes) {
      const box = element("div", name);
      const sides = {left, top, width: right - left, height: bottom - top};
      for (const [side, value] of Object.entries(sides)) box.style[side] = 100 * value + "%";
      holder.append(box);
    }
  cell.append(holder);
  return cell;
}
function line(row, at) {
  const made = element("div", "row " + (row.score >= 1 ? "right" : row.score > 0 ? "" : "wrong"));
  made.style.top = at * HEIGHT + "px";
  const answer = element("div", "", row.response);
  if (row.parsed) answer.append(element("div", "quiet", "read as: " + row.parsed));
  const id = element("div", "", row.id);
  id.append(element("div", "quiet", row.category));
  made.append(element("div", "score", String(row.score)), picture(row), id, element("div", "quiet", row.prompt), answer,
    element("div", "", row.gold));
  made.onclick = () => open(row);
  return made;
}
function open(row) {
  const whole = document.getElementById("whole");
  whole.replaceChildren(picture(row), element("p", "quiet", row.prompt), element("p", "quiet", row.reasoning),
    element("p", "", row.response),
    element("p", "", "expected: " + row.gold), element("p", "score", "score " + row.score));
  whole.onclick = () => whole.close();
  whole.showModal();
}
function draw(force) {
  const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - SPARE);
  const last = Math.min(view.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + SPARE);
  if (!force && drawn === first + " " + last) return;
  drawn = first + " " + last;
  document.getElementById("heads").style.paddingRight = 16 + list.offsetWidth - list.clientWidth + "px";
  list.replaceChildren(space, ...view.slice(first, last).map((row, n) => line(row, first + n)));
}
function order() {
  const words = document.getElementById("search").value.toLowerCase();
  view = words ? rows.filter(row => row.text.includes(words)) : rows.slice();
  const sign = down ? -1 : 1;
  view.sort((a, b) => {
    const x = a[by] ?? -1, y = b[by] ?? -1;
    return sign * (x < y ? -1 : x > y ? 1 : 0) || a.place - b.place;
  });
  space.style.height = view.length * HEIGHT + "px";
  document.getElementById("count").textContent =
    `${view.length} rows, ${view.filter(row => row.score < 1).length} below full score`;
  for (const head of document.getElementById("heads").children)
    head.textContent = head.dataset.name + (head.dataset.by === by ? (down ? " ▼" : " ▲") : "");
  list.scrollTop = 0;
  draw(true);
}
for (const [name, key] of columns) {
  const head = element("button", "", name);
  head.dataset.name = name;
  head.dataset.by = key;
  head.onclick = () => { down = by === key && !down; by = key; order(); };
  document.getElementById("heads").append(head);
}
list.addEventListener("scroll", () => requestAnimationFrame(() => draw(false)), {passive: true});
addEventListener("resize", () => draw(true));
document.getElementById("search").addEventListener("input", order);
order();
</script>
</html>
"""
