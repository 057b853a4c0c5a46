"""Grey of more than 8 bits, in whatever way a format stores it: 0..4095 comes out as 0..255."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from openjpeg.utils import encode_array
from PIL import Image

from fedclip_secure.data.image import Decoded, decode_image

Grey = npt.NDArray[np.uint16]
RAMP: Grey = np.linspace(0, 4095, 64 * 48).astype(np.uint16).reshape(48, 64)
WINDOW = (0, 4095)


def decoded(data: bytes, name: str = "a.tif", window: tuple[int, int] | None = WINDOW) -> Decoded:
    with ExitStack() as memory:
        return decode_image(data, Path(name), window, memory)


def saved(pixels: npt.NDArray[Any], kind: str, **options: Any) -> bytes:
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, kind, **options)
    return kept.getvalue()


def pnm(pixels: Grey, maxval: int = 4095) -> bytes:
    height, width = pixels.shape
    return f"P5\n{width} {height}\n{maxval}\n".encode() + pixels.astype(">u2").tobytes()


def plain_pnm(pixels: Grey) -> bytes:
    return f"P2\n{pixels.shape[1]} {pixels.shape[0]}\n4095\n{' '.join(map(str, pixels.ravel()))}\n".encode()


def wide_tiff(pixels: Grey) -> bytes:
    """32 bits without a sign, and above 2^31."""
    values = (pixels.astype(np.uint32) << 20).astype("<u4").tobytes()
    entries = [(256, 64), (257, 48), (258, 32), (259, 1), (262, 1), (273, 8), (277, 1), (278, 48), (279, len(values))]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(values)) + values + struct.pack("<H", 9) + table + bytes(4)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda pixels: saved(pixels, "PNG"), "a.png"),
        (lambda pixels: saved(pixels, "TIFF"), "a.tif"),
        (lambda pixels: saved(pixels.astype(np.float32), "TIFF"), "a.tif"),
        (pnm, "a.pgm"),
        (plain_pnm, "a.pgm"),
        (lambda pixels: pnm(pixels, 65535), "a.pgm"),
        *[
            (lambda pixels, bits=bits: encode_array(pixels, bits_stored=bits, codec_format=1), "a.jp2")
            for bits in (12, 16)
        ],
        (lambda pixels: encode_array(pixels, bits_stored=14, codec_format=0), "a.j2k"),
    ],
)
def test_values_go_through_the_window_as_the_file_has_them(write: Callable[[Grey], bytes], name: str) -> None:
    seen = decoded(write(RAMP), name)
    shown = np.asarray(seen.image)[..., 0].astype(int)
    assert np.abs(shown - np.rint(RAMP * (255 / 4095))).max() <= 1
    assert seen.facts.span > 250


def test_values_without_a_sign_are_not_taken_for_negative_ones() -> None:
    shown = np.asarray(decoded(wide_tiff(RAMP), window=(0, 4095 << 20)).image)[..., 0].astype(int)
    assert np.abs(shown - np.rint(RAMP * (255 / 4095))).max() <= 1


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_where_white_is_zero_the_lowest_value_is_white(kind: type[np.generic]) -> None:
    seen = decoded(saved(np.clip(RAMP.astype(kind), 0, 4000), "TIFF", tiffinfo={262: 0}))
    shown = np.asarray(seen.image)[..., 0].astype(int)
    assert np.abs(shown - (255 - np.rint(np.clip(RAMP, 0, 4000) * (255 / 4095)))).max() <= 1
    assert (seen.facts.below, seen.facts.above > 0) == (0, True), "what lies at the window's end is white"


def test_of_deep_colours_the_upper_8_bits_are_read_and_that_is_known() -> None:
    rgb = np.stack([RAMP * 16] * 3, axis=-1).astype(">u2")
    data = b"P6\n64 48\n65535\n" + rgb.tobytes()
    assert decoded(data, "a.ppm").facts.deep_colour
    jpeg2000 = encode_array(np.stack([RAMP] * 3, axis=-1), bits_stored=12, photometric_interpretation=1, codec_format=1)
    assert decoded(jpeg2000, "a.jp2").facts.deep_colour
    assert not decoded(saved(np.zeros((8, 8, 3), np.uint8), "PNG"), "a.png").facts.deep_colour
    assert not decoded(saved(RAMP, "PNG"), "a.png").facts.deep_colour
