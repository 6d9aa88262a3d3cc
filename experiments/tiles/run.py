"""How much do more tiles help where what is asked for is small?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import sweep

HERE = Path(__file__).parent

settings = {f"{n} tiles": {"data.max_tiles": str(n)} for n in (1, 2, 4, 6)}
sweep(HERE, settings, ("val/loss", "val/exact", "val/iou", "speed/samples_per_s"))
