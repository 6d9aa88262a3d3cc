"""The page of answers: what is in it, and how it behaves in a browser."""

import json
import os
import time

import pytest
from PIL import Image

from ivl.__main__ import run_command
from ivl.data.text.template import TEMPLATES
from ivl.eval.report import strip_template, thumbnail
from tests.eval.browser import CHROMIUM, Browser

EVIL = "</script><script>document.title = 'broken'</script><b>bold</b> @ROWS@"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """5,000 answers, two fifths of them wrong, over 50 pictures of which one is missing."""
    folder = tmp_path_factory.mktemp("report")
    for n in range(49):
        Image.new("RGB", (320, 200), (n * 5, 100, 200)).save(folder / f"{n}.jpg")
    rows = []
    for n in range(5000):
        box = [32, 20, 160, 100] if n % 5 < 3 else [200, 100, 300, 190]
        said = f"<ref>a</ref><box>[[100, 100, 500, 500]]</box> {n} {EVIL if n % 1000 == 3 else ''}"
        row = {"id": f"q{n:04d}", "prompt": f"<img><IMG_CONTEXT></img>\n{EVIL} {n}", "response": said, "box": box}
        rows.append(row | {"size": [320, 200], "category": "val", "images": [str(folder / f"{n % 50}.jpg")]})
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_command(
        "score", [str(folder / "p.jsonl"), "--task", "refcoco", "--html", str(folder / "r.html"), "--resamples", "50"]
    )
    return folder / "r.html"


def test_the_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 3 and text.count("</script>") == 3
    assert "http://" not in text and "https://" not in text and "src=" not in text.split("<script", 1)[0]
    assert "<img><IMG_CONTEXT>" not in text
    assert text.count("data:image/jpeg;base64,") == 49
    assert "RefCOCO: precision at IoU 0.5 60.00 [" in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_shown_without_its_template(name):
    t = TEMPLATES[name]
    system = f"{t.system}{t.system_message}{t.after_user}"
    first = f"{t.user}<image>\nHow many?{t.after_user}{t.answer}"
    assert strip_template(system + first) == strip_template(first) == "<image>\nHow many?"
    again = f"{system}{first}{t.lead}Two.{t.end}{t.gap}{t.user}Of what?{t.after_user}{t.answer}{t.prefill}"
    assert strip_template(again) == "user: <image>\nHow many?\nassistant: Two.\nuser: Of what?"
    assert strip_template("Where is <human>?") == "Where is <human>?" and strip_template("") == ""


def test_pictures_are_small_upright_and_may_be_missing(tmp_path):
    image = Image.new("RGB", (1000, 500))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "small.jpg").write_bytes(_bytes(thumbnail(str(tmp_path / "a.jpg"))))
    assert Image.open(tmp_path / "small.jpg").size == (96, 192)
    assert thumbnail(thumbnail(str(tmp_path / "a.jpg"))).startswith("data:image/jpeg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert thumbnail(str(tmp_path / "broken.jpg")) is None
    assert thumbnail(str(tmp_path / "missing.jpg")) is None


def test_a_row_may_name_anything(tmp_path):
    """Devices, pipes, folders, other formats and pictures that are too large are no pictures, at once."""
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.new("1", (40_000, 40_000)).save(tmp_path / "large.png")
    Image.new("1", (70_000, 10)).save(tmp_path / "wide.png")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(1 << 40)
    begun = time.monotonic()
    for name in ("/dev/zero", "/dev/stdin", "pipe.jpg", "large.png", "wide.png", "a.eps", "sparse.jpg", ".", "a\0b"):
        assert thumbnail(str(tmp_path / name)) is None
    assert thumbnail("data:image/png;base64,@@") is None
    assert time.monotonic() - begun < 5


def _bytes(uri):
    import base64

    return base64.b64decode(uri.split(",")[1])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_five_thousand_rows_in_a_browser(page, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(page)
        assert browser.evaluate("document.title").startswith("RefCOCO")
        assert browser.evaluate("document.getElementById('count').textContent") == "5000 rows, 2000 below full score"
        scores = "[...document.querySelectorAll('.row .score')].map(s => s.textContent)"
        ids = "[...document.querySelectorAll('.row')].map(r => r.children[2].firstChild.textContent)"
        assert set(browser.evaluate(scores)) == {"0"}  # failures first
        assert browser.evaluate(ids)[:3] == ["q0003", "q0004", "q0008"]
        assert EVIL in browser.evaluate("document.querySelector('.row').children[4].textContent")
        assert browser.evaluate("document.querySelectorAll('.row b').length") == 0
        left = "document.querySelector('.row .box:not(.wanted)').style.left"
        assert browser.evaluate(left) == "10%"
        assert browser.evaluate("document.querySelectorAll('.row').length") < 30

        click = "const t = performance.now(); head.click(); slowest = Math.max(slowest, performance.now() - t);"
        heads = "document.getElementById('heads').children"
        slowest = browser.evaluate(f"{{let slowest = 0; for (const head of {heads}) {{{click}}} slowest}}")
        assert slowest < 1000, f"sorting took {slowest:.0f} ms"
        browser.evaluate(f"{heads}[2].click(); {heads}[2].click()")
        first = browser.evaluate(ids)[0]
        browser.evaluate(f"{heads}[2].click()")
        assert {first, browser.evaluate(ids)[0]} == {"q0000", "q4999"}

        # The page's own work for a step of scrolling, layout included, of the best tenth: a busy machine slows any one.
        frames = """(async () => {
            const list = document.getElementById("list"), took = [];
            for (let n = 0; n < 100; n++) {
                const start = performance.now();
                list.scrollTop = n * 7000;
                draw(false);
                document.querySelector(".row").getBoundingClientRect();
                took.push(performance.now() - start);
            }
            list.scrollTop = 0;
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
            return took.sort((a, b) => a - b);
        })()"""
        took = browser.evaluate(frames)
        assert took[10] < 50, f"a step of scrolling took {took[10]:.0f} ms"
        assert browser.evaluate(ids)[0] in ("q0000", "q4999"), "scrolling alone draws the rows in view"
        assert browser.evaluate("document.querySelectorAll('.row').length") < 30

        find = "const s = document.getElementById('search'); s.value = 'q0042'; s.dispatchEvent(new Event('input'))"
        browser.evaluate(find)
        assert browser.evaluate(ids) == ["q0042"]
        browser.evaluate("document.querySelector('.row').click()")
        assert browser.evaluate("document.getElementById('whole').open")
        time.sleep(0.2)
        assert browser.errors == []
        assert [url for url in browser.fetched if not url.startswith("data:")] == [page.as_uri()]
    finally:
        browser.close()
