"""Adapters of VLMEvalKit and lmms-eval: five rows of a local set, answered as `Chat` answers them.

Stand-ins of the two programs' base classes have the calls that the adapters need.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from ivl import Chat, InternVL, Processor
from ivl.chat import Settings
from tests.tiny import write_checkpoint


class BaseModel:
    """As vlmeval.vlm.base.BaseModel hands messages on."""

    def generate(self, message, dataset=None):
        assert all(item["type"] in ("text", "image", "video") for item in message)
        return self.generate_inner(message, dataset)


class Lmms:
    """As lmms_eval.api.model.lmms begins."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}


@pytest.fixture
def adapter(monkeypatch):
    def load(name):
        for path, words in {
            "vlmeval": {},
            "vlmeval.vlm": {},
            "vlmeval.vlm.base": {"BaseModel": BaseModel},
            "lmms_eval": {},
            "lmms_eval.api": {},
            "lmms_eval.api.model": {"lmms": Lmms},
            "lmms_eval.models": {},
            "lmms_eval.models.registry_v2": {
                "ModelManifest": lambda name, **paths: SimpleNamespace(name=name, **paths)
            },
        }.items():
            module = ModuleType(path)
            vars(module).update(words)
            monkeypatch.setitem(sys.modules, path, module)
        monkeypatch.delitem(sys.modules, f"ivl.harness.{name}", raising=False)
        return importlib.import_module(f"ivl.harness.{name}")

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("harness") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for n in range(5):
        Image.linear_gradient("L").rotate(60 * n).resize((60 + 9 * n, 60)).convert("RGB").save(root / f"{n}.png")
    return [str(root / f"{n}.png") for n in range(5)]


def ask(folder, question, images):
    settings = Settings(max_new_tokens=5)
    return Chat(InternVL.from_pretrained(folder), Processor.from_pretrained(folder), settings=settings).ask(
        question, images
    )


def test_vlmevalkits_rows(adapter, folder, pictures):
    model = adapter("vlmevalkit").IvlChat(str(folder), device="cpu", max_new_tokens=5)
    rows = [([p], f"What is it? {n}", f"<image>\nWhat is it? {n}") for n, p in enumerate(pictures)]
    for images, text, question in [*rows, ([], "How many?", "How many?")]:
        message = [{"type": "image", "value": p} for p in images] + [{"type": "text", "value": text}]
        assert model.generate(message, "MMStar") == ask(folder, question, images)
    question, images, videos = adapter("vlmevalkit").question_of(
        [
            {"type": "image", "value": "a.png"},
            {"type": "text", "value": " or "},
            {"type": "image", "value": "b.png"},
            {"type": "text", "value": "?"},
        ]
    )
    assert question == "Image-1: <image>\nImage-2: <image>\n<Image-1> or <Image-2>?"
    assert (images, videos) == (["a.png", "b.png"], [])
    pair = [{"type": "image", "value": "a.png"}, {"type": "image", "value": "b.png"}]
    texts = [{"type": "text", "value": "Which "}, {"type": "text", "value": "one?"}]
    write = adapter("vlmevalkit").question_of  # what its `reorganize_prompt` writes
    assert write(pair + texts)[0] == "Image-1: <image>\nImage-2: <image>\nWhich one?"
    assert write(texts)[0] == "Which one?"
    assert write(pair[:1] + texts)[0] == "<image>\nWhich \none?"


def test_lmms_evals_rows(adapter, folder, pictures):
    module = adapter("lmms_eval")
    model = module.Ivl(str(folder), device="cpu")
    model.task_dict = {"local": {"test": [[Image.open(path)] for path in pictures]}}
    wanted = {"max_new_tokens": 5, "until": ["\n\n"], "temperature": 0, "do_sample": False}
    requests = [SimpleNamespace(args=("What?", wanted, lambda doc: doc, n, "local", "test")) for n in range(5)]
    found = model.generate_until(requests)
    assert found == [ask(folder, "<image>\nWhat?", [path]).split("\n\n")[0] for path in pictures]
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    path, _, name = module.MANIFEST.simple_class_path.rpartition(".")
    assert (path, name) == ("ivl.harness.lmms_eval", module.Ivl.__name__)
