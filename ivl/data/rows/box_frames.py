"""EXIF turns of the boxes of `objects`, together with their picture."""

from __future__ import annotations

from typing import Any

from ivl.data.media.load import stored_picture
from ivl.data.media.orientation import StoredImage, stored_box, upright_box, upright_size
from ivl.data.media.source import is_url
from ivl.data.rows.grounding import Box
from ivl.options import MediaPolicy


class BoxFrames:
    """Turn the boxes of one row. `exif`: True if pictures are shown upright."""

    def __init__(self, exif: bool, policy: MediaPolicy) -> None:
        self._exif, self._policy = exif, policy
        self._opened: list[tuple[Any, StoredImage]] = []
        self.turned = 0
        """Number of boxes that were turned"""

    def size(self, source: Any) -> tuple[int, int]:
        """(width, height) of the picture that a row's boxes in pixels belong to."""
        image = self._stored(source)
        return upright_size(image.size, image.orientation) if self._policy.boxes == "upright" else image.size

    def reorient(self, source: Any, box: Box, pixels: bool) -> Box:
        """Convert a box in thousandths of the picture it was written for to the picture as it is shown.

        A picture behind a URL is fetched only for a box in `pixels`; other boxes are taken to fit it.
        """
        if not pixels and isinstance(source, str) and is_url(source):
            return box
        image = self._stored(source)
        shown, upright = self._exif or image.turned, self._policy.boxes == "upright"
        if image.orientation == 1 or shown == upright:
            return box
        self.turned += 1
        return (upright_box if shown else stored_box)(box, image.orientation)

    def _stored(self, source: Any) -> StoredImage:
        for opened, image in self._opened:
            if opened is source:
                return image
        self._opened.append((source, stored_picture(source, self._policy)))
        return self._opened[-1][1]
