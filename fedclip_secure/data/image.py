"""One image file's bytes to 8-bit RGB."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fedclip_secure.data.dicom import DICOM_SUFFIXES, PREAMBLE, is_dicom, read_dicom
from fedclip_secure.data.walk import looked_at
from fedclip_secure.data.window import to_grey
from fedclip_secure.disk import refused
from fedclip_secure.errors import ConfigError, DataError

_ORIENTATION = 0x0112  # in EXIF
_UPRIGHT = {  # by orientation: what turns such an image upright (EXIF 2.32, 4.6.4)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_MODES = ("I", "F")  # and I;16, I;16B, ...: more than 8 bits per pixel


def is_image(path: str) -> bool:
    """Whether a file is one that `decode_image` reads: by its extension, or DICOM by what it begins with.

    Scanners name DICOM files IM000001, or by a UID with dots in it.

    Raises:
        DataError: it cannot be looked at.
    """
    _, dot, end = path.rpartition("/")[2].rpartition(".")
    if dot and f".{end.lower()}" in _extensions():
        return True

    def begins() -> bytes:
        with Path(path).open("rb") as file:
            return file.read(PREAMBLE)

    return is_dicom(looked_at(begins, path))


@cache
def _extensions() -> frozenset[str]:
    """Lower-case suffixes of Pillow's formats and of DICOM."""
    pillow = (suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
    return frozenset((*pillow, *DICOM_SUFFIXES))


def load_image(path: Path, window: tuple[int, int] | None) -> Image.Image:
    """Read an image as RGB; see `decode_image`.

    Raises:
        ConfigError, DataError: as `decode_image`; DataError also where the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(refused(error, path)) from error
    return decode_image(data, path, window)


def decode_image(data: bytes, path: Path, window: tuple[int, int] | None) -> Image.Image:
    """Decode an image file's bytes to 8-bit RGB, turned upright by its EXIF orientation.

    Grey of more than 8 bits (16-bit, 32-bit, float; in DICOM as stored) is mapped from `window` [low, high] to 0..255.
    Transparent pixels become white. Of several frames or pages the first counts, but DICOM must have one. DICOM is
    known by its first bytes, or by its name. EXIF that cannot be read leaves an image as it is stored.

    Raises:
        DataError: names `path`; not an image, truncated, or too large.
        ConfigError: the plan lacks the window that this image needs, or a package is missing. No file's
            fault: all images like it would fail.
    """
    try:
        if is_dicom(data) or path.suffix.lower() in DICOM_SUFFIXES:
            return read_dicom(data, path, window)
        with Image.open(io.BytesIO(data)) as image:
            return _upright(image, _as_rgb(image, path, window))
    except (ConfigError, DataError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: has more pixels than Pillow reads safely ({error}); scale it down") from error
    except Exception as error:  # Pillow's and pydicom's decoders raise whatever a broken file makes them raise
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace it or move it away") from error


def _as_rgb(image: Image.Image, path: Path, window: tuple[int, int] | None) -> Image.Image:
    if image.mode in _DEEP_MODES or image.mode.startswith("I;"):
        values: npt.NDArray[np.generic] = np.asarray(image)
        return Image.fromarray(to_grey(values, path, window)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _upright(stored: Image.Image, image: Image.Image) -> Image.Image:
    """`image` turned as the EXIF of `stored` says; as it is where that cannot be read, for the pixels are sound."""
    try:
        orientation = stored.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises whatever a broken block makes it raise
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)
