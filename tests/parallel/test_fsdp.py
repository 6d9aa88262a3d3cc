"""Sharded models: read shard by shard they are the model; plans for sharing layers. (Two processes: tests/lit.)"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut

from ivl.finetune import tune as tuning
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from ivl.parallel.fsdp import build_sharded, gather, shard, tensor_plan
from ivl.types import UserError
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


TUNES = {
    "experts": Tune(language_model=LoRA(rank=2, targets=["q_proj", "down_proj"])),
    "lora": Tune(language_model=LoRA(rank=2), vision_model=LoRA(rank=2), mlp1="full"),
    "full": Tune(vision_model="full", mlp1="full", language_model="full"),
    "from weights": Tune(language_model=LoRA(rank=2, init="pissa")),
}


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("tune", TUNES)
def test_a_model_read_by_shards_is_the_model(mesh, tmp_path, tune, architecture):
    """LoRA matrices included, which begin with the same random numbers."""
    tied = architecture == "Qwen2ForCausalLM"
    folder = write_checkpoint(tmp_path, architecture, llm={"tie_word_embeddings": tied}, dtype=torch.bfloat16)
    torch.manual_seed(0)
    expected = InternVL.from_pretrained(folder, dtype="bfloat16")
    tuning.apply(expected, TUNES[tune])
    torch.manual_seed(0)
    model = build_sharded(folder, TUNES[tune], mesh, torch.device("cpu"), "bfloat16")
    found = dict(model.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        own = found[name]
        assert isinstance(own, DTensor) and (own.dtype, own.requires_grad) == (parameter.dtype, parameter.requires_grad)
        assert torch.equal(gather(own), parameter), name
    assert tuning.is_tied(model) == tied
    assert model.always_run_vision


def test_a_shard_is_this_process_part(mesh):
    full = torch.arange(12.0).view(4, 3)
    like = DTensor.from_local(torch.zeros(4, 3), mesh, [Cut(0), Replicate()], run_check=False)
    assert torch.equal(gather(shard(full, like)), full)
    assert gather(full, keep=False) is None


def test_a_plan_splits_every_linear_layer_of_a_block_and_its_lora(tmp_path):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path, "Qwen2ForCausalLM"))
    tuning.apply(model, Tune(language_model=LoRA(rank=2)))
    names = {name.removeprefix("layers.1.") for name in tensor_plan(model, 2) if name.startswith("layers.1.")}
    by_columns = {f"self_attn.{n}_proj" for n in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}
    expected = {f"{n}.{leaf}" for n in by_columns for leaf in ("base_layer", "lora_B.default")}
    by_rows = ("self_attn.o_proj", "mlp.down_proj")
    expected |= {f"{n}.{leaf}" for n in by_rows for leaf in ("base_layer", "lora_A.default")}
    assert names == expected


def test_what_cannot_be_shared_is_refused(tmp_path):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path, "Qwen3ForCausalLM"))
    with pytest.raises(UserError, match="key-value heads cannot be shared by 3"):
        tensor_plan(model, 3)
    model.requires_grad_(True)
    with pytest.raises(UserError, match="q_norm trains, and all processes would need"):
        tensor_plan(model, 2)
    model.requires_grad_(False)
    assert tensor_plan(model, 2)
    mixture = InternVL.from_pretrained(write_checkpoint(tmp_path / "mixture", "Qwen3MoeForCausalLM"))
    with pytest.raises(UserError, match="experts of a mixture are not split by features"):
        tensor_plan(mixture, 2)
