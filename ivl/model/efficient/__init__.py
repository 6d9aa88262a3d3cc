"""Techniques that save memory and time in training, a file each; results are the same.

`model.efficient: false` (`InternVL.from_pretrained(..., efficient=False)`) leaves all of them out, to see
whether one is at fault. A technique goes by deleting its file and its line here.

| file | technique | same numbers |
| --- | --- | --- |
| `recompute.py` | norms and activations are computed again in backward | bit for bit; in autocast the loss alone |
| `last_block.py` | the last layer's MLP for supervised tokens alone | up to rounding |
| `layer_scale.py` | a linear layer and its layer scale as one operation | up to rounding |
| `lora_linear.py` | a LoRA layer as one operation (`ivl.finetune.tune.inject`) | up to rounding; other dropout masks |
| `compile.py` | torch.compile layer by layer (`model.compile`) | up to rounding |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ivl.model.parts import ModelParts


def install(model: ModelParts) -> None:
    """Install the techniques without an option, into a model whose weights are not read yet."""
    from ivl.model.efficient import last_block, layer_scale, recompute

    for technique in (layer_scale, recompute, last_block):
        technique.install(model)
