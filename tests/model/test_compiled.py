"""Compiled layers compute the same under the same names, and are not compiled anew for other rows or for answers.

`eager` is a backend that runs what was traced as it is, so these tests need no C++ compiler and take seconds; runs
through the real one are in tests/lit/test_compiled_runs.py.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from ivl.data.collate import collate
from ivl.finetune.tune import apply
from ivl.model.efficient.compile import compile_layers, uncompiled
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from ivl.types import Batch, Conversation, Example, Message
from tests.model.rows import padded, rows
from tests.tiny import write_checkpoint

TUNES = {"full": Tune("full", "full", "full"), "lora": Tune(mlp1="full", language_model=LoRA(4, dropout=0.0))}


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def batch_of(model: InternVL, lengths, tiles, packed: bool) -> Batch:
    row = Conversation((Message("user", ("?",)),))
    made = rows(model, lengths, tiles, seed=sum(lengths))
    examples = [Example(**m, tiles_per_image=[1] * len(m["tiles"]), conversation=row) for m in made]
    return collate(examples, 0, packed, image_id=model.image_token_id)


def step(model: InternVL, batch: Batch) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss_sum
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def pair(folder, tune: Tune) -> list[InternVL]:
    """The same model twice, the second to be compiled."""
    made = []
    for _ in range(2):
        model = InternVL.from_pretrained(folder)
        torch.manual_seed(1)
        apply(model, tune)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        made.append(model)
    return made


@pytest.mark.parametrize(
    ("architecture", "tune", "recomputed"),
    [
        ("Qwen2ForCausalLM", "full", False),
        ("Qwen2ForCausalLM", "lora", True),
        ("InternLM2ForCausalLM", "lora", False),
        ("Phi3ForCausalLM", "full", True),
        ("Qwen3MoeForCausalLM", "full", False),
        ("Qwen3MoeForCausalLM", "lora", True),
    ],
)
def test_the_same_loss_and_gradients_under_the_same_names(tmp_path, architecture, tune, recomputed):
    plain, compiled = pair(write_checkpoint(tmp_path, architecture), TUNES[tune])
    compile_layers(compiled, "eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for model in (plain, compiled):
        model.set_checkpointing(recomputed, recomputed)
    for packed in (True, False):
        batch = batch_of(plain, (9, 17, 12), (0, 2, 1), packed)
        expected, found = step(plain, batch), step(compiled, batch)
        assert graphs(), "nothing was compiled"
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_other_rows_are_not_compiled_for(tmp_path):
    _, model = pair(write_checkpoint(tmp_path), TUNES["lora"])
    compile_layers(model, "eager")
    for lengths, tiles in (
        ((9, 17, 12), (0, 2, 1)),
        ((30, 20, 12, 9), (1, 0, 2, 1)),
        ((40, 9), (3, 0)),
        ((9, 12), (1, 0)),
    ):
        step(model, batch_of(model, lengths, tiles, True))
    before = graphs()
    for count in range(3, 12):
        lengths = [9 + (count * n) % 11 for n in range(count)]
        step(model, batch_of(model, lengths, [n % 2 for n in range(count)], True))
    assert graphs() == before


def test_answers_are_not_compiled_for(tmp_path):
    plain, compiled = pair(write_checkpoint(tmp_path), TUNES["lora"])
    compile_layers(compiled.eval(), "eager")
    prompts = padded(rows(plain, (9, 17, 12), (0, 2, 1)))
    expected = plain.eval().generate(prompts, max_new_tokens=12, eos_ids=[])
    with uncompiled():
        assert compiled.generate(prompts, max_new_tokens=12, eos_ids=[]) == expected
    assert graphs() == 0
    assert compiled.generate(prompts, max_new_tokens=2, eos_ids=[]) == [ids[:2] for ids in expected]
    assert graphs() > 0
