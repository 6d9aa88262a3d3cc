"""Beam search on embeddings equals that of transformers' own InternVL class."""

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from ivl.model.internvl import InternVL
from ivl.types import UserError
from tests.checkpoint.test_hf_layout import export
from tests.model.rows import padded, rows
from tests.tiny import FAMILIES, write_checkpoint


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_beams_equal_those_of_transformers(tmp_path, architecture):
    ours = InternVL.from_pretrained(write_checkpoint(tmp_path / "released", architecture))
    theirs = InternVLForConditionalGeneration.from_pretrained(export(ours, tmp_path / "hf"), dtype=torch.float32).eval()
    made = rows(ours, lengths=(15, 9, 24), tiles=(2, 0, 3))
    greedy = ours.generate(padded(made), max_new_tokens=10, eos_ids=[])
    differing = 0
    for end in (None, greedy[0][3]):
        eos = [] if end is None else [end]
        found = ours.generate(padded(made), max_new_tokens=10, eos_ids=eos, num_beams=4)
        for row, answer in zip(made, found):
            batch = padded([row])
            # Embeddings, since transformers 5.17 mixes up the pictures of beams where it is given tiles.
            whole = theirs.generate(
                inputs_embeds=ours.embed(batch.input_ids, batch.tiles, batch.tiles_per_row),
                attention_mask=batch.attention_mask.long(),
                max_new_tokens=10,
                num_beams=4,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=0,
            )[0].tolist()
            assert answer == (whole[: whole.index(end) + 1] if end in whole else whole)
        differing += found != greedy
    assert differing, "beams found nothing that greedy search does not"


def test_beams_stop_at_sequences_and_texts(tmp_path):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path))
    batch = padded(rows(model, lengths=(15,), tiles=(2,)))
    whole = model.generate(batch, max_new_tokens=12, eos_ids=[], num_beams=2)[0]
    found = model.generate(batch, max_new_tokens=12, eos_ids=[], num_beams=2, stop=[whole[3:5]])[0]
    assert found[-2:] == whole[3:5] or len(found) == 12
    found = model.generate(batch, max_new_tokens=12, eos_ids=[], num_beams=2, stopped=lambda ids: len(ids) == 4)[0]
    assert len(found) == 4


def test_sampling_with_beams_is_refused(tmp_path):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path))
    with pytest.raises(UserError, match="num_beams"):
        model.generate(padded(rows(model)), num_beams=2, temperature=0.5)
