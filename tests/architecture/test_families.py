"""Rows of released models: their counts against what was published, their names against what users type."""

import pytest

from ivl.architecture.backbones import BACKBONES, Backbone
from ivl.architecture.config import Config
from ivl.architecture.families import LLMS, MODELS, TOWERS, VARIANTS, config_for, find_model
from ivl.data.text.template import TEMPLATES
from ivl.model.internvl import InternVL

REPORT_2_5 = "InternVL 2.5 report, arXiv 2412.05271, table 2"
REPORT_3 = "InternVL3 report, arXiv 2504.10479, table 1"
README_3_5 = "README of OpenGVLab/InternVL, September 2025"
TENSORS = "model card of OpenExplorer's copy, counted from the tensors of the checkpoint"
FILES = "sizes of the safetensors files on the hub, 2 bytes a weight"

# billions of parameters, how far off the published digits may be, source
PUBLISHED = {
    "internvl-chat-v1_5": (25.5, 0.05, REPORT_2_5),
    "mini-internvl-chat-2b-v1_5": (2.2, 0.05, "card of InternVL2-2B, row of Mini-InternVL-2B-1-5"),
    "mini-internvl-chat-4b-v1_5": (
        4.2,
        0.06,
        "card of InternVL2-4B, row of Mini-InternVL-4B-1-5; the files of both: 4.15",
    ),
    "internvl2-1b": (0.9382, 0.00005, TENSORS),
    "internvl2-2b": (4.41 / 2, 0.0025, FILES),
    "internvl2-4b": ((4.96 + 3.34) / 2, 0.005, FILES),
    "internvl2-8b": (8.1, 0.05, REPORT_2_5),
    "internvl2-26b": (25.5, 0.05, REPORT_2_5),
    "internvl2-40b": (40.1, 0.05, REPORT_2_5),
    "internvl2-llama3-76b": (76.3, 0.05, REPORT_2_5),
    "internvl2_5-1b": (0.9, 0.05, REPORT_2_5),
    "internvl2_5-2b": (2.206, 0.0005, TENSORS),
    "internvl2_5-4b": (3.7, 0.05, REPORT_2_5),
    "internvl2_5-8b": (16.2 / 2, 0.025, FILES),
    "internvl2_5-26b": (25.5, 0.05, REPORT_2_5),
    "internvl2_5-38b": (38.4, 0.05, REPORT_2_5),
    "internvl2_5-78b": (78.4, 0.05, REPORT_2_5),
    "internvl3-1b": (0.9, 0.05, REPORT_3),
    "internvl3-2b": (4.18 / 2, 0.0025, FILES),
    "internvl3-8b": (15.9 / 2, 0.025, FILES),
    # The report rounds up or counts otherwise: its 1.9 and 8.1 stand for files of 2.09 and 7.95. No file sizes at hand.
    "internvl3-9b": (9.2, 0.1, REPORT_3),
    "internvl3-14b": (15.1, 0.05, REPORT_3),
    "internvl3-38b": (38.4, 0.05, REPORT_3),
    "internvl3-78b": (78.4, 0.05, REPORT_3),
    "internvl3_5-1b": (1.1, 0.05, README_3_5),
    "internvl3_5-2b": (2.3, 0.05, README_3_5),
    "internvl3_5-4b": ((4.95 + 4.51) / 2, 0.005, FILES),
    "internvl3_5-8b": (8.5, 0.05, README_3_5),
    "internvl3_5-14b": (15.1, 0.05, README_3_5),
    "internvl3_5-38b": (38.4, 0.05, README_3_5),
    "internvl3_5-30b-a3b": (30.8, 0.05, README_3_5),
    "internvl3_5-241b-a28b": (240.7, 0.05, README_3_5),
}
PARTS = {(row.tower, row.llm): row for row in MODELS}  # one row of each combination


@pytest.mark.parametrize("row", PARTS.values(), ids=lambda row: row.name)
def test_the_count_is_that_of_the_model_that_is_built(row):
    model = InternVL.from_config(Config.from_dict(config_for(row)), device="meta")
    assert sum(p.numel() for p in model.parameters()) == row.parameters
    assert not any(b.numel() > 1e6 for b in model.buffers())
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_is_the_published_one(name):
    billions, off, source = PUBLISHED[name]
    assert find_model(name).parameters / 1e9 == pytest.approx(billions, abs=off), source


@pytest.mark.parametrize(("name", "billions"), [("internvl3_5-30b-a3b", 3), ("internvl3_5-241b-a28b", 28)])
def test_the_active_count_is_that_of_the_name(name, billions):
    assert find_model(name).active_parameters / 1e9 == pytest.approx(billions, abs=0.7)
    assert find_model("internvl3_5-8b").active_parameters == find_model("internvl3_5-8b").parameters


def test_every_row_has_a_published_count():
    assert {row.name for row in MODELS if not row.int8} == set(PUBLISHED)
    assert find_model("internvl-chat-v1_5-int8").parameters == find_model("internvl-chat-v1_5").parameters


def test_the_document_s_names_are_found():
    names = [
        "internvl-chat-v1_5",
        "internvl-chat-v1_5-int8",
        "mini-internvl-chat-2b-v1_5",
        "mini-internvl-chat-4b-v1_5",
        "internvl2-1b",
        "internvl2-2b",
        "internvl2-4b",
        "internvl2-8b",
        "internvl2-26b",
        "internvl2-40b",
        "internvl2-llama3-76b",
    ]
    assert [row.name for row in MODELS if row.in_document] == names
    assert [find_model(name).name for name in names] == names


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("InternVL2-2B", "internvl2-2b"),
        ("OpenGVLab/InternVL2-2B", "internvl2-2b"),
        ("AI-ModelScope/InternVL-Chat-V1-5", "internvl-chat-v1_5"),
        ("OpenGVLab/InternVL-Chat-V1-5-Int8", "internvl-chat-v1_5-int8"),
        ("InternVL2.5-8B", "internvl2_5-8b"),
        ("OpenGVLab/InternVL2_5-8B", "internvl2_5-8b"),
        ("OpenGVLab/InternVL3_5-14B", "internvl3_5-14b"),
        ("InternVL2-76B", "internvl2-llama3-76b"),
        ("someone/InternVL2-2B", None),
        ("OpenGVLab/InternVL2_5-8B-MPO", "internvl2_5-8b-mpo"),
        ("OpenGVLab/InternVL3-8B-hf", "internvl3-8b-hf"),
        ("internvl3_5-8b-HF", "internvl3_5-8b-hf"),
        ("InternVL3.5-14B-Instruct@main", "internvl3_5-14b-instruct"),
        ("OpenGVLab/InternVL2-Pretrain-Models:InternVL2-8B-Pretrain", "internvl2-8b-pretrain"),
        ("internvl2_5-26b-pretrain", "internvl2_5-26b-pretrain"),
        ("OpenGVLab/Mini-InternVL2-2B-DA-DriveLM", "mini-internvl2-2b-da-drivelm"),
        ("someone/InternVL3-8B-Instruct", None),
        ("", None),
    ],
)
def test_names_people_use(name, row):
    found = find_model(name)
    assert (found and found.name) == row


def test_every_variant_is_its_model_under_another_name():
    assert {row.variant_of for row in VARIANTS} <= {row.name for row in MODELS}
    for variant in VARIANTS:
        row = find_model(variant.variant_of)
        assert find_model(variant.name) is find_model(variant.huggingface) is variant
        assert variant.id_on("modelscope") == variant.huggingface != row.huggingface
        assert config_for(variant) == config_for(row)
    for series, endings in {"3": "-pretrained -instruct -hf", "3_5": "-pretrained -instruct -mpo -hf"}.items():
        for size in ("1b", "2b", "8b", "14b", "38b"):
            assert all(find_model(f"internvl{series}-{size}{ending}") for ending in endings.split())


def test_names_are_unique():
    rows = (*MODELS, *VARIANTS)
    for names in ([r.name for r in rows], [r.huggingface for r in rows], [r.id_on("modelscope") for r in rows]):
        assert len(set(names)) == len(rows)


def test_ids_on_the_hubs_are_the_document_s(shared):
    document = (shared / "document.md").read_text(encoding="utf-8")
    for row in MODELS:
        if row.in_document:
            link = f"modelscope.cn/models/{row.id_on('modelscope')}"
            assert f"[{row.name}](https://www.{link}" in document
            assert row.id_on("huggingface").startswith("OpenGVLab/")


def test_the_first_line_of_models_knows_less_and_says_something_else():
    for row in MODELS:
        first = "v1_5" in row.name
        assert row.multi_turn_images is not first
        assert row.video is not first
        assert (row.system_message is not None) is first


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_columns_point_to_rows_that_exist(row):
    config = Config.from_dict(config_for(row))
    assert row.template in TEMPLATES
    assert row.backbone.architecture in LLMS
    assert row.tower in TOWERS
    assert config.tokens_per_tile == 256
    assert config.max_dynamic_patch == row.max_tiles == 12
    assert config.vision == row.vision
    assert config.system_message == row.system_message


def test_what_was_inferred_is_named():
    known = set(Backbone.__dataclass_fields__) | {"rope_scaling"}
    for name, backbone in BACKBONES.items():
        assert set(backbone.unverified) <= known, name


@pytest.mark.parametrize("checkpoint", ["internvl2_1b", "internvl2_2b", "internvl2_26b", "internvl_chat_v1_5"])
def test_recorded_checkpoints_agree_in_all_but_size(golden, checkpoint):
    """The recorded checkpoints have the releases' config keys; what has no size must be the same here."""
    recorded = Config.load(golden / "checkpoints" / checkpoint)
    ours = Config.from_dict(config_for(find_model(checkpoint.replace("_", "-"))))
    for key in ("rope_theta", "rope_scaling", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert ours.llm[key] == recorded.llm.get(key), key
    for key in ("template", "downsample_ratio", "ps_version", "select_layer", "use_thumbnail", "max_dynamic_patch"):
        assert getattr(ours, key) == getattr(recorded, key), key
    for key in ("norm_type", "qk_normalization", "qkv_bias", "layer_norm_eps", "hidden_act"):
        assert getattr(ours.vision, key) == getattr(recorded.vision, key), key
