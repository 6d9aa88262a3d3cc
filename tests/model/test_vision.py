"""The vision tower: equal to the recorded reference in every variant, and its training-only parts."""

import copy

import pytest
import torch

from ivl.architecture.config import Config, VisionConfig, read_json
from ivl.checkpoint.weights import Files, load_weights
from ivl.model.internvl import InternVL
from ivl.model.vision import KERNELS, DropPath, InternViT
from tests.tiny import TOWERS

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 7,
}


def tower(variant: str = "300m", kernel: str = "sdpa", **settings) -> InternViT:
    torch.manual_seed(0)
    return InternViT(VisionConfig(**SMALL | TOWERS[variant] | settings), kernel)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_every_variant_equals_the_reference(recorded, attention):
    cases, arrays = recorded.json("vision_extra.json"), recorded.arrays("vision_extra.npz")
    raw = read_json(recorded.folder / "config.json")
    compared = 0
    for case in cases:
        if "config_overrides" not in case:
            continue
        config = Config.from_dict(copy.deepcopy(raw) | case["config_overrides"])
        model = InternVL.from_config(config, device="meta", attention=attention)
        load_weights(model, Files.of(recorded.folder), "cpu")
        features = model.tile_features(arrays[f"{case['name']}.pixel_values"])
        expected = arrays[f"{case['name']}.projector_output"]
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=0, msg=case["name"])
        compared += 1
    assert compared == (2 if recorded.name.startswith("internvl3") else 7)


@torch.no_grad()
def test_hidden_states_equal_the_reference(recorded):
    model, arrays = recorded.model(), recorded.arrays("forward.npz")
    pixels, norms = arrays["pixel_values"], arrays["vit_hidden_norm"]
    for number, expected in enumerate(norms):
        hidden = model.vision_model(pixels, select_layer=number)
        torch.testing.assert_close(hidden.flatten(1).norm(dim=1), expected, rtol=1e-5, atol=1e-4)
    selected = model.vision_model(pixels[:1], model.config.select_layer)
    torch.testing.assert_close(selected, arrays["vit_last_hidden"], atol=1e-4, rtol=0)


def test_positions_resize_as_the_reference_did(recorded):
    case = next((c for c in recorded.json("vision_extra.json") if c["name"] == "resize_pos_embeddings"), None)
    if case is None:
        assert recorded.name.startswith("internvl3")
        pytest.skip(f"not recorded for {recorded.name}")
    expected = recorded.arrays("vision_extra.npz")["resize_pos_embeddings.position_embedding"]
    side = case["new_size"] // case["patch_size"]
    resized = recorded.model().vision_model.embeddings.positions(side, side)
    torch.testing.assert_close(resized, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_interpolation_at_the_same_size_is_the_identity():
    model = tower()
    embeddings = model.embeddings
    same = embeddings.positions(4, 4)
    assert same is embeddings.position_embedding
    twice = embeddings.positions(8, 8)
    assert twice.shape == (1, 65, 24)
    assert torch.equal(twice[:, :1], same[:, :1])
    assert embeddings.positions(2, 3).shape == (1, 7, 24)


@pytest.mark.parametrize("variant", TOWERS)
@torch.no_grad()
def test_kernels_agree(variant):
    pixels = torch.randn(2, 3, 28, 28)
    outs = [tower(variant, kernel)(pixels) for kernel in KERNELS if kernel != "flash_attention_2"]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)


def test_later_layers_are_neither_computed_nor_given_gradients():
    model = tower()
    calls = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 3, 28, 28), select_layer=-2).sum().backward()
    assert len(calls) == 2
    assert all(p.grad is None for p in model.encoder.layers[2].parameters())
    assert all(p.grad is not None for p in model.encoder.layers[1].parameters())


def test_queries_and_keys_are_normalised_over_the_full_width():
    assert tower("6b").encoder.layers[0].attn.q_norm.weight.shape == (24,)
    assert "encoder.layers.0.attn.q_norm.weight" not in tower("300m").state_dict()


def test_drop_path_grows_with_depth_and_acts_in_training_only():
    model = tower(drop_path_rate=0.4)
    rates = [layer.drop_path1.rate for layer in model.encoder.layers]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    pixels = torch.randn(4, 3, 28, 28)
    plain = tower()(pixels)
    torch.testing.assert_close(model.eval()(pixels), plain)
    assert not torch.allclose(model.train()(pixels), plain)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), plain)


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    branch = torch.ones(20000, 1, 1)
    out = DropPath(0.25).train()(branch)
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)


def test_dropout_and_layer_scale_follow_the_config():
    model = tower(dropout=0.5, attention_dropout=0.5, initializer_factor=0.1)
    assert model.encoder.layers[0].ls1.eq(0.1).all()
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(model.eval()(pixels), model(pixels))
    assert not torch.equal(model.train()(pixels), model(pixels))
