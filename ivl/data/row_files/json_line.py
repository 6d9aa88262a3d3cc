"""JSON of a row: as the standard has it, or with a comma before a closing bracket."""

from __future__ import annotations

import json
import re
from typing import Any

_TRAILING_COMMA = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)|,(?=\s*[}\]])', re.DOTALL)


def loads(line: str | bytes) -> Any:
    """Parse as `json.loads`, but accept a comma before a closing bracket: ms-swift's document has one in its example.

    Raises ValueError or RecursionError as `json.loads` does.
    """
    try:
        return json.loads(line)
    except ValueError:
        text = line if isinstance(line, str) else line.decode()
        mended = _TRAILING_COMMA.sub(lambda match: "" if match[0] == "," else match[0], text)
        if mended == text:
            raise
        return json.loads(mended)
