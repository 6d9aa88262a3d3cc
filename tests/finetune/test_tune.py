"""What trains, what a LoRA covers, and that recomputing layers changes no gradient."""

import pytest
import torch

from ivl.finetune import tune
from ivl.finetune.param_groups import param_groups
from ivl.model.internvl import InternVL
from ivl.options import Blocks, LoRA, Tune
from ivl.types import UserError
from tests.model.trained import inputs
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2")


def test_table_and_groups_add_up(folder):
    model = InternVL.from_pretrained(folder)
    tune.apply(model, Tune(vision_model="frozen", mlp1="full", language_model=LoRA(rank=4)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"mlp1", "language_model"}
    assert all("lora_" in n for n in trained if n.startswith("language_model"))
    groups = param_groups(model)
    assert sum(len(g["params"]) for g in groups) == len(trained)
    assert [g["name"] for g in groups] == ["mlp1", "mlp1_no_decay", "language_model"]
    assert all(p.ndim == 1 for g in groups if g.get("weight_decay") == 0.0 for p in g["params"])
    assert "LoRA on 14 layers" in tune.table(model)


@pytest.mark.parametrize(
    ("architecture", "linears"),
    [
        ("InternLM2ForCausalLM", 7),
        ("LlamaForCausalLM", 7),
        ("Qwen2ForCausalLM", 7),
        ("Qwen3ForCausalLM", 7),
        ("Phi3ForCausalLM", 4),
    ],
)
def test_targets_are_the_linear_layers_of_the_blocks(tmp_path, architecture, linears):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path, architecture))
    names = tune.target_names(model, "language_model", LoRA())
    assert len(names) == 2 * linears
    assert all(n.startswith("language_model.model.layers.") for n in names)
    vision = tune.target_names(model, "vision_model", LoRA())
    assert [n.removeprefix("vision_model.encoder.layers.0.") for n in vision[:4]] == [
        "attn.qkv",
        "attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    ]


def test_an_unknown_target_is_named(folder):
    with pytest.raises(UserError, match=r"language_model\.targets: no linear layer is named wqkv; there are down_proj"):
        tune.apply(InternVL.from_pretrained(folder), Tune(language_model=LoRA(targets=["wqkv"])))


def test_nothing_to_train_is_an_error(folder):
    with pytest.raises(UserError, match="nothing trains"):
        tune.apply(InternVL.from_pretrained(folder), Tune(language_model="frozen"))


def test_frozen_weights_keep_their_type_and_what_trains_is_float32(folder):
    model = InternVL.from_pretrained(folder, dtype="bfloat16")
    tune.apply(model, Tune(mlp1="full", language_model=LoRA(rank=2)))
    kinds = (
        {p.dtype for p in model.parameters() if p.requires_grad},
        {p.dtype for p in model.parameters() if not p.requires_grad},
    )
    assert kinds == ({torch.float32}, {torch.bfloat16})


def labelled(model: InternVL, seed: int = 0) -> dict:
    """A batch with labels: two rows of unequal length, two tiles, one of the rows supervised less than the other."""
    batch = inputs(model)
    labels = batch["input_ids"].clone()
    labels[:, :12] = -100
    labels[1, :20] = -100
    mask = torch.ones_like(labels, dtype=torch.bool)
    return batch | {"labels": labels, "attention_mask": mask, "tiles_per_row": torch.tensor([1, 1])}


def gradients(model: InternVL, **more) -> dict[str, torch.Tensor]:
    model(**labelled(model), **more).loss_sum.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


MODES = {
    "lora": Tune(vision_model=LoRA(rank=2), mlp1=LoRA(rank=2), language_model=LoRA(rank=2)),
    "full": Tune(vision_model="full", mlp1="full", language_model="full"),
    "head and last block": Tune(vision_model=Blocks(1), mlp1="full", language_model="frozen", head="full"),
    "projector": Tune(mlp1="full", language_model="frozen"),
    "dora, pissa": Tune(vision_model=LoRA(rank=2, dora=True), language_model=LoRA(rank=2, dora=True, init="pissa")),
    "embeddings, head": Tune(language_model="frozen", embeddings="full", head=LoRA(rank=2)),
}


@pytest.mark.parametrize("vision", [False, True], ids=["vit", "vit again"])
@pytest.mark.parametrize("language", [False, True], ids=["llm", "llm again"])
@pytest.mark.parametrize("mode", MODES)
def test_every_trainable_tensor_gets_the_gradient_it_gets_without_checkpointing(folder, mode, vision, language):
    found = {}
    for again in (False, True):
        torch.manual_seed(0)
        model = InternVL.from_pretrained(folder)
        tune.apply(model, MODES[mode])
        for name, parameter in model.named_parameters():  # so that no LoRA multiplies by zero
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if again:
            model.set_checkpointing(vision, language)
        calls = []
        model.language_model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("llm"))  # noqa: B023
        model.vision_model.encoder.layers[1].attn.register_forward_hook(lambda *_: calls.append("vit"))  # noqa: B023
        found[again] = gradients(model)
        trains = {"llm": language and again, "vit": vision and again and MODES[mode].vision_model != "frozen"}
        assert {k: calls.count(k) for k in trains} == {k: 1 + on for k, on in trains.items()}
    assert found[True].keys() == found[False].keys() and found[True]
    for name, gradient in found[False].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(found[True][name], gradient), name


def test_full_tuning_leaves_out_blocks_that_are_not_computed(tmp_path):
    folder = write_checkpoint(tmp_path, overrides={"select_layer": -2})
    model = InternVL.from_pretrained(folder)
    tune.apply(model, Tune(vision_model="full", language_model="frozen"))
    blocks = {n.split(".")[3] for n in tune.trainable_state(model) if ".layers." in n}
    assert blocks == {"0"}
    assert all(g is not None for g in gradients(model).values())
    with pytest.raises(UserError, match=r"vision_model\.last: expected 1 to 1 blocks, found 2"):
        tune.apply(InternVL.from_pretrained(folder), Tune(vision_model=Blocks(2)))


def test_the_last_blocks_train_and_the_others_compute_as_in_use(folder):
    model = InternVL.from_pretrained(folder)
    tune.apply(model, Tune(vision_model=Blocks(1), language_model="frozen"))
    assert {".".join(n.split(".")[:4]) for n in tune.trainable_state(model)} == {"vision_model.encoder.layers.1"}
    assert [layer.mlp.training for layer in model.vision_model.encoder.layers] == [False, True]
    assert "vision_model         91,776" not in tune.table(model) and "partly" in tune.table(model)


def test_ends_follow_the_blocks_unless_said_otherwise(folder):
    def trained(**how) -> set[str]:
        model = InternVL.from_pretrained(folder)
        tune.apply(model, Tune(**how))
        return {tune.part_of(n) for n in tune.trainable_state(model)}

    assert trained(language_model="full") == {"language_model", "embeddings", "head"}
    assert trained(language_model="full", head="frozen") == {"language_model", "embeddings"}
    assert trained(language_model="frozen", head="full") == {"head"}
    assert trained() == {"language_model"}


def test_one_tensor_at_both_ends_trains_once(tmp_path):
    folder = write_checkpoint(tmp_path, llm={"tie_word_embeddings": True})
    model = InternVL.from_pretrained(folder)
    assert tune.is_tied(model)
    tune.apply(model, Tune(language_model="frozen", head="full"))
    assert list(tune.trainable_state(model)) == ["language_model.model.embed_tokens.weight"]
    assert len(param_groups(model)) == 1
    for how in ({"head": LoRA()}, {"head": "full", "embeddings": "frozen"}):
        with pytest.raises(UserError, match="shares its weights with the embeddings"):
            tune.apply(InternVL.from_pretrained(folder), Tune(**how))


def test_pissa_starts_from_the_model_as_it_was_and_the_weight_keeps_the_rest(folder):
    base, model = InternVL.from_pretrained(folder), InternVL.from_pretrained(folder)
    tune.apply(model, Tune(language_model=LoRA(rank=4, init="pissa")))
    batch = inputs(model)
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, atol=1e-4, rtol=0)
    name = "language_model.model.layers.0.mlp.up_proj"
    left = torch.linalg.svdvals(model.get_submodule(name).base_layer.weight)
    whole = torch.linalg.svdvals(base.get_submodule(name).weight)
    torch.testing.assert_close(left[:-4], whole[4:], atol=1e-4, rtol=0)
    again = InternVL.from_pretrained(folder)
    tune.apply(again, Tune(language_model=LoRA(rank=4, init="pissa")))
    assert torch.equal(again.get_submodule(name).base_layer.weight, model.get_submodule(name).base_layer.weight)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_on_a_quantised_base_every_lora_tensor_trains_and_the_base_stays(tmp_path, quantize):
    pytest.importorskip("bitsandbytes")
    folder = write_checkpoint(tmp_path, llm={"intermediate_size": 128})
    model = InternVL.from_pretrained(folder, dtype="bfloat16", quantize=quantize)
    tune.apply(model, Tune(mlp1="full", language_model=LoRA(rank=4), head="full"))
    model.set_checkpointing(False, True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first matrix of a LoRA has a gradient once the second is not zero
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**labelled(model)).loss
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and parameter.grad.abs().max() > 0, name
        else:
            assert torch.equal(parameter, before[name]), name
    assert sum("lora_" in n for n in tune.trainable_state(model)) == 2 * 14
    with pytest.raises(UserError, match="pissa changes weights, and these are quantised"):
        tune.apply(InternVL.from_pretrained(folder, dtype="bfloat16", quantize=quantize), MODES["dora, pissa"])
