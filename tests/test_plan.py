"""`python -m ivl plan`: from a fit's own options, with nothing made and nothing read but lengths."""

import json
from pathlib import Path

import pytest

from ivl.families import find_model
from ivl.plan import _bytes, main
from ivl.types import UserError

REPO = Path(__file__).resolve().parents[1]
CONFIG = str(REPO / "configs/internvl2_2b.yaml")


def test_a_released_model_on_a_device(capsys):
    main(["--config", CONFIG, "--device", "H100-80GB", "--json"])
    plan = json.loads(capsys.readouterr().out)
    total = sum(p["parameters"] - p["trainable"] for p in plan["parts"].values())
    assert total == find_model("internvl2-2b").parameters
    assert plan["parts"]["vision_model"]["trainable"] == 0 < plan["parts"]["language_model"]["trainable"]
    assert 5e9 < plan["memory"]["total"] < 12e9
    assert (plan["batch"]["length"], plan["batch"]["tiles"], plan["batch"]["accumulate"]) == (4096, 15, 16)
    assert plan["batch"]["packed"]
    assert plan["flops_per_step"]["computed"] > plan["flops_per_step"]["model"]
    assert plan["device"]["step_seconds"] > 0


def test_what_does_not_fit_says_what_would(capsys):
    full = ["--config", CONFIG, "--config", str(REPO / "configs/tune/full.yaml")]
    with pytest.raises(UserError, match=r"does not fit: about [\d.]+ GB .* it would fit with .*configs/tune/lora.yaml"):
        main([*full, "--memory", "16GB"])
    assert "memory of one device, estimated" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("80GiB", 80 * 2**30), ("16", 16e9), ("500 MB", 5e8)])
def test_sizes(text: str, size: float):
    assert _bytes(text) == size


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--memory", "many"], "expected a size"),
        (["--device", "GTX-1"], "--device: 'GTX-1' is not known"),
        (["--model.pretrained", "nobody/nothing"], "neither a folder nor a released model"),
    ],
)
def test_mistakes(argv: list[str], message: str):
    with pytest.raises(UserError, match=message):
        main(["--config", CONFIG, *argv])
