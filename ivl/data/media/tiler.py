"""Image tiler: images and videos → number of tiles, from headers alone, and pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ivl.architecture.config import Config
from ivl.data.media import load as media
from ivl.data.media import tiling as tiles
from ivl.data.media.feature_store import FeatureStore
from ivl.data.media.source import is_url
from ivl.data.truncation import Shape
from ivl.options import ProcessorOptions, VideoOptions
from ivl.types import Media, UserError

_LATEST = 99_999.9
"""Second of a frame that is not known, for the longest text"""
_PIXELS = 2
"""Version of the pixels: raise it where the same file gives other pixels, so that cached features are not used"""


class MediaCache:
    """Shapes and pixels of the media of a conversation that goes on, so that each medium is opened once."""

    def __init__(self) -> None:
        self._shapes: dict[int, tuple[Media, Shape]] = {}
        self._pixels: dict[tuple[int, int], Tensor] = {}

    def shape(self, find: Callable[[Media, bool], Shape], medium: Media, probe_urls: bool) -> Shape:
        if id(medium) not in self._shapes:
            self._shapes[id(medium)] = medium, find(medium, probe_urls)  # a reference, so that the id is not reused
        return self._shapes[id(medium)][1]

    def pixels(self, medium: Media, limit: int, cut: Callable[[], Tensor]) -> Tensor:
        if (id(medium), limit) not in self._pixels:
            self._pixels[id(medium), limit] = cut()
        return self._pixels[id(medium), limit]


class ImageTiler:
    """Cut media into tiles, by a checkpoint's config and the options of `ivl.data.processor`."""

    def __init__(self, config: Config, options: ProcessorOptions) -> None:
        self.config = config
        self.video, self.policy = options.video, options.media
        self.exif, self.resize = options.exif, options.resize

    def shape(self, medium: Media, probe_urls: bool = True) -> Shape:
        """Frames and size of an image or a video; behind a URL that is not probed, the most frames there can be."""
        if not probe_urls and isinstance(medium.source, str) and is_url(medium.source):
            if medium.kind == "image":
                return Shape(1, 0, 0)
            video = self._sampling(medium)
            frames = video.num_segments if video.fps is None else video.max_frames
            return Shape(frames, 0, 0, (_LATEST,) * frames if video.writes_times else ())
        if medium.kind == "image":
            return Shape(1, *media.image_size(medium.source, self.exif, self.policy))
        video = self._sampling(medium)
        cut = (medium.source, video, medium.start, medium.end, self.policy)
        times = tuple(media.video_times(*cut)) if video.writes_times else ()
        frames = len(times) or media.video_frame_count(*cut)
        if self.video.max_tiles == 1:
            return Shape(frames, 1, 1, times)
        info = media.video_info(medium.source, self.policy)
        return Shape(frames, info.width, info.height, times)

    def _sampling(self, medium: Media) -> VideoOptions:
        """Sampling of a video: by `data.video`, and by what its row says of it."""
        video = self.video
        if medium.fps is None and medium.num_frames is None and medium.max_frames is None:
            return video
        most = min(video.max_frames, medium.max_frames or video.max_frames)
        if (medium.num_frames or 0) > most:
            raise UserError(
                f"{media.describe(medium.source)}: num_frames {medium.num_frames} is above max_frames {most}; "
                "lower it, or raise the other (of the video, or data.video.max_frames)"
            )
        fps = None if medium.num_frames is not None else medium.fps or video.fps
        return replace(video, fps=fps, num_segments=medium.num_frames or min(video.num_segments, most), max_frames=most)

    def count(self, shape: Shape, limit: int) -> int:
        """Tiles of an image of this shape, or of each frame; of an unknown one, the most there can be."""
        config = self.config
        if not config.dynamic_image_size:
            return 1
        if not shape.width:
            return limit + (config.use_thumbnail and limit > 1)
        low = min(config.min_dynamic_patch, limit)
        return tiles.tile_count(shape.width, shape.height, config.image_size, low, limit, config.use_thumbnail)

    def key(self, medium: Media, limit: int, store: FeatureStore) -> str | None:
        """Key of an image in a feature cache. None: a video, or an image without a file or bytes."""
        if medium.kind != "image":
            return None
        config = self.config
        grid = (config.image_size, min(config.min_dynamic_patch, limit), limit, config.use_thumbnail, self.exif)
        settings = (*grid, config.dynamic_image_size, config.pad2square, self.resize, self.policy.transparency, _PIXELS)
        read = partial(media.image_bytes, medium.source, self.policy)
        return store.key(media.local_file(medium.source, self.policy), read, settings)

    def pixels(self, medium: Media, limit: int, counts: list[int], generator: torch.Generator | None) -> Tensor:
        """Tiles (N, 3, S, S) uint8 of an image, or of the frames of a video."""
        config, S = self.config, self.config.image_size
        if medium.kind == "image":
            images = [media.load_image(medium.source, self.exif, self.policy)]
        else:
            video = self._sampling(medium)
            images = media.load_video(medium.source, video, medium.start, medium.end, generator, self.policy)
        low = min(config.min_dynamic_patch, limit)
        parts = [
            tiles.cut(image, S, low, limit, config.use_thumbnail, exact=self.resize == "exact")
            if config.dynamic_image_size
            else tiles.single(image, S, config.pad2square, exact=self.resize == "exact")
            for image in images[: len(counts)]
        ]
        if [len(part) for part in parts] != counts:
            raise UserError(
                f"{media.describe(medium.source)}: {sum(map(len, parts))} tiles but its header promised {sum(counts)}; "
                f"the file changed or is damaged"
            )
        return torch.cat(parts)
