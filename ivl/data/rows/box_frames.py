"""Boxes of `objects` follow their picture, where its EXIF block turns it or would."""

from __future__ import annotations

from typing import Any

from ivl.data.media.load import MediaPolicy, stored_picture
from ivl.data.media.orientation import StoredImage, stored_box, upright_box, upright_size
from ivl.data.rows.formats import is_url
from ivl.data.rows.grounding import Box


class BoxFrames:
    """Turns the boxes of one row. `exif`: whether pictures are shown upright."""

    def __init__(self, exif: bool, policy: MediaPolicy) -> None:
        self._exif, self._policy = exif, policy
        self._opened: list[tuple[Any, StoredImage]] = []
        self.turned = 0
        """Boxes that were turned"""

    def size(self, source: Any) -> tuple[int, int]:
        """(width, height) of the picture that a row's boxes in pixels belong to."""
        image = self._stored(source)
        return upright_size(image.size, image.orientation) if self._policy.boxes == "upright" else image.size

    def reorient(self, source: Any, box: Box, pixels: bool) -> Box:
        """A box in thousandths of the picture it was given for → of the picture as it is shown.

        Only for a box in `pixels` is anything fetched; others are taken to fit a picture behind a URL.
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
