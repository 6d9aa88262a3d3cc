"""How much do more tiles help where what is asked for is small?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import sweep

settings = {f"max_tiles {n}": {"data.max_tiles": str(n)} for n in (1, 2, 3)}
sweep(Path(__file__).parent, settings, tuple(f"val/{n}_columns/exact" for n in (2, 4, 6)), kind="columns")
