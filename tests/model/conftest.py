"""The recorded checkpoints and what the reference computed with them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ivl.model.internvl import InternVL

RECORDED = (
    "internvl2_1b", "internvl2_2b", "internvl2_4b", "internvl2_26b", "internvl_chat_v1_5", "internvl3_8b",
    "internvl3_5_4b", "internvl3_5_30b_a3b",
)  # fmt: skip


@dataclass
class Recorded:
    """One recorded checkpoint. `json` and `arrays` read a file of its references."""

    name: str
    golden: Path

    @property
    def folder(self) -> Path:
        return self.golden / "checkpoints" / self.name

    def model(self, **settings: Any) -> InternVL:
        return InternVL.from_pretrained(self.folder, **settings)

    def json(self, file: str) -> Any:
        return json.loads((self.golden / "refs" / self.name / file).read_text(encoding="utf-8"))

    def arrays(self, file: str) -> dict[str, Tensor]:
        with np.load(self.golden / "refs" / self.name / file) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def batch(self) -> dict[str, Tensor]:
        """What the reference's forward was given, as ours takes it: without the white tile of a text-only row."""
        arrays = self.arrays("forward.npz")
        batch = {name: arrays[name] for name in ("input_ids", "position_ids", "labels")}
        real = arrays["image_flags"] == 1
        per_row = torch.tensor(self.json("forward.json")["tiles_per_sample"])
        per_row[[not flags.any() for flags in real.split(per_row.tolist())]] = 0
        return batch | {
            "attention_mask": arrays["attention_mask"].bool(),
            "tiles": arrays["pixel_values"][real],
            "tiles_per_row": per_row,
        }


@pytest.fixture(params=RECORDED)
def recorded(request: pytest.FixtureRequest, golden: Path) -> Recorded:
    return Recorded(request.param, golden)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random inputs are the same in every run."""
    torch.manual_seed(0)
