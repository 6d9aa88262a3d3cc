"""The whole model: equal to the recorded reference, and to itself however it is computed."""

import json

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import normalize as torchvision_normalize

from ivl.architecture.config import Config, read_json
from ivl.architecture.families import llm_family
from ivl.checkpoint.layouts import groups
from ivl.estimate.training_step import MemTracker
from ivl.model.internvl import InternVL
from ivl.model.projector import pixel_shuffle
from ivl.model.vision import normalize
from ivl.types import IGNORE, IMAGENET_MEAN, IMAGENET_STD, UserError
from tests.model.rows import packed, padded, rows
from tests.tiny import FAMILIES, write_checkpoint

# -- against the recorded reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_forward_equals_the_reference(recorded, attention):
    model, arrays, facts = (
        recorded.model(attention=attention),
        recorded.arrays("forward.npz"),
        recorded.json("forward.json"),
    )
    features = model.tile_features(arrays["pixel_values"])
    torch.testing.assert_close(features, arrays["projector_output"], atol=1e-4, rtol=0)

    batch = recorded.batch()
    out = model(**batch, return_logits=True)
    kept = batch["attention_mask"]
    top = out.logits.gather(-1, arrays["top20_ids"].long())
    torch.testing.assert_close(top[kept], arrays["top20_values"][kept], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.logits.logsumexp(-1)[kept], arrays["logsumexp"][kept], atol=1e-4, rtol=0)
    row, position = arrays["full_rows_index"].long().unbind(1)
    torch.testing.assert_close(out.logits[row, position], arrays["full_rows"], atol=1e-4, rtol=0)

    assert list(out.logits.shape) == facts["logits_shape"]
    assert int(out.num_supervised) == facts["num_supervised_tokens"]
    assert float(out.loss) == pytest.approx(facts["loss"], abs=1e-4)
    weighted = model(**batch, loss_weights=arrays["loss_weight"]).loss
    assert float(weighted) == pytest.approx(facts["loss_weighted"], abs=1e-4)


@torch.no_grad()
def test_each_row_alone_equals_the_reference(recorded):
    model, batch, facts = recorded.model(), recorded.batch(), recorded.json("forward.json")
    tiles = batch.pop("tiles").split(batch.pop("tiles_per_row").tolist())
    for row, expected in enumerate(facts["loss_per_sample"]):
        alone = {name: values[row : row + 1, : facts["sample_lengths"][row]] for name, values in batch.items()}
        assert float(model(**alone, tiles=tiles[row]).loss) == pytest.approx(expected, abs=1e-4)


def test_gradients_equal_the_reference(recorded):
    model, facts, forward = recorded.model(), recorded.json("gradients.json"), recorded.json("forward.json")
    row, (start, end) = facts["sample_index"], facts["pixel_rows"]
    batch = recorded.batch()
    tiles = recorded.arrays("forward.npz")["pixel_values"][start:end]
    del batch["tiles"], batch["tiles_per_row"]
    alone = {name: values[row : row + 1, : forward["sample_lengths"][row]] for name, values in batch.items()}
    loss = model(**alone, tiles=tiles).loss
    loss.backward()
    assert loss.item() == pytest.approx(facts["loss"], abs=1e-4)

    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = {}
    for group in groups(gradients, llm_family(model.config.llm_architecture).layout, model.config):
        of_group = [gradients[name] for name in group.module]
        written = of_group if None in of_group else group.write(of_group, model.config)
        norms |= {name: None if g is None else float(g.norm()) for name, g in zip(group.stored, written)}
    assert norms == {
        name: None if norm is None else pytest.approx(norm, rel=1e-3, abs=1e-6)
        for name, norm in facts["all_grad_norms"].items()
    }
    total = sum(norm**2 for norm in norms.values() if norm is not None) ** 0.5
    assert total == pytest.approx(facts["total_grad_norm"], rel=1e-3)


@pytest.mark.parametrize("trace", range(4), ids=["full", "freeze_backbone", "mlp_only", "full_adamw"])
def test_training_equals_the_reference(recorded, trace):
    facts, model, batch = recorded.json("train_trace.json")[trace], recorded.model(), recorded.batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(facts["freeze_prefixes"])))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == facts["num_trainable"]
    settings = {"SGD": {}, "AdamW": {"weight_decay": 0.0}}[facts["optimizer"]]
    optimizer = getattr(torch.optim, facts["optimizer"])(trained, lr=facts["lr"], **settings)
    losses = []
    for step in range(facts["steps"] + 1):
        loss = model(**batch).loss
        losses.append(loss.item())
        if step < facts["steps"]:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses == pytest.approx(facts["losses"], abs=2e-4)


# -- pixels ------------------------------------------------------------------------------------------------------------


def test_normalize_equals_torchvision():
    tiles = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    expected = torchvision_normalize(tiles.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(normalize(tiles), expected, atol=1e-6, rtol=0)
    assert normalize(tiles, torch.bfloat16).dtype == torch.bfloat16
    assert normalize(expected) is expected


def test_normalize_equals_recorded_pixels(golden):
    """Recorded pixel values undone to the uint8 they came from, and made again."""
    import numpy as np

    with np.load(next((golden / "pixels").glob("*.npz"))) as arrays:
        recorded = torch.from_numpy(arrays["pixel_values"])
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    tiles = ((recorded * std + mean) * 255).round().to(torch.uint8)
    torch.testing.assert_close(normalize(tiles), recorded, atol=1e-6, rtol=0)


def test_pixel_shuffle_reads_blocks_row_by_row_and_v1_column_by_column():
    # A grid of 4 x 4 patches with one channel each, numbered in reading order.
    grid = torch.arange(16.0).view(1, 4, 4, 1)
    blocks = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert pixel_shuffle(grid, 0.5, "v2")[0].tolist() == blocks
    assert pixel_shuffle(grid, 0.5, "v1")[0].tolist() == [blocks[0], blocks[2], blocks[1], blocks[3]]


# -- one batch, many ways ----------------------------------------------------------------------------------------------


def gradients(model: InternVL, **inputs) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[float, dict], other: tuple[float, dict], atol: float = 1e-5) -> None:
    assert one[0] == pytest.approx(other[0], abs=atol)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=atol, rtol=1e-4, msg=name)


@pytest.fixture(scope="module", params=FAMILIES)
def any_folder(request, tmp_path_factory):
    vision = "6b" if request.param == "InternLM2ForCausalLM" else "300m"
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param, vision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture
def model(folder):
    return InternVL.from_pretrained(folder)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded(any_folder, attention):
    model = InternVL.from_pretrained(any_folder, attention=attention)
    made = rows(model)
    assert_same(gradients(model, **packed(made, extra=3)), gradients(model, **padded(made)))


def test_a_row_does_not_see_its_neighbours_in_a_pack(model):
    made = rows(model)
    before = model(**packed(made), return_logits=True).logits
    made[0]["input_ids"] = made[0]["input_ids"].flip(0)
    after = model(**packed(made), return_logits=True).logits
    length = len(made[0]["input_ids"])
    assert torch.equal(before[:, length:], after[:, length:])
    assert not torch.allclose(before[:, :length], after[:, :length])


def test_padding_changes_nothing(model):
    made = rows(model)
    assert_same(gradients(model, **padded(made, extra=7)), gradients(model, **padded(made)))


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_chunked_loss_equals_plain_loss(model, chunk):
    batch = padded(rows(model))
    model.zero_grad()
    logits = model(**batch, return_logits=True).logits
    plain = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    plain.backward()
    expected = plain.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same(gradients(model, **batch, loss_chunk=chunk), expected)


def test_loss_sum_is_the_loss_times_the_supervised_tokens(model):
    batch = padded(rows(model))
    out = model(**batch)
    assert int(out.num_supervised) == batch.num_supervised
    assert out.loss_sum.item() == pytest.approx(out.loss.item() * batch.num_supervised, rel=1e-6)
    assert out.logits is None


def test_no_logits_but_those_of_the_last_chunk_are_kept_for_backward(model):
    batch = padded(rows(model, lengths=(60, 60), tiles=(0, 0)))
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(**batch, loss_chunk=4)
    width = model.language_model.config.hidden_size
    logits = [shape for shape in shapes if model.vocab_size in shape and width not in shape]
    count = int((batch.labels != IGNORE).sum())
    assert count > 4 * 4 and logits
    assert sum(shape[0] for shape in logits) <= 2 * 4  # once before and once after the softmax


def test_nothing_supervised_is_a_loss_of_zero_with_gradients(model):
    batch = padded(rows(model))
    batch.labels.fill_(IGNORE)
    loss, found = gradients(model, **batch)
    assert loss == 0.0
    assert all(not g.any() for g in found.values())
    assert found.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("language", [False, True])
def test_checkpointing_changes_nothing(any_folder, vision, language, recwarn):
    model = InternVL.from_pretrained(any_folder).train()
    batch = padded(rows(model))
    expected = gradients(model, **batch)
    model.set_checkpointing(vision=vision, language=language)
    assert_same(gradients(model, **batch), expected, atol=1e-7)
    kept = []
    for _ in range(2):
        with MemTracker(model) as tally:
            loss = model(**batch).loss
        kept.append(tally.live)
        del loss
        model.set_checkpointing(vision=False, language=False)
    assert (kept[0] < kept[1]) == (vision or language)
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


# -- without tiles, and with parts that do not train -------------------------------------------------------------------


def test_a_batch_without_tiles_gives_the_tower_gradients_of_zero(model):
    loss, found = gradients(model, **padded(rows(model, tiles=(0, 0, 0))))
    assert loss > 0
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        if name.startswith(("vision_model.", "mlp1.")):
            assert not gradient.any(), name
    assert found["language_model.lm_head.weight"].any()


def test_the_tower_runs_on_nothing_only_where_it_must(model):
    calls = []
    model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    batch = padded(rows(model, tiles=(0, 0, 0)))
    with torch.no_grad():
        model(**batch)
    model.vision_model.requires_grad_(False)
    model.mlp1.requires_grad_(False)
    model(**batch)
    assert not calls
    model.mlp1.requires_grad_(True)
    model(**batch)
    assert len(calls) == 1
    model.always_run_vision = True
    with torch.no_grad():
        expected = model(**batch).loss
    assert len(calls) == 2
    model.always_run_vision = False
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, expected)


def test_a_frozen_tower_keeps_nothing_for_backward(model):
    batch = padded(rows(model))
    states = []
    model.vision_model.register_forward_hook(lambda _module, _given, out: states.append(out.requires_grad))
    model(**batch)
    model.vision_model.requires_grad_(False)
    model(**batch)
    model.vision_model.encoder.layers[1].ls1.requires_grad_(True)
    model(**batch)
    assert states == [True, False, True]


def test_a_frozen_tower_drops_no_paths(tmp_path):
    """Even in training mode, and though the release's config has a rate."""
    raw = read_json(write_checkpoint(tmp_path) / "config.json")
    raw["vision_config"]["drop_path_rate"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = InternVL.from_pretrained(tmp_path).train()
    tiles = torch.randint(0, 256, (8, 3, 56, 56), dtype=torch.uint8)
    model.vision_model.requires_grad_(False)
    assert torch.equal(model.tile_features(tiles), model.eval().tile_features(tiles))
    model.train().vision_model.requires_grad_(True)
    assert not torch.equal(model.tile_features(tiles), model.eval().tile_features(tiles))


def test_half_precision_parts_meet(folder):
    """What trains is float32 whatever the frozen parts are kept in, and no autocast is needed."""
    model = InternVL.from_pretrained(folder, dtype="bfloat16")
    model.mlp1.float()
    out = model(**padded(rows(model)))
    assert out.loss.dtype == torch.float32
    exact = InternVL.from_pretrained(folder)(**padded(rows(model)))
    assert out.loss.item() == pytest.approx(exact.loss.item(), abs=0.05)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_image_tokens_and_tiles_must_agree(model):
    made = rows(model)
    batch = padded(made)
    batch.input_ids[1, 3] = 7
    with pytest.raises(
        UserError, match=r"row 1 of the batch: 7 image tokens .* 2 tiles of 4 tokens each, which need 8"
    ):
        model(**batch)
    made[1]["input_ids"][3] = 7
    with pytest.raises(UserError, match=r"row 1 of the batch: 7 image tokens"):
        model(**packed(made))
    with pytest.raises(UserError, match=r"batch: 8 image tokens .* 0 tiles"):
        model(torch.full((1, 8), model.image_token_id))


def test_tiles_of_one_row_do_not_fill_in_for_another(model):
    batch = padded(rows(model))
    batch.tiles_per_row = torch.tensor([0, 1, 2])
    with pytest.raises(UserError, match="row 1 of the batch: 8 image tokens"):
        model(**batch)
    batch.tiles_per_row = torch.tensor([0, 2, 2])
    with pytest.raises(UserError, match="adds up to 4 tiles, but there are 3"):
        model(**batch)


def test_unknown_names_are_refused(folder):
    with pytest.raises(UserError, match="dtype: expected float32, bfloat16 or float16, found 'fp32'"):
        InternVL.from_pretrained(folder, dtype="fp32")
    with pytest.raises(
        UserError, match="attention: expected one of auto, sdpa, eager, flash_attention_2, found 'flash'"
    ):
        InternVL.from_pretrained(folder, attention="flash")


# -- building ----------------------------------------------------------------------------------------------------------


def test_from_config_builds_random_and_meta_models(folder):
    config = Config.load(folder)
    real = InternVL.from_config(config, dtype="bfloat16")
    assert (real.dtype, real.device.type, real.training) == (torch.bfloat16, "cpu", False)
    assert real(torch.randint(0, 100, (1, 5))).logits.isfinite().all()
    meta = InternVL.from_config(config, device="meta")
    assert all(p.device.type == "meta" for p in meta.parameters())
    assert not list(meta.buffers())
    assert real.state_dict().keys() == meta.state_dict().keys()
    assert meta.vocab_size == config.llm["vocab_size"]
