"""Plans for every released model on the meta device; a split model computes what the whole one does."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ivl.architecture.config import Config
from ivl.architecture.families import MODELS, config_for
from ivl.checkpoint import quantization as quant
from ivl.checkpoint.weights import Files
from ivl.estimate.hardware import TILES
from ivl.inference import decoding
from ivl.inference.kv_cache import KVCache
from ivl.model import decoder, vision
from ivl.model.internvl import InternVL
from ivl.parallel import device_map as devices
from ivl.parallel.device_map import LAYERS, MAIN, DeviceMap, Sizes, choose, dispatch, from_map, plan, sizes
from ivl.parallel.devices import parse_size
from ivl.types import UserError
from tests import tiny
from tests.model import rows
from tests.second import SecondDevice

GB = 1e9
INFINITE = float("inf")


def meta(name: str, dtype: str = "bfloat16") -> InternVL:
    row = next(row for row in MODELS if row.name == name)
    return InternVL.from_config(Config.from_dict(config_for(row)), dtype, "meta")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"), llm={"num_hidden_layers": 4})


def loads(found: Sizes, placement: DeviceMap) -> dict[str, float]:
    """Bytes on each device."""
    loads = {placement.main: found.main}
    for n, size in enumerate(found.layers):
        device = placement.devices[f"{LAYERS}.{n}"]
        loads[device] = loads.get(device, 0) + size + found.beside
    return loads


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_every_model_on_one_to_eight_devices(row):
    model = meta(row.name)
    bits = dict.fromkeys((n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)), 8.0)
    found = sizes(model, bits if row.int8 else None)
    weights = (
        found.main
        + sum(found.layers)
        - TILES * 1025 * (6 * row.vision.hidden_size + 2 * row.vision.intermediate_size) * 2
    )
    expected = row.parameters + row.backbone.vocab_size * row.backbone.hidden_size if row.int8 else 2 * row.parameters
    assert weights == pytest.approx(expected, rel=0.01)
    for count in range(1, 9):
        names = [f"cuda:{n}" for n in range(count)]
        placement = plan(found, names, [INFINITE] * count)
        assert all(placement(name) in names for name, _ in model.named_parameters())
        assert {placement.devices[part] for part in ("vision_model", *MAIN)} == {"cuda:0"}
        order = [int(placement.devices[f"{LAYERS}.{n}"][5:]) for n in range(len(found.layers))]
        assert order == sorted(order), "layers follow one another"
        load = loads(found, placement)
        # As even as whole layers allow: the fullest is no fuller than the mean and a layer, unless the first device's
        # own parts alone are more.
        layer = max(found.layers) + found.beside
        assert max(load.values()) <= max(sum(load.values()) / count + layer, found.main)
        if count > 1 and found.main > layer * 1.5:
            assert order.count(0) < order.count(count - 1), "the tower's device has fewer layers"


def test_limits_are_kept_and_what_is_too_much_stays_with_the_host():
    found = sizes(meta("internvl2-8b"))
    total = found.main + sum(found.layers) + len(found.layers) * found.beside
    assert total > 15 * GB
    placement = plan(found, ["cuda:0", "cuda:1"], [6 * GB, 15 * GB])
    assert not placement.offloaded
    load = loads(found, placement)
    assert load["cuda:0"] <= 6 * GB and load["cuda:1"] <= 15 * GB
    assert load["cuda:0"] / 6 == pytest.approx(load["cuda:1"] / 15, rel=0.15), "equally full, not equally loaded"
    placement = plan(found, ["cuda:0", "cuda:1"], [6 * GB, 5 * GB])
    assert len(placement.offloaded) > 5 and all(name.startswith(LAYERS) for name in placement.offloaded)
    # The cache of what the host keeps, and one layer of it at a time, are on the first device.
    first = loads(found, placement)["cuda:0"] + len(placement.offloaded) * found.beside + max(found.layers)
    assert first <= 6 * GB
    with pytest.raises(UserError, match=r"takes about 1\d.* GB, 3\.\d GB of it on the first .* are cuda:0 2\.0 GB"):
        plan(found, ["cuda:0", "cuda:1"], [2 * GB, 50 * GB])


def test_quantised_weights_are_counted_as_they_are_stored():
    model = meta("internvl2-8b")
    files = Files(folder=None)
    whole, int8, nf4 = (sizes(model, quant.bits(model, files, how)) for how in (None, "int8", "nf4"))
    assert sum(int8.layers) == pytest.approx(sum(whole.layers) / 2, rel=0.01)
    assert sum(nf4.layers) == pytest.approx(sum(whole.layers) * 4.5 / 16, rel=0.01)
    assert whole.main == int8.main
    with pytest.raises(UserError, match=r"use more devices, allow more"):
        plan(int8, ["a", "b"], [5 * GB, GB], offload=False)
    assert plan(int8, ["a", "b"], [5 * GB, GB]).offloaded


@pytest.mark.parametrize("settings", [{"offload": False}, {"bits": {"mlp1.1": 8}}, {}], ids=str)
def test_what_is_asked_not_to_or_quantised_is_not_offloaded(monkeypatch, settings):
    monkeypatch.setattr(devices, "_names", lambda given: ["a", "b"])
    model = meta("internvl2-8b")
    if settings:
        with pytest.raises(UserError, match=r"there are a 8\.0 GB, b 1\.0 GB; use more devices"):
            choose(model, None, ["8GB", "1GB"], **settings)
    else:
        assert choose(model, None, ["8GB", "1GB"]).offloaded


def test_what_each_further_device_needs_once_is_kept_free():
    spread = Sizes(main=2, layers=[1.0] * 8, beside=1, once=3)
    assert devices.balance(spread, [10, 10], offload=False) is None
    assert devices.balance(spread, [10, 11], offload=False) == [4, 4, 0]


def test_a_tied_output_layer_is_counted_once(tmp_path):
    untied, tied = (
        InternVL.from_config(
            Config.load(tiny.write_checkpoint(tmp_path / str(on), llm={"tie_word_embeddings": on})), device="meta"
        )
        for on in (False, True)
    )
    embedding = untied.language_model.lm_head.weight
    assert sizes(untied).main - sizes(tied).main == embedding.numel() * 4


def test_options_that_do_not_go_together(tiny_folder):
    model = InternVL.from_config(Config.load(tiny_folder), device="meta")
    with pytest.raises(UserError, match="device_map: says where everything goes"):
        choose(model, devices=2, device_map={"": "cpu"})
    with pytest.raises(UserError, match="1 sizes for 2 devices; expected one for each, such as 15GB 15GB"):
        choose(model, ["cpu", "cpu"], ["3GB"])
    with pytest.raises(UserError, match=r"--device_max_memory: expected a size such as 5GB or 800MB, found 'much'"):
        choose(model, ["cpu"], ["much"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="devices: 2 asked for, but no GPU is found here; leave it out"):
            choose(model, 2)


def test_sizes_in_words():
    texts = ("5GB", "800 MB", "1.5kb", "2GiB", "7")
    assert [parse_size(text, "x") for text in texts] == [5 * 10**9, 8 * 10**8, 1500, 2 * 2**30, 7]


# -- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_a_map_is_read_and_the_longest_name_wins(tiny_folder, tmp_path, ending):
    model = InternVL.from_config(Config.load(tiny_folder), device="meta")
    given = {"": "cpu", f"{LAYERS}.3": "meta", "vision_model.encoder.layers.1": "meta"}
    path = tmp_path / f"map.{ending}"
    path.write_text(json.dumps(given) if ending == "json" else "".join(f'"{k}": {v}\n' for k, v in given.items()))
    placement = from_map(model, path)
    assert [name for name, device in placement.devices.items() if device == "meta"] == [
        "vision_model.encoder.layers.1",
        f"{LAYERS}.3",
    ]
    assert placement("language_model.model.layers.3.mlp.up_proj.weight") == "meta"
    assert str(placement) == (
        "cpu: embeddings, tower layers 0, mlp1, embed_tokens, norm, lm_head, layers 0-2; meta: tower layers 1, layers 3"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vision_model": "cpu"}, "8 modules without a device: mlp1, language_model.model.embed_tokens, .*layers.3"),
        (
            {"": "cpu", "language_model.output": "cpu", f"{LAYERS}.0.mlp": "cpu"},
            f"2 names of no module that can stand alone: language_model.output, {LAYERS}.0.mlp .expected vision_model",
        ),
        ({"": "cpu", "language_model.lm_head": "meta"}, "lm_head on meta; expected these on one device, that of the"),
        ({"": "nowhere"}, "expected a device such as cuda:1, 1 or cpu, found 'nowhere'"),
        ({"": 77}, "cuda:77 is not here; there are"),
    ],
)
def test_a_map_that_does_not_do(tiny_folder, given, message):
    model = InternVL.from_config(Config.load(tiny_folder), device="meta")
    with pytest.raises(UserError, match=message):
        from_map(model, given)


def test_a_map_file_that_is_none(tiny_folder, tmp_path):
    model = InternVL.from_config(Config.load(tiny_folder), device="meta")
    with pytest.raises(UserError, match="cannot be read"):
        from_map(model, tmp_path / "absent.json")
    (tmp_path / "map.json").write_text("{")
    with pytest.raises(UserError, match="neither JSON nor YAML"):
        from_map(model, tmp_path / "map.json")
    (tmp_path / "map.json").write_text("[1]")
    with pytest.raises(UserError, match="expected names and devices"):
        from_map(model, tmp_path / "map.json")


# -- running a split model ---------------------------------------------------------------------------------------


def test_a_split_model_answers_and_learns_as_the_whole_one(tiny_folder):
    whole = InternVL.from_pretrained(tiny_folder)
    split = InternVL.from_pretrained(tiny_folder, devices=["cpu", "cpu"])
    assert split.hf_device_map.keys() >= {"vision_model", f"{LAYERS}.3"}
    batch = rows.padded(rows.rows(whole))
    for packed in (batch, rows.packed(rows.rows(whole))):
        found, expected = (model(**packed, return_logits=True).logits for model in (split, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert split.generate(batch, max_new_tokens=5, eos_ids=[]) == whole.generate(batch, max_new_tokens=5, eos_ids=[])
    grads = []
    for model in (whole, split):
        model(**batch).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_layer_that_is_computed_again_has_its_input_on_its_own_device(tiny_folder, monkeypatch):
    given = {"": "cpu"} | dict.fromkeys([f"{LAYERS}.1", f"{LAYERS}.2", "vision_model.encoder.layers.0"], "meta")
    seen = []

    def recomputed(layer, hidden, *rest, use_reentrant):
        seen.append((layer, hidden.device))
        return layer(hidden, *rest)

    monkeypatch.setattr(vision, "checkpoint", recomputed)
    monkeypatch.setattr(decoder, "checkpoint", recomputed)
    with SecondDevice():
        model = InternVL.from_pretrained(tiny_folder, device_map=given)
        model.set_checkpointing(True, True)
        model(**rows.padded(rows.rows(model)))
    assert len(seen) == 4 + len(model.vision_model.encoder.layers)
    assert all(device == next(layer.parameters()).device for layer, device in seen)
    assert {device.type for _, device in seen} == {"cpu", "meta"}


def test_tensors_are_carried_to_the_device_of_each_layer(tiny_folder):
    """Two GPUs as torch imagines them: it refuses every operation on tensors of different devices."""
    model = InternVL.from_config(Config.load(tiny_folder), device="meta")
    placement = plan(sizes(model), ["cuda:0", "cuda:1"], [INFINITE] * 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            made = torch.nn.Parameter(torch.zeros(parameter.shape, device=placement(name)), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, made)
        embeds, cache = torch.zeros(1, 5, 64, device="cuda:0"), KVCache(2)
        cache.reserve(2, 10)
        with pytest.raises(RuntimeError, match="device"):
            decoding.prefill(model.language_model, embeds, [3, 2], cache, [0, 1])
        cache = KVCache(2)
        cache.reserve(2, 10)
        dispatch(model, placement)
        decoding.prefill(model.language_model, embeds, [3, 2], cache, [0, 1])
        ids, positions = torch.zeros(2, dtype=torch.long, device="cuda:0"), torch.tensor([3, 2], device="cuda:0")
        for step in range(2):
            logits = decoding.next_logits(model.language_model, cache, ids, positions + step, 10)
        tiles = torch.zeros(1, 3, 56, 56, dtype=torch.uint8, device="cuda:0")
        features = model.tile_features(tiles)
    assert logits.device == features.device == torch.device("cuda:0")
    devices_of_cache = [str(keys.device) for keys in cache.keys]
    assert devices_of_cache == [placement.devices[f"{LAYERS}.{n}"] for n in range(4)]
    assert set(devices_of_cache) == {"cuda:0", "cuda:1"}


@pytest.mark.gpu
@pytest.mark.parametrize("limits", [None, ["100MB"], ["600KB"]], ids=["devices", "limit", "offloaded"])
def test_on_gpus(tiny_folder, limits):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    whole = InternVL.from_pretrained(tiny_folder, device="cuda:0")
    count = None if limits else torch.cuda.device_count()
    split = InternVL.from_pretrained(tiny_folder, devices=count, device_max_memory=limits)
    batch = rows.padded(rows.rows(whole)).to("cuda:0")
    torch.testing.assert_close(split(**batch, return_logits=True).logits, whole(**batch, return_logits=True).logits)
    assert split.generate(batch, max_new_tokens=5) == whole.generate(batch, max_new_tokens=5)


# -- dtypes ----------------------------------------------------------------------------------------------------------


def test_a_dtype_the_device_does_not_have_is_said(tiny_folder):
    with pytest.warns(UserWarning, match="cpu does not compute in float8_e5m2: float32 is taken, in twice the memory"):
        model = InternVL.from_pretrained(tiny_folder, dtype="float8_e5m2")
    assert model.dtype == torch.float32
    assert InternVL.from_pretrained(tiny_folder, dtype="bfloat16").dtype == torch.bfloat16
