"""benchmarks/released.py: what is published passes, anything else fails and is shown."""

import base64
import importlib
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from ivl import InternVL, Processor
from ivl.commands.export import export
from tests.tiny import write_checkpoint

ROOT = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def released(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("released")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("released")
    base = write_checkpoint(root / "base", "Qwen2ForCausalLM", template="internvl2_5")
    return export(str(root / "hf"), base=str(base), layout="hf")


@pytest.fixture
def images(tmp_path) -> Path:
    for url in ("000000039769.jpg", "view.jpg", "australia.jpg"):
        Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(tmp_path / url)
    return tmp_path


def test_the_prompt_is_that_of_transformers_tests(released, folder, images):
    from ivl.data.text.template import written

    processor = Processor.from_pretrained(folder)
    case = released.CASES["InternVL3-1B-hf"][0]
    conversation = processor.parse(released.row_of(case, images))
    assert written(conversation, [[1]], processor.template, 1) == (
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nPlease describe the image explicitly.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_run_of_it_on_a_tiny_model(released, folder, images, capsys, monkeypatch):
    """A published answer and logits of the model itself pass; its status says so."""
    model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder)
    blank = released.Case("What is it?", released.VIEW, tokens=4)
    batch = processor.collate([processor(released.row_of(blank, images))])
    answer = processor.decode(model.generate(batch, max_new_tokens=4)[0])
    logits = tuple(model(batch.input_ids, tiles=batch.tiles).logits[0, -1, :5].tolist())
    right = released.Case("What is it?", released.VIEW, ("another", answer), 4, logits, 1e-4)
    wrong = released.Case("What is it?", released.VIEW, (answer + "!",), 4, tuple(x + 1 for x in logits))
    options = ["--folder", f"InternVL3-1B-hf={folder}", "--images", str(images)]
    options += ["--device", "cpu", "--dtype", "float32", "InternVL3-1B-hf"]
    monkeypatch.setitem(released.CASES, "InternVL3-1B-hf", [right])
    assert released.main(options) == 0
    assert "1 of 1 cases passed" in capsys.readouterr().out
    monkeypatch.setitem(released.CASES, "InternVL3-1B-hf", [right, wrong])
    assert released.main(options) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 cases passed" in printed and "logits [" in printed and f"published {answer + '!'!r}" in printed


def test_a_table_is_answered_and_scored(released, tmp_path, capsys, monkeypatch):
    """By `predict` and `score` on a stand-in of MMStar's table; the score is compared with the published one."""
    tiny = write_checkpoint(tmp_path / "tiny", "Qwen2ForCausalLM", llm={"max_position_embeddings": 256})
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(picture, "PNG")
    cells = base64.b64encode(picture.getvalue()).decode()
    head = "index\tquestion\tA\tB\tanswer\tcategory\tl2_category\timage\n"
    rows = (f"{n}\tWhich?\tcat\tdog\t{'AB'[n % 2]}\tlogic\tall\t{cells}\n" for n in range(2))
    table = tmp_path / "MMStar_MINI.tsv"
    table.write_text(head + "".join(rows))
    monkeypatch.setenv("PYTHONPATH", str(ROOT.parent))
    options = ["--folder", f"InternVL3-8B={tiny}", "--device", "cpu", "--mmstar", str(table), "InternVL3-8B"]
    assert released.main(options) == 1
    (score,) = re.findall(r"FAIL  InternVL3-8B: MMStar_MINI\n      ([\d.]+), published 70.0", capsys.readouterr().out)
    monkeypatch.setattr(released, "mmstar", lambda *_: float(score))
    monkeypatch.setitem(released.MMSTAR, "InternVL3-8B", float(score) + 0.5)
    assert released.main(options) == 0
    assert "pass  InternVL3-8B: MMStar_MINI" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("InternVL9-1B", "nothing is published of it here"),
        ("--folder InternVL9-1B=x", "nothing is published of it here"),
        ("--folder InternVL3-1B-hf=nowhere", "has no config.json"),
        ("--folder InternVL3-1B-hf", "expected --folder MODEL=DIR"),
        ("InternVL3-8B", "needs --mmstar"),
        ("InternVL3-1B-hf InternVL3-8B --mmstar nowhere.tsv", "found nowhere.tsv"),
        ("--images .", "has no 000000039769.jpg"),
        ("InternVL3-1B-hf", "there is no GPU; --device cpu"),
    ],
)
def test_a_command_that_cannot_end_is_refused_before_weights_are_read(released, options, reason, capsys, monkeypatch):
    monkeypatch.setattr(released.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(released.InternVL, "from_pretrained", None)
    with pytest.raises(SystemExit) as ended:
        released.main(options.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and reason in error


def test_a_case_that_cannot_be_asked_fails_and_the_others_go_on(released, folder, images, capsys, monkeypatch):
    """A picture that does not open, and a model that does not load, have their reason in place of an answer."""
    cases = [released.Case("What is it?", released.VIEW), released.Case("Write a haiku", None, tokens=2)]
    monkeypatch.setitem(released.CASES, "InternVL3-1B-hf", cases)
    (images / "view.jpg").write_text("no picture")
    broken = images / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    options = ["--folder", f"InternVL3-1B-hf={folder}", "--folder", f"InternVL2_5-2B-MPO-hf={broken}"]
    options += ["--images", str(images), "--device", "cpu", "--dtype", "float32"]
    assert released.main(options) == 1
    printed = capsys.readouterr().out
    assert re.search(r"FAIL  InternVL3-1B-hf: What is it\? \S+\n      could not be asked: .*view.jpg", printed)
    assert "pass  InternVL3-1B-hf: Write a haiku" in printed and "1 of 3 cases passed" in printed
    assert re.search(r"FAIL  InternVL2_5-2B-MPO-hf\n      could not be run: .*config.json", printed)
