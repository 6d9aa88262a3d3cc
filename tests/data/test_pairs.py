"""Pairs of answers: formats, one prompt for both, tiles held once, and what cannot be learnt from."""

import json
from pathlib import Path

import pytest
import torch

from ivl.data.index.index_build import build_index
from ivl.data.processor import Processor
from ivl.data.sets.dataset import RowDataset
from ivl.model.internvl import InternVL
from ivl.types import IGNORE, UserError
from tests.lit.rows import write_rows
from tests.tiny import write_checkpoint

GOOD, BAD = "It is a cat on the grass.", "A dog."
QUERY = {"query": "<image>What is it?", "images": ["0.png"], "response": GOOD}
PAIR = QUERY | {"rejected_response": BAD}
MESSAGES = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": GOOD}]
OTHER = [MESSAGES[0], {"role": "assistant", "content": BAD}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "model")
    write_rows(folder)
    return folder


@pytest.fixture
def processor(base) -> Processor:
    processor = Processor.from_pretrained(base / "model")
    processor.pairs = True
    return processor


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"image": "0.png", "question": "<image>\nWhat is it?", "chosen": GOOD, "rejected": BAD},
        {"image": "0.png", "question": "What is it?", "chosen": GOOD, "rejected": BAD},
        {"messages": MESSAGES, "images": ["0.png"], "rejected_response": BAD},
        {"messages": MESSAGES, "images": ["0.png"], "rejected_messages": OTHER},
    ],
)
def test_every_form_becomes_one_prompt_with_two_answers(base, processor, row):
    conversation = processor.parse(row, root=base)
    assert conversation.messages[-1].text == GOOD and conversation.rejected.messages[-1].text == BAD
    assert conversation.messages[:-1] == conversation.rejected.messages[:-1] and len(conversation.media) == 1
    assert conversation.unread == () and conversation.as_prompt().rejected is None


def test_both_answers_are_encoded_as_rows_of_their_own_and_share_tiles(base, processor):
    example = processor(PAIR, root=base)
    plain = Processor.from_pretrained(base / "model")
    chosen, rejected = (plain(QUERY | {"response": answer}, root=base) for answer in (GOOD, BAD))
    assert torch.equal(example.input_ids, chosen.input_ids) and torch.equal(example.labels, chosen.labels)
    assert torch.equal(example.rejected.input_ids, rejected.input_ids) and len(example.rejected.tiles) == 0
    assert example.num_tiles == len(chosen.tiles) and example.num_tokens == len(chosen) + len(rejected)
    assert tuple(processor.lengths(PAIR, root=base))[:3] == (
        example.num_tokens,
        example.num_tiles,
        chosen.num_supervised + rejected.num_supervised,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_pairs_computes_what_its_rows_alone_do(base, processor, packed):
    text = {"query": "How many?", "response": "four", "rejected_response": "five or six"}
    pairs = [PAIR, text, PAIR | {"images": ["1.png"]}]
    batch = processor.collate([processor(row, root=base) for row in pairs], packed=packed)
    assert batch.paired and len(batch) == 6 and len(batch.tile_index) == 2 * len(batch.tiles)
    model, plain = InternVL.from_pretrained(base / "model"), Processor.from_pretrained(base / "model")
    losses = model(**batch).row_losses
    for n, row in enumerate(pairs):
        for k, answer in enumerate((row["response"], row["rejected_response"])):
            alone = plain.collate([plain(row | {"response": answer}, root=base)])
            torch.testing.assert_close(losses[2 * n + k], model(**alone).row_losses[0], atol=1e-4, rtol=1e-5)
    moved = batch.to("cpu")
    assert moved.paired and torch.equal(moved.tile_index, batch.tile_index)
    assert moved.layout.shared == batch.layout.shared and torch.equal(moved.layout.keys, batch.layout.keys)


@pytest.mark.parametrize("packed", [False, True])
def test_a_prompt_is_computed_once_for_both_answers(base, processor, packed):
    same_start = {"query": "How many?", "response": "four or five", "rejected_response": "four or six"}
    others = {"rejected_images": ["1.png"], "rejected_messages": OTHER, "messages": MESSAGES, "images": ["0.png"]}
    pairs = [PAIR, same_start, others, PAIR | {"images": ["1.png"]}]
    examples = [processor(row, root=base) for row in pairs]
    batch = processor.collate(examples, packed=packed)
    prompts = [int((example.labels != IGNORE).nonzero()[0]) for example in examples]
    # the token before an answer predicts its first one, so each row has its own
    assert batch.layout.shared == (0, prompts[0] - 1, 0, prompts[1] - 1, 0, 0, 0, prompts[3] - 1)
    assert sum(batch.layout.lengths) == batch.num_tokens - sum(batch.layout.shared)
    model = InternVL.from_pretrained(base / "model")
    with_all = model(**batch, return_logits=True)
    found = []
    for shares in (True, False):
        batch.layout = batch.layout if shares else None
        model.zero_grad()
        out = model(**batch)
        weights = torch.linspace(-1, 1, len(batch))
        (out.row_losses * weights).sum().backward()
        found.append([out.row_losses, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(with_all.logits, model(**batch, return_logits=True).logits)


def test_only_the_last_answer_counts(base, processor):
    row = PAIR | {"query": "And?", "history": [["<image>What is it?", "An animal."]]}
    example = processor(row, root=base)
    alone = processor(PAIR, root=base)
    assert (example.labels != IGNORE).sum() == (alone.labels != IGNORE).sum()


def test_an_answer_that_makes_the_row_too_long_takes_tiles_from_both(base, processor):
    long = PAIR | {"images": ["1.png"], "rejected_response": "no " * 30}
    whole = processor(long, root=base)
    processor.max_length = len(whole.rejected.input_ids) - 4
    assert len(whole.input_ids) < processor.max_length
    example = processor(long, root=base)
    assert example.tiles_per_image == example.rejected.tiles_per_image and len(example.rejected.tiles) == 0
    assert len(example.rejected.input_ids) <= processor.max_length and example.notes == example.rejected.notes != []


def test_other_images_of_the_rejected_answer_are_its_own(base, processor):
    row = {"messages": MESSAGES, "images": ["0.png"], "rejected_messages": OTHER, "rejected_images": ["1.png"]}
    example = processor(row, root=base)
    assert len(example.rejected.tiles) == sum(example.rejected.tiles_per_image) > 0
    batch = processor.collate([example])
    assert batch.tile_index is None and len(batch.tiles) == int(batch.tiles_per_row.sum()) == example.num_tiles


def test_what_cannot_be_learnt_from_is_named(base, processor):
    for row, message in (
        (QUERY, "no rejected answer to compare with; add rejected_response"),
        (QUERY | {"rejected_response": GOOD + " "}, "the chosen and the rejected answer are the same"),
        (PAIR | {"rejected_messages": OTHER}, "rejected_response and rejected_messages: expected one of them"),
        (PAIR | {"rejected_response": 3}, "rejected answer: response: expected a text"),
        ({"question": "What?", "chosen": GOOD}, "rejected: not given"),
        ({"question": "What?", "rejected": GOOD}, "chosen: not given"),
    ):
        with pytest.raises(UserError, match=message):
            processor(row, root=base)
    same = {"query": "Hi", "response": "yes " * 60 + "a", "rejected_response": "yes " * 60 + "b"}
    processor.max_length, processor.on_too_long = len(processor(same).input_ids) - 20, "truncate_text"
    with pytest.raises(UserError, match=r"differ only after token \d+, where max_length cuts both"):
        processor(same)


def test_the_index_counts_both_answers_and_rows_are_read_by_it(base, processor):
    path = base / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PAIR, QUERY)))
    rows = RowDataset(path, processor)
    index = build_index(rows)
    assert index.tokens[0] == rows[0].num_tokens and list(index.problems) == [1]
    assert "no rejected answer" in index.problems[1] and "pairs.jsonl:2" in index.problems[1]
    plain = Processor.from_pretrained(base / "model")
    alone = build_index(RowDataset(path, plain))
    assert not alone.problems and alone.tokens[0] == len(rows[0].input_ids)
    assert [name for name, *_ in alone.unread_keys()] == ["rejected answer (model.objective dpo or mpo reads it)"]
