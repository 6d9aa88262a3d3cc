"""Adapter folders, read by peft on modules named as OpenGVLab's code and as transformers' class name them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ivl.architecture.families import llm_family
from ivl.checkpoint.layouts import to_stored
from ivl.commands.export import export
from ivl.finetune import tune
from ivl.finetune.adapter import peft_adapter
from ivl.finetune.adapter.adapter_writer import save_adapter
from ivl.model.internvl import InternVL
from ivl.options import Blocks, LoRA, Tune
from ivl.types import UserError
from tests.model.rows import padded, rows
from tests.model.trained import stirred
from tests.tiny import FAMILIES, write_checkpoint

pytestmark = pytest.mark.filterwarnings("error:.*adapter keys.*:UserWarning")

TUNES = {
    "language model": Tune(language_model=LoRA(rank=4, alpha=3.0, rslora=True)),
    "three parts": Tune(vision_model=LoRA(rank=2), mlp1="full", language_model=LoRA(rank=4)),
    "DoRA": Tune(LoRA(rank=2, dora=True), LoRA(rank=3, dora=True), LoRA(rank=4, dora=True)),
    "PiSSA": Tune(language_model=LoRA(rank=4, init="pissa"), head=LoRA(rank=3)),
    "last block, ends": Tune(vision_model=Blocks(1), language_model=LoRA(rank=4), embeddings="full", head="full"),
    "all but the head": Tune(vision_model=LoRA(rank=2), language_model="full", head="frozen"),
    "all but the embeddings": Tune(mlp1=LoRA(rank=2), language_model="full", vision_model="full", embeddings="frozen"),
}
PARTIAL = [
    Tune(vision_model=LoRA(rank=2, targets=["attn.qkv"]), language_model=LoRA(rank=4, targets=["q_proj", "v_proj"])),
    Tune(language_model=LoRA(rank=4, targets=["k_proj", "down_proj"], dora=True)),
]


def skeleton(state: dict[str, Tensor]) -> nn.Module:
    """A module with these parameters, linear layers and embeddings where there are matrices."""
    root = nn.Module()
    for name, tensor in sorted(state.items(), reverse=True):  # a weight before its bias
        owner, _, leaf = name.rpartition(".")
        module = root
        *path, last = owner.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if not hasattr(module, last):
            made: nn.Module = nn.Module()
            if leaf == "weight" and tensor.ndim == 2:
                made = nn.Embedding(*tensor.shape) if "emb" in last else nn.Linear(*tensor.shape[::-1], bias=False)
            module.add_module(last, made)
        setattr(getattr(module, last), leaf, nn.Parameter(tensor.clone()))
    return root


def released(model: InternVL) -> dict[str, Tensor]:
    """The model's weights as the release's own code names them."""
    layout = llm_family(model.config.llm_architecture).layout
    return {n: t.detach().clone() for n, t in to_stored(model.state_dict(), layout, model.config).items()}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", request.param)


@pytest.fixture(scope="module")
def theirs(base, tmp_path_factory):
    """The base in transformers' layout."""
    return export(str(tmp_path_factory.mktemp("hf") / "hf"), base=str(base), layout="hf")


def write(base, folder, how: Tune, layout=None) -> InternVL:
    """A trained model, its adapter written to `folder`."""
    model = InternVL.from_pretrained(base)
    tune.apply(model, how)
    stirred(model)
    save_adapter(model, how, folder, str(base), layout=layout)
    return model


EXPERTS = (("q_proj", "gate_up_proj", "down_proj"), ("down_proj",))
"""Layers of a mixture with a LoRA: attention and experts, or one matrix of experts"""


def tunes(architecture: str) -> list[Tune]:
    """All where names or shapes differ most, some elsewhere."""
    if architecture == "InternLM2ForCausalLM":
        return [*TUNES.values(), *PARTIAL]
    if architecture == "Qwen3MoeForCausalLM":
        return [
            TUNES["DoRA"],
            *(Tune(LoRA(rank=2), "frozen", LoRA(rank=3, alpha=4, targets=list(names))) for names in EXPERTS),
        ]
    return [TUNES[name] for name in ("three parts", "DoRA")]


@torch.no_grad()
def test_peft_merges_it_into_the_release_s_own_modules(base, tmp_path):
    from peft import PeftModel

    plain = InternVL.from_pretrained(base)
    before = released(plain)
    for n, how in enumerate(tunes(plain.config.llm_architecture)):
        model = write(base, tmp_path / str(n), how)
        merged = PeftModel.from_pretrained(skeleton(before), str(tmp_path / str(n))).merge_and_unload().state_dict()
        peft_adapter.merge(model)
        expected = released(model)
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                merged[name], tensor, atol=2e-5, rtol=1e-5, msg=lambda m, name=name: f"{name} {m}"
            )
        moved = {name for name in expected if not torch.equal(expected[name], before[name])}
        assert any("language_model" in name for name in moved)


@torch.no_grad()
def test_peft_loads_it_onto_transformers_class(base, theirs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    plain = InternVL.from_pretrained(base)
    batch = padded(rows(plain))
    pixels = torch.randn(len(batch.tiles), 3, 56, 56)
    mask = batch.attention_mask
    for n, how in enumerate(tunes(plain.config.llm_architecture)):
        ends = {how.mode("embeddings"), how.mode("head")} != {"frozen"}  # there they have a row more
        model = write(theirs if ends else base, tmp_path / str(n), how, "hf").eval()
        mine = model(batch.input_ids, mask, tiles=pixels, tiles_per_row=batch.tiles_per_row).logits
        twin = AutoModelForImageTextToText.from_pretrained(theirs, dtype=torch.float32)
        twin = PeftModel.from_pretrained(twin, str(tmp_path / str(n))).eval()
        found = twin(input_ids=batch.input_ids, attention_mask=mask.long(), pixel_values=pixels).logits
        V = mine.shape[-1]
        torch.testing.assert_close(found[mask][:, :V], mine[mask], atol=2e-5, rtol=0)
        again = InternVL.from_pretrained(theirs)
        peft_adapter.load_adapter(again, tmp_path / str(n))
        own = again.eval()(batch.input_ids, mask, tiles=pixels, tiles_per_row=batch.tiles_per_row).logits
        torch.testing.assert_close(own[mask][:, :V], mine[mask], atol=2e-5, rtol=0)


def test_the_layout_of_the_base_is_the_default(base, theirs, tmp_path):
    how = Tune(vision_model=LoRA(rank=2), language_model=LoRA(rank=4))
    for folder, start in ((base, "vision_model.encoder.layers.0"), (theirs, "model.vision_tower.encoder.layer.0")):
        write(folder, tmp_path / start, how)
        names = json.loads((tmp_path / start / "adapter_config.json").read_text())["target_modules"]
        assert any(name.startswith(start) for name in names)


@torch.no_grad()
def test_it_is_read_back_as_it_was(tmp_path):
    """The ranks that were fused are apart again, and layers without a LoRA have none."""
    base = write_checkpoint(tmp_path / "base", "InternLM2ForCausalLM")
    for n, how in enumerate([*TUNES.values(), *PARTIAL]):
        model = write(base, tmp_path / str(n), how)
        again = InternVL.from_pretrained(base)
        peft_adapter.load_adapter(again, tmp_path / str(n))
        batch = padded(rows(model))
        torch.testing.assert_close(again.eval()(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
        if how in (TUNES["language model"], PARTIAL[0]):
            ours, found = (dict(m.named_parameters()) for m in (model, again))
            assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in found.items()}


@torch.no_grad()
def test_embeddings_that_are_the_output_layer(tmp_path):
    """peft keeps what it saves in full beside the module: only with both would the output layer be the trained one."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = write_checkpoint(tmp_path / "base", llm={"tie_word_embeddings": True})
    theirs = export(str(tmp_path / "hf"), base=str(base), layout="hf")
    how = Tune(language_model=LoRA(rank=4), embeddings="full")
    model = write(theirs, tmp_path / "adapter", how)
    ids = torch.arange(8)[None]
    twin = AutoModelForImageTextToText.from_pretrained(theirs, dtype=torch.float32)
    found = PeftModel.from_pretrained(twin, str(tmp_path / "adapter")).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=0)
    again = InternVL.from_pretrained(theirs)
    peft_adapter.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(ids).logits, found, atol=2e-5, rtol=0)
    path = tmp_path / "adapter/adapter_model.safetensors"
    state = load_file(path)
    state["base_model.model.lm_head.weight"] += 1
    save_file(state, path)
    with pytest.raises(UserError, match="output layer differs from its embeddings"):
        peft_adapter.load_adapter(InternVL.from_pretrained(theirs), tmp_path / "adapter")


def test_the_wrappers_of_classic_fsdp_are_not_in_the_names(tmp_path):
    base = write_checkpoint(tmp_path / "base", "InternLM2ForCausalLM")
    how = Tune(language_model=LoRA(rank=4))
    model = InternVL.from_pretrained(base)
    tune.apply(model, how)
    state = dict(tune.trainable_state(model))
    save_adapter(model, how, tmp_path / "plain", str(base))
    layers = model.language_model.model.layers
    for n, layer in enumerate(layers):
        wrapper = nn.Module()
        wrapper.add_module("_fsdp_wrapped_module", layer)
        layers[n] = wrapper
    save_adapter(model, how, tmp_path / "wrapped", str(base), state=state)
    plain, wrapped = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)
