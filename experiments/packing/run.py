"""Is a model trained on packs as good as one trained on padded batches?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import sweep

# a pack of 2,048 tokens holds about 32 rows of the demo
PACK = {"data.packing": "true", "data.batch_size": "1", "data.pack_tokens": "2048"}
sweep(Path(__file__).parent, {"padded batches": {}, "packs": PACK}, ("val/loss", "val/exact"))
