"""What is known of an image once it was decoded: enough to see that something went wrong on the way."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

TINY = 32  # pixels of the shorter side: an icon or a thumbnail of a thumbnail, and no picture of anything
CLIPPED = 0.9  # share of pixels beyond the ends of the window; air around a patient is below that
ONE_COLOUR = 4  # levels of 255 between the darkest and the brightest pixels, but for
_STRAY = 0.005  # so many at either end: a marker or a dead pixel is no picture


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Of one decoded image. `span` is in grey levels of 255; `below` and `above` are shares of pixels, 0..1."""

    width: int
    height: int
    frames: int  # in the file, of which one counts
    below: float  # the plan's window; 0 where none is needed
    above: float
    span: int  # from the darkest to the brightest pixels

    @property
    def tiny(self) -> bool:
        """Too small to show anything."""
        return min(self.width, self.height) < TINY

    @property
    def clipped(self) -> bool:
        """Lies almost wholly beyond the ends of the window."""
        return self.below + self.above >= CLIPPED

    @property
    def one_coloured(self) -> bool:
        """Shows nothing, of whatever size."""
        return self.span <= ONE_COLOUR


def facts_of(image: Image.Image, frames: int, below: float = 0.0, above: float = 0.0) -> ImageFacts:
    """Look at a decoded RGB `image`."""
    spans = [_span(channel.histogram()) for channel in image.split()]
    return ImageFacts(image.width, image.height, frames, below, above, max(spans))


def _span(histogram: list[int]) -> int:
    stray, darkest, brightest = _STRAY * sum(histogram), 0, 255
    left = histogram[0]
    while left <= stray and darkest < 255:
        darkest += 1
        left += histogram[darkest]
    right = histogram[255]
    while right <= stray and brightest > 0:
        brightest -= 1
        right += histogram[brightest]
    return max(0, brightest - darkest)
