"""What rank does a LoRA need to teach a model that reads digits on things to say where they are?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import sweep

TUNE = "{vision_model: frozen, mlp1: frozen, language_model: %s}"
settings = {
    f"rank {r}": {
        "model.pretrained": "{base}",
        "model.tune": TUNE % f"{{rank: {r}, alpha: {2 * r}}}",
        "model.optimizer.init_args.lr": "0.002",
    }
    for r in (1, 4, 16)
}
settings["full"] = {"model.pretrained": "{base}", "model.tune": TUNE % "full"}
sweep(Path(__file__).parent, settings, ("val/loss", "val/iou"), kind="grounding")
