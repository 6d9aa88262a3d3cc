"""Is a model trained on packs as good as one trained on padded batches?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweep import sweep

# a row has 28 tokens: a pack holds about as many rows as a padded batch, 32
PACK = {"data.packing": "true", "data.batch_size": "1", "data.pack_tokens": "900"}
sweep(Path(__file__).parent, {"padded batches": {}, "packs": PACK}, ("val/loss", "val/exact"))
