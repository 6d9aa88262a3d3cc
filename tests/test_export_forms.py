"""Every form of `model.tune`, trained on a base kept in 16 bits, through every form of export."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from ivl.commands.export import export, read_run
from ivl.data.processor import Processor
from ivl.export.verify import BOUND, Probe, difference
from ivl.finetune import tune
from ivl.model.internvl import InternVL
from ivl.options import Blocks, LoRA, Tune
from tests.commands.test_export import logits, stored, write_run
from tests.tiny import write_checkpoint

TUNES = {
    "last block, projector, LoRA": Tune(vision_model=Blocks(1), mlp1="full", language_model=LoRA(rank=16)),
    "projector": Tune(mlp1="full", language_model="frozen"),
    "vision model": Tune(vision_model="full", language_model="frozen"),
    "all": Tune(vision_model="full", mlp1="full", language_model="full"),
    "LoRA everywhere": Tune(LoRA(rank=2), LoRA(rank=2), LoRA(rank=4), head=LoRA(rank=3)),
    "DoRA": Tune(vision_model=LoRA(rank=2, dora=True), mlp1="full", language_model=LoRA(rank=4, dora=True)),
    "PiSSA": Tune(language_model=LoRA(rank=4, init="pissa"), embeddings="full", head="full"),
    "ends": Tune(mlp1="full", language_model="frozen", embeddings="full", head=LoRA(rank=3)),
}
WITH_LORA = [name for name, how in TUNES.items() if any(isinstance(how.mode(p), LoRA) for p in tune.PARTS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    return write_checkpoint(folder, "InternLM2ForCausalLM", dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=TUNES)
def run(request, base, tmp_path_factory) -> tuple[Path, InternVL]:
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, write_run(folder, base, TUNES[request.param])


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
@pytest.mark.parametrize("layout", ["released", "hf"])
def test_a_run_on_a_bfloat16_base_is_merged(run, tmp_path, layout, dtype):
    folder, model = run
    out = export(str(tmp_path / "out"), run=str(folder), layout=layout, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    assert {tensor.dtype for tensor in stored(out).values()} == {wanted}
    expected, merged = logits(model), InternVL.from_pretrained(out)
    assert (
        difference(expected, logits(merged)[:, : expected.shape[1]])
        < {"auto": 3e-2, "float16": 5e-3, "float32": 1e-4}[dtype]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_trained_computes_in_16_bits_too(run, dtype):
    """As `chat --ckpt_path` does it: nothing casts between layers there."""
    folder, model = run
    base = yaml.safe_load((folder / "config.yaml").read_text())["model"]["pretrained"]
    half = read_run(folder, "--run").onto(InternVL.from_pretrained(base, dtype=dtype))
    assert difference(logits(model), logits(half).float()) < 5e-2


@pytest.mark.parametrize("name", WITH_LORA)
def test_the_adapter_of_a_run_on_a_bfloat16_base(base, tmp_path, name):
    model = write_run(tmp_path / "run", base, TUNES[name])
    out = export(str(tmp_path / "out"), run=str(tmp_path / "run"), adapter_only=True)
    assert json.loads((out / "export_report.json").read_text())["checks"][-1]["ok"]
    merged = InternVL.from_pretrained(export(str(tmp_path / "merged"), adapter=str(out), dtype="float32"))
    bound = 1e-2 if name == "PiSSA" else 1e-4  # what PiSSA leaves of a weight is kept in the base's 16 bits
    assert difference(logits(model), logits(merged)) < bound


def test_an_adapter_is_rounded_once(base, tmp_path):
    """Merged from the run or from its adapter, the weights are the same."""
    write_run(tmp_path / "run", base, Tune(mlp1="full", language_model=LoRA(rank=4)))
    export(str(tmp_path / "adapter"), run=str(tmp_path / "run"), adapter_only=True)
    from_run = stored(export(str(tmp_path / "a"), run=str(tmp_path / "run")))
    from_adapter = stored(export(str(tmp_path / "b"), adapter=str(tmp_path / "adapter")))
    assert all(torch.equal(from_run[n], from_adapter[n]) for n in from_run)


@pytest.mark.parametrize("layout", ["released", "hf"])
def test_a_mixture_of_experts_on_a_bfloat16_base_is_merged(tmp_path, layout):
    """Rounding moves tokens to other experts there, which a check of the logits took for other weights."""
    base = write_checkpoint(tmp_path / "base", "Qwen3MoeForCausalLM", dtype=torch.bfloat16)
    write_run(tmp_path / "run", base, Tune(vision_model=LoRA(rank=2), language_model=LoRA(rank=4)))
    out = export(str(tmp_path / "out"), run=str(tmp_path / "run"), layout=layout)
    probe = json.loads((out / "export_report.json").read_text())["checks"][-1]
    assert probe["name"] == "probe" and probe["ok"]


def test_other_weights_of_experts_are_told_from_rounding(tmp_path):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path / "base", "Qwen3MoeForCausalLM"), dtype="bfloat16")
    probe = Probe.of(Processor.from_pretrained(tmp_path / "base"), "cpu")
    before, moe = probe(model), model.language_model.model.layers[0].mlp
    moe.gate.weight.data = moe.gate.weight.flip(0)
    assert difference(before, probe(model)) > BOUND["bfloat16"]
    moe.gate.weight.data = moe.gate.weight.flip(0)
    assert torch.equal(before, probe(model))
    moe.experts.down_proj.weight.data[1] *= 1.5
    assert difference(before, probe(model)) > BOUND["bfloat16"]
