"""Names of precisions, and what a device without bfloat16 gets."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from ivl.finetune import tune
from ivl.lit.module import LitInternVL
from ivl.lit.strategies.precision import PrecisionGuard, choose_precision
from ivl.model.internvl import InternVL
from ivl.options import Tune
from ivl.types import UserError
from tests.tiny import write_checkpoint


@pytest.mark.parametrize(
    ("asked", "bf16", "given", "notice"),
    [
        ("bf16-mixed", True, "bf16-mixed", None),
        ("32", True, "32", None),
        ("32", False, "32", None),
        ("bf16-true", True, "bf16-mixed", "what trains in float32"),
        ("16-true", True, "16-mixed", "what trains in float32"),
        ("bf16-mixed", False, "16-mixed", "does not compute in bfloat16"),
        ("bf16-true", False, "16-mixed", "does not compute in bfloat16"),
        ("16-mixed", False, "16-mixed", None),
    ],
)
def test_precisions(asked, bf16, given, notice):
    chosen, said = choose_precision(asked, bf16)
    assert chosen == given
    assert said is None if notice is None else notice in said


def test_what_would_spoil_the_numbers_is_refused(tmp_path):
    module = LitInternVL("x", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))
    module.model = InternVL.from_pretrained(write_checkpoint(tmp_path))
    tune.apply(module.model, Tune(language_model="frozen", mlp1="full"))
    scaled, strategy = SimpleNamespace(scaler=object()), SingleDeviceStrategy("cpu")
    module._trainer = SimpleNamespace(precision_plugin=scaled, precision="16-mixed", strategy=strategy)
    with pytest.raises(UserError, match=r"fused and trainer\.precision 16-mixed do not go together"):
        module.configure_optimizers()
    module.model.bfloat16()  # as Lightning's own bf16-true does
    with pytest.raises(UserError, match=r"it rounded what trains to torch\.bfloat16, not float32"):
        PrecisionGuard().on_fit_start(module.trainer, module)
