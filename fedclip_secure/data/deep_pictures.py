"""Pictures of more than 8 bits a channel: their grey values as the file has them, and whether they are colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

_MODES = ("I", "F")  # and I;16, I;16B, ...
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # TIFF 6.0: PhotometricInterpretation, SampleFormat
_PHOTOMETRIC, _SAMPLE_FORMAT, _BITS = 262, 339, 258  # its tags
_FULL = 65535  # to which Pillow stretches PNM
_SIZ = b"\xff\x4f\xff\x51"  # where a JPEG 2000 codestream begins, and 38 bytes on: the first component's bits, less one
_SIZ_BITS = 42


@dataclass(frozen=True, slots=True, eq=False)
class Deep:
    """Grey `values` (H, W) in the file's own scale; where `inverted`, the highest of them are black."""

    values: npt.NDArray[np.generic]
    inverted: bool


def is_deep(stored: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits: Pillow gives the values, and not 0..255."""
    return stored.mode in _MODES or stored.mode.startswith("I;")


def is_deep_colour(stored: Image.Image, data: bytes) -> bool:
    """Whether it has more than 8 bits in colours or beside transparency, of which Pillow gives the upper 8.

    To be asked before its pixels are read.
    """
    if is_deep(stored):
        return False
    layouts = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in getattr(stored, "tile", [])]
    sixteen = any(isinstance(layout[0], str) and ";16" in layout[0] for layout in layouts if layout)
    return sixteen or _maxval(stored) > 255 or _precision(stored, data) > 8


def read_deep(stored: Image.Image, data: bytes) -> Deep:
    """The grey values of what `is_deep`, as the file has them: Pillow stretches those of some formats to 16 bits."""
    maxval, precision = _maxval(stored), _precision(stored, data)
    values = np.asarray(stored)
    if maxval:
        return Deep(np.rint(values.astype(np.float64) * maxval / _FULL), inverted=False)
    if precision:
        return Deep(values.astype(np.int64) >> (16 - precision), inverted=False)
    tags = getattr(stored, "tag_v2", {})
    if values.dtype == np.int32 and tags.get(_BITS) == (32,) and _one(tags.get(_SAMPLE_FORMAT, 1)) == _UNSIGNED:
        values = values.view(np.uint32)
    return Deep(values, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _maxval(stored: Image.Image) -> int:
    """The highest value of a PNM file that Pillow stretches; 0 of any other."""
    tiles = getattr(stored, "tile", [])
    if stored.format != "PPM" or not tiles or tiles[0].codec_name not in ("ppm", "ppm_plain"):
        return 0
    highest = tiles[0].args[1]
    return int(highest) if isinstance(highest, int) else 0


def _precision(stored: Image.Image, data: bytes) -> int:
    """Bits of a JPEG 2000 picture's first component (ISO/IEC 15444-1, A.5.1); 0 of other formats, and beyond 16."""
    start = data.find(_SIZ) if stored.format == "JPEG2000" else -1
    bits = (data[start + _SIZ_BITS] & 0x7F) + 1 if 0 <= start < len(data) - _SIZ_BITS else 0
    return bits if bits <= 16 else 0


def _one(value: object) -> object:
    return value[0] if isinstance(value, tuple) and value else value
