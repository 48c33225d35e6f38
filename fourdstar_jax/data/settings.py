"""What decides the content of a dataset, and its defaults: the flags of `fourdstar prepare`."""

import math
from typing import NamedTuple

from fourdstar_jax.data.splits import SPLITS

MAX_POINTS, MAX_SAMPLES = 1 << 17, 1 << 12
SAMPLES = 16  # of a pixel, where Blender draws and no other number is given


class Settings(NamedTuple):
    """Sizes of a dataset and what is rendered for it."""

    image_size: int = 64
    views: int = 4
    extra_views: int = 2
    max_frames: int = 24
    fps: float = 8.0
    flow: bool = True
    depth: bool = False
    zoom: tuple[float, float] = (0.6, 1.1)  # of clips of training: drawn between the two
    shift: float = 0.03  # of clips of training: at most so far off the middle, of a picture's side
    rigs: int = 1  # that see a clip of training, each from its own side, with its zoom and shift
    points: int = 0  # of the surface, tracked through the clip: geometry is measured by them
    splits: tuple[str, ...] | None = None  # only clips of these, as of a benchmark; None is all
    blender: str | None = None  # version of the Blender that draws the colours; None: we do
    samples: int | None = None  # of a pixel; None where we draw

    def check(self) -> "Settings":
        """Itself; ValueError names what is out of range."""
        for name in ("image_size", "views", "max_frames", "fps", "rigs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in self.splits or ():
            if name not in SPLITS:
                raise ValueError(f"splits={name} must be of {', '.join(SPLITS)}")
        if self.extra_views < 0:
            raise ValueError(f"extra_views={self.extra_views} must not be negative")
        if not 0 <= self.points <= MAX_POINTS:
            raise ValueError(f"points={self.points} must be from 0 to {MAX_POINTS}")
        if self.blender is None and self.samples is not None:
            raise ValueError(f"samples={self.samples} needs Blender (--blender)")
        if self.samples is not None and not 0 < self.samples <= MAX_SAMPLES:
            raise ValueError(f"samples={self.samples} must be from 1 to {MAX_SAMPLES}")
        views = self.views + self.extra_views
        if self.image_size > 1024 or views > 64 or self.max_frames > 1024 or self.rigs > 64:
            raise ValueError(
                f"image_size={self.image_size} (at most 1024), {self.views}+{self.extra_views} "
                f"views (64), max_frames={self.max_frames} (1024) or rigs={self.rigs} (64) is too "
                "large"
            )
        if len(self.zoom) != 2 or not 0.1 <= self.zoom[0] <= self.zoom[1] <= 2:
            raise ValueError(f"zoom={self.zoom} must be two numbers of 0.1 to 2, in order")
        if not 0 <= self.shift <= 0.2:
            raise ValueError(f"shift={self.shift} must be from 0 to 0.2")
        return self


class Limits(NamedTuple):
    """What an asset may take; more, and it is quarantined."""

    seconds: float = 900.0
    memory: int = 8 << 30  # bytes, besides what the renderer takes by itself
