"""InternVL in PyTorch Lightning.

Public names are imported at first use: `import ivl` itself is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ivl.chat import Chat
    from ivl.data.processor import Processor
    from ivl.model.internvl import InternVL
    from ivl.types import Batch, Conversation, Example, Media, Message, UserError

__version__ = "0.2.0"

_HOMES = {
    "Chat": "ivl.chat",
    "InternVL": "ivl.model.internvl",
    "Processor": "ivl.data.processor",
    "Batch": "ivl.types",
    "Conversation": "ivl.types",
    "Example": "ivl.types",
    "Media": "ivl.types",
    "Message": "ivl.types",
    "UserError": "ivl.types",
}
__all__ = ["Batch", "Chat", "Conversation", "Example", "InternVL", "Media", "Message", "Processor", "UserError"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ivl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
