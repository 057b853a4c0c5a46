"""What is known of an image once it was decoded: enough to see that something went wrong on the way."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

TINY = 32  # pixels of the shorter side: an icon or a thumbnail of a thumbnail, and no picture of anything
CLIPPED = 0.9  # share that is white of the pixels that are not black: black is the air around a patient
ONE_COLOUR = 16  # levels of 255 between the darkest and the brightest pixels, but for `_STRAY`; and
LITTLE_CONTRAST = 64
_STRAY = 0.005  # share at either end: a marker or a dead pixel is no picture


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Of one decoded image. `span` is in grey levels of 255; `below` and `above` are shares of pixels, 0..1."""

    dicom: bool  # by its bytes, whatever its name
    width: int
    height: int
    frames: int  # in the file, of which one counts
    below: float  # what the plan's window made black; 0 where none is needed
    above: float  # white
    span: int  # from the darkest to the brightest pixels
    deep_colour: bool  # colours, or grey with transparency, of more than 8 bits: the upper 8 are read

    @property
    def tiny(self) -> bool:
        """Too small to show anything."""
        return min(self.width, self.height) < TINY

    @property
    def clipped(self) -> bool:
        """Almost all that is not black is white: what counts lies above the window."""
        return self.above > 0 and self.above >= CLIPPED * (1 - self.below)

    @property
    def one_coloured(self) -> bool:
        """Shows nothing, or next to it."""
        return self.span <= ONE_COLOUR

    @property
    def of_little_contrast(self) -> bool:
        """Uses a small part of the range: maybe the window is too wide."""
        return ONE_COLOUR < self.span <= LITTLE_CONTRAST


def facts_of(
    image: Image.Image,
    frames: int,
    below: float = 0.0,
    above: float = 0.0,
    *,
    dicom: bool = False,
    deep_colour: bool = False,
) -> ImageFacts:
    """Look at a decoded RGB `image`."""
    spans = [_span(channel.histogram()) for channel in image.split()]
    return ImageFacts(dicom, image.width, image.height, frames, below, above, max(spans), deep_colour)


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
