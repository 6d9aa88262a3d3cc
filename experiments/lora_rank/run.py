"""How does the rank of the language model's LoRA change what the demo learns?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import sweep

HERE = Path(__file__).parent

FROZEN = "{vision_model: full, mlp1: full, language_model: %s}"
settings = {f"rank {r}": {"model.tune": FROZEN % f"{{rank: {r}, alpha: {2 * r}}}"} for r in (2, 8, 32)}
sweep(HERE, settings | {"full": {"model.tune": FROZEN % "full"}}, ("val/loss", "val/exact", "val/iou"))
