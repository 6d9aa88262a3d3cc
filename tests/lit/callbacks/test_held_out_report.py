"""Page of held-out rows at the end of a fit."""

import io
import json

from PIL import Image

from ivl.lit.callbacks.held_out_report import HeldOutReport
from ivl.types import Conversation, Media, Message


def answered(index: int, text: str, reference: str | None = "yes", media: tuple[Media, ...] = ()) -> dict:
    messages = (Message("user", (*media, f"question {index}")),)
    row = Conversation(messages, id=f"r{index}", where=f"a.jsonl:{index}", reference=reference)
    return {"index": index, "row": row, "answer": text, "reasoning": None}


class Run:
    """What the callback asks of a run."""

    world_size, is_global_zero, global_step, fast_dev_run = 1, True, 7, False

    def __init__(self, folder, answers):
        self.log_dir, self.answers = str(folder), answers


def page(folder, answers, **options) -> str:
    run = Run(folder, answers)
    HeldOutReport(**options).on_fit_end(run, run)
    return (folder / "held_out.html").read_text()


def rows_of(text: str) -> list[dict]:
    return json.loads(text.partition('id="rows">')[2].partition("</script>")[0])


def test_pictures_in_cells_and_in_files_are_shown_and_prompts_are_left_out(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(data, "PNG")
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "a.png")
    pictures = [Media("image", data.getvalue()), Media("image", tmp_path / "a.png")]
    answers = [
        answered(1, "no", media=(pictures[1],)),
        answered(0, "Yes", media=(pictures[0],)),
        answered(2, "x", None),
    ]
    text = page(tmp_path, answers)
    assert [(row["id"], row["score"]) for row in rows_of(text)] == [("r0", 1), ("r1", 0)]
    assert text.count("data:image/jpeg;base64,") == 2
    assert "held-out rows after step 7: 2 rows" in text and "exact 50.0 [" in text


def test_of_many_rows_some_are_shown_and_all_are_counted(tmp_path):
    answers = [answered(n, "yes" if n % 4 else "no") for n in range(40)]
    text = page(tmp_path, answers, rows=10)
    assert [row["id"] for row in rows_of(text)] == [f"r{n}" for n in range(0, 40, 4)]
    assert "(10 of them here): 40 rows" in text and "exact 75.0 [" in text


def test_it_can_be_switched_off(tmp_path):
    run = Run(tmp_path, [answered(0, "yes")])
    HeldOutReport(rows=0).on_fit_end(run, run)
    assert not list(tmp_path.iterdir())
