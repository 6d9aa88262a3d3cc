"""Is a model trained on packs as good as one trained on padded batches?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import sweep

HERE = Path(__file__).parent

PACK = {"data.packing": "true", "data.pack_tokens": "2048"}
sweep(HERE, {"padded": {}, "packed": PACK}, ("train/loss", "val/loss", "val/exact", "speed/samples_per_s"))
