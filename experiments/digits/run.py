"""How does what the demo learns grow with the number of rows, and with what is tuned?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import make_data, part_of, sweep

PARTS = {
    "projector": "{vision_model: frozen, mlp1: full, language_model: frozen}",
    "projector and LLM": "{vision_model: frozen, mlp1: full, language_model: full}",
}
make_data()
settings: dict[str, dict[str, str]] = {"12,000 rows, all tuned": {}}
# as many steps, whatever the number of rows
settings |= {f"{12000 * s:,.0f} rows, all tuned": {"data.train": part_of("single", s)} for s in (0.3, 0.1)}
settings |= {f"12,000 rows, {name}": {"model.tune": value} for name, value in PARTS.items()}
sweep(Path(__file__).parent, settings, ("val/loss", "val/exact"))
