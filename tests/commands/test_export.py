"""Exported folders: what is in them, that they answer as before, and that a failed export leaves nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import ivl.commands.export as exporting
from ivl.__main__ import run_command
from ivl.commands.export import export
from ivl.data.processor import Processor
from ivl.export.verify import Probe, difference
from ivl.finetune import tune
from ivl.finetune.adapter import peft_adapter as adapter
from ivl.model.internvl import InternVL
from ivl.options import Blocks, LoRA, Tune
from ivl.types import UserError
from tests.model.rows import padded, rows
from tests.tiny import FAMILIES, write_checkpoint

BOTH = Tune(vision_model=LoRA(rank=2), mlp1="full", language_model=LoRA(rank=4))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def logits(model: InternVL) -> torch.Tensor:
    batch = padded(rows(model))
    with torch.no_grad():
        return model(**batch, return_logits=True).logits[batch.attention_mask]


def trained(base: Path, how: Tune, dtype: str = "float32") -> InternVL:
    """The base with everything that trains moved."""
    model = InternVL.from_pretrained(base, dtype=dtype)
    tune.apply(model, how)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def write_run(folder: Path, base: Path, how: Tune = BOTH, data: dict | None = None) -> InternVL:
    """A run's folder as fit leaves it, and its model."""
    model = trained(base, how)
    (folder / "checkpoints").mkdir(parents=True)
    state = {f"model.{name}": tensor for name, tensor in tune.trainable_state(model).items()}
    checkpoint = {"state_dict": state, "pretrained": str(base), "global_step": 3}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    modes = {p: vars(mode) if isinstance(mode, (Blocks, LoRA)) else mode for p, mode in vars(how).items()}
    settings = {"model": {"pretrained": str(base), "tune": modes}, "data": {"max_tiles": None} | (data or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "InternLM2ForCausalLM")
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('executed')\n")
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"]["drop_path_rate"] = 0.1
    raw["use_llm_lora"] = 16
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_release_comes_back_bit_for_bit(tmp_path, architecture, shard):
    dtype = torch.bfloat16
    folder = write_checkpoint(tmp_path / "base", architecture, dtype=dtype, max_shard_bytes=100_000)
    out = export(str(tmp_path / "out"), base=str(folder), max_shard_size=shard)
    before, after = stored(folder), stored(out)
    assert before.keys() == after.keys()
    assert all(after[n].dtype == dtype and torch.equal(after[n], before[n]) for n in before)
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert len(sizes) == 1 if shard == "5GB" else len(sizes) > 3
    report = json.loads((out / "export_report.json").read_text())
    assert len(report["checks"]) == 15 and all(check["ok"] for check in report["checks"])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_merged_run_answers_as_the_run_did(tmp_path, architecture):
    folder = write_checkpoint(tmp_path / "base", architecture)
    model = write_run(tmp_path / "run", folder)
    out = export(str(tmp_path / "out"), run=str(tmp_path / "run"))
    merged = InternVL.from_pretrained(out)
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=0)
    assert difference(logits(InternVL.from_pretrained(folder)), logits(model)) > 0.1
    assert stored(out).keys() == stored(folder).keys()


@pytest.mark.parametrize("lora", [LoRA(rank=4, dora=True), LoRA(rank=4, rslora=True, alpha=3.0)])
def test_every_kind_of_lora_is_merged(base, tmp_path, lora):
    model = write_run(tmp_path / "run", base, Tune(language_model=lora))
    merged = InternVL.from_pretrained(export(str(tmp_path / "out"), run=str(tmp_path / "run/checkpoints/last.ckpt")))
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "how",
    [
        Tune(vision_model=Blocks(1), language_model=LoRA(rank=4, init="pissa"), head="full"),
        Tune(mlp1="full", language_model="frozen", embeddings="full", head=LoRA(rank=3)),
    ],
    ids=["last block, pissa, head", "ends"],
)
def test_every_part_that_trained_is_in_the_export_and_no_other(base, tmp_path, how):
    model = write_run(tmp_path / "run", base, how)
    out = export(str(tmp_path / "out"), run=str(tmp_path / "run"))
    torch.testing.assert_close(logits(InternVL.from_pretrained(out)), logits(model), atol=1e-4, rtol=0)
    parts = [part for part in tune.PARTS if how.mode(part) != "frozen"]
    assert json.loads((out / "export_report.json").read_text())["parts"] == parts


def test_merging_into_bfloat16_rounds_once(base):
    model = trained(base, Tune(language_model=LoRA(rank=4)), "bfloat16")
    layer = model.language_model.model.layers[0].mlp.up_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    adapter.merge(model)
    merged = model.language_model.model.layers[0].mlp.up_proj
    assert type(merged) is torch.nn.Linear
    assert torch.equal(merged.weight, exact.bfloat16())
    assert not any("lora" in name for name in model.state_dict())


def test_what_the_released_folder_says(base, tmp_path):
    write_run(tmp_path / "run", base, data={"max_tiles": 4, "system_message": "Be brief."})
    assert (
        run_command("export", ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"])
        == 0
    )
    out = tmp_path / "out"
    raw = json.loads((out / "config.json").read_text())
    assert (raw["use_llm_lora"], raw["use_backbone_lora"], raw["vision_config"]["drop_path_rate"]) == (0, 0, 0.0)
    assert (raw["max_dynamic_patch"], raw["system_message"], raw["torch_dtype"]) == (4, "Be brief.", "bfloat16")
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "modeling_internvl_chat.py"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    processor = Processor.from_pretrained(out)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert processor.stop_ids[0] in ends and processor.tokenizer.eos_id in ends
    assert processor.system_message == "Be brief." and processor.max_tiles == 4
    report = json.loads((out / "export_report.json").read_text())
    assert report["parts"] == ["vision_model", "mlp1", "language_model"]
    assert any("adapter changes vision_model and mlp1" in note for note in report["notes"])
    assert set(report["commands"]) == {"lmdeploy", "transformers"}
    assert any("--layout hf for vLLM" in note for note in report["notes"])


def test_the_releases_own_system_message_stays(tmp_path):
    folder = write_checkpoint(tmp_path / "base")
    (folder / "conversation.py").write_text("Conversation(name='Hermes-2', system_message='I am old.')\n")
    out = export(str(tmp_path / "out"), base=str(folder))
    assert "I am old." in json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert Processor.from_pretrained(out).system_message == "I am old."


@pytest.mark.parametrize("layout", ["released", "hf"])
def test_an_adapter_is_merged_into_the_base_it_names(base, tmp_path, layout):
    model = trained(base, Tune(language_model=LoRA(rank=4)))
    adapter.save_adapter(model, Tune(language_model=LoRA(rank=4)), tmp_path / "adapter", str(base))
    out = export(str(tmp_path / "out"), adapter=str(tmp_path / "adapter"), layout=layout)
    expected = logits(model)
    found = logits(InternVL.from_pretrained(out))[:, : expected.shape[1]]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_only_the_adapter(base, tmp_path):
    model = write_run(tmp_path / "run", base)
    arguments = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--adapter-only"]
    assert run_command("export", arguments) == 0
    again = InternVL.from_pretrained(base)
    adapter.load_adapter(again, tmp_path / "out")
    torch.testing.assert_close(logits(again.eval()), logits(model), atol=1e-5, rtol=0)
    assert adapter.adapted_parts(tmp_path / "out") == ["vision_model", "mlp1", "language_model"]


# -- transformers' own layout ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", FAMILIES)
def test_transformers_loads_the_hf_layout_with_equal_logits(tmp_path, architecture):
    folder = write_checkpoint(tmp_path / "base", architecture)
    model = write_run(tmp_path / "run", folder)
    out = export(str(tmp_path / "out"), run=str(tmp_path / "run"), layout="hf")
    theirs, report = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    batch = padded(rows(model))
    pixels = torch.randn(len(batch.tiles), 3, 56, 56)
    adapter.merge(model)
    mine = model(batch.input_ids, batch.attention_mask, tiles=pixels, tiles_per_row=batch.tiles_per_row).logits
    mask = batch.attention_mask
    expected = theirs.eval()(input_ids=batch.input_ids, attention_mask=mask.long(), pixel_values=pixels).logits
    torch.testing.assert_close(mine[mask], expected[mask][:, : mine.shape[-1]], atol=1e-5, rtol=0)
    back = export(str(tmp_path / "back"), base=str(out))
    state = model.state_dict()
    assert all(
        torch.equal(t[: len(state[n])], state[n]) for n, t in InternVL.from_pretrained(back).state_dict().items()
    )


def test_what_has_no_exact_form_is_said(tmp_path):
    folder = write_checkpoint(tmp_path / "base", "Phi3ForCausalLM")
    out = export(str(tmp_path / "out"), base=str(folder), layout="hf")
    (note,) = json.loads((out / "export_report.json").read_text())["notes"]
    assert note.startswith("a text that begins with a blank has one token fewer")


def test_pixel_shuffle_v1_has_no_hf_layout(tmp_path):
    folder = write_checkpoint(tmp_path / "base", overrides={"ps_version": "v1"})
    with pytest.raises(UserError, match="ps_version must be 'v2', found 'v1'"):
        export(str(tmp_path / "out"), base=str(folder), layout="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


# -- refusals and crashes ----------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_on_request(base, tmp_path):
    out = export(str(tmp_path / "out"), base=str(base))
    (out / "old.txt").write_text("old")
    with pytest.raises(UserError, match="exists already; name another folder, or add --overwrite"):
        export(str(out), base=str(base))
    export(str(out), base=str(base), overwrite=True)
    assert not (out / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_overwrite_spares_what_is_no_checkpoint_and_what_is_read(base, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="replaces checkpoint folders only"):
        export(str(tmp_path / "home"), base=str(base), overwrite=True)
    for place in (base, base.parent):
        with pytest.raises(UserError, match="is read from there"):
            export(str(place), base=str(base), overwrite=True)


@pytest.mark.parametrize("step", ["save_weights", "verify", "write_json"])
def test_a_crash_leaves_no_half_folder_and_the_old_one(base, tmp_path, monkeypatch, step):
    out = export(str(tmp_path / "out"), base=str(base))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, step, crash)
    with pytest.raises(KeyboardInterrupt):
        export(str(out), base=str(base), overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_export_that_fails_its_checks_is_not_kept(base, tmp_path, monkeypatch):
    def wrong(state, folder, layout, config, size):
        state["mlp1.1.weight"] = state["mlp1.1.weight"] * float("nan")
        state["vision_model.encoder.layers.0.mlp.fc1.weight"] += 1
        save(state, folder, layout, config, size)

    save = exporting.save_weights
    monkeypatch.setattr(exporting, "save_weights", wrong)
    with pytest.raises(
        UserError, match=r"not kept.*tensors: mlp1.1.weight is not finite.*frozen parts: .*probe: "
    ) as e:
        export(str(tmp_path / "out"), base=str(base))
    assert "'vision_model': 1" in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to export: expected --run RUN, --adapter DIR, or --base NAME"),
        ({"run": "a", "adapter": "b"}, "--run and --adapter: expected one of them"),
        ({"run": "nowhere"}, "nowhere: no such folder; expected a run"),
        ({"run": "nowhere/x.ckpt"}, "nowhere/x.ckpt: no such file"),
        ({"adapter": "nowhere"}, "nowhere: no such folder; expected a PEFT adapter"),
        ({"base": "x", "max_shard_size": "five"}, "expected a size such as .*, found 'five'"),
        ({"base": "x", "adapter_only": True}, "--adapter_only: expected --run"),
    ],
)
def test_mistakes_are_explained(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        export(str(tmp_path / "out"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_base(base, tmp_path):
    write_run(tmp_path / "run", base)
    other = write_checkpoint(tmp_path / "other", "Phi3ForCausalLM")
    with pytest.raises(UserError, match="is --base the checkpoint of this run"):
        export(str(tmp_path / "out"), run=str(tmp_path / "run"), base=str(other))
    (tmp_path / "run/checkpoints/last.ckpt").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"no whole checkpoint in checkpoints"):
        export(str(tmp_path / "out"), run=str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/checkpoints/last.ckpt").mkdir(parents=True)
    torch.save({}, tmp_path / "run/checkpoints/last.ckpt/mp_rank_00_model_states.pt")  # as DeepSpeed leaves it
    with pytest.raises(UserError, match="a checkpoint in pieces, one per process"):
        export(str(tmp_path / "out"), run=str(tmp_path / "run"))


def test_the_probe_sees_every_part(base):
    """A probe without its image would pass whatever happened to the tower."""
    model = InternVL.from_pretrained(base)
    probe = Probe.of(Processor.from_pretrained(base), "cpu")
    before = probe(model)
    for part in ("vision_model", "mlp1", "language_model"):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            next(p for n, p in getattr(model, part).named_parameters() if p.ndim > 1 and "embed" not in n).mul_(2)
        assert difference(before, probe(model)) > 1e-4, part
        model.load_state_dict(state)
