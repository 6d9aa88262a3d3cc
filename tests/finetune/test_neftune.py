"""Noise on the embeddings of text: its size by the paper, in training only, not on image tokens."""

import pytest
import torch

from ivl.finetune import tune
from ivl.finetune.neftune import add_noise
from ivl.model.internvl import InternVL
from ivl.options import LoRA, Tune
from tests.model.trained import inputs
from tests.tiny import write_checkpoint


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_magnitude_follows_the_length_of_a_tokens_own_row(packed):
    D, lengths, alpha = 32, (40, 10), 5.0
    if packed:
        mask = torch.ones(1, 60, dtype=torch.bool)
        ids = torch.cat([torch.zeros(40), torch.ones(10), torch.full((10,), -1)])[None].long()
        mask[0, 50:] = False
        spans = [(0, slice(0, 40)), (0, slice(40, 50))]
        nothing = (0, slice(50, 60))
    else:
        mask = torch.arange(40)[None] < torch.tensor(lengths)[:, None]
        ids, spans, nothing = None, [(0, slice(0, 40)), (1, slice(0, 10))], (1, slice(10, 40))
    noise = add_noise(torch.zeros(*mask.shape, D), alpha, mask, ids)
    for length, span in zip(lengths, spans):
        most = alpha / (length * D) ** 0.5
        assert 0.9 * most < noise[span].abs().max() <= most
    assert noise[nothing].abs().max() == 0


def test_text_gets_noise_in_training_and_images_do_not(tmp_path):
    model = InternVL.from_pretrained(write_checkpoint(tmp_path))
    tune.apply(model, Tune(mlp1="full", language_model=LoRA(rank=2)))
    model.neftune_alpha = 5.0
    batch = inputs(model)
    image = batch["input_ids"] == model.image_token_id
    with torch.no_grad():
        noisy = model.embed(input_ids_BT=batch["input_ids"], tiles_N3SS=batch["tiles"])
        model.eval()
        plain = model.embed(input_ids_BT=batch["input_ids"], tiles_N3SS=batch["tiles"])
    changed = (noisy != plain).any(-1)
    assert torch.equal(changed, ~image)
