"""How does the demo's score grow with the number of rows, and with what is tuned?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import REPO, sweep

HERE = Path(__file__).parent

LINES = (REPO / "demo/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
(HERE / "runs").mkdir(exist_ok=True)
settings = {}
for share in (0.1, 0.3, 1.0):
    path = HERE / f"runs/train-{share:g}.jsonl"
    path.write_text("".join(LINES[: int(share * len(LINES))]), encoding="utf-8")
    # as many steps, whatever the number of rows
    epochs = {"trainer.max_epochs": str(round(10 / share)), "trainer.check_val_every_n_epoch": str(round(2 / share))}
    rows = {"data.train": str(path), "data.media_root": str(REPO / "demo")} | epochs
    settings[f"{share:.0%} of the rows, all tuned"] = rows
PARTS = {
    "projector": "{vision_model: frozen, mlp1: full, language_model: frozen}",
    "projector, LoRA": "{vision_model: frozen, mlp1: full, language_model: {rank: 16}}",
}
settings |= {f"all rows, {name}": {"model.tune": value} for name, value in PARTS.items()}
sweep(HERE, settings, ("val/loss", "val/exact", "val/iou"))
